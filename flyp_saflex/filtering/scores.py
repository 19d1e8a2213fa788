"""Model outputs of the command `filter` for edits and their sources.

Shapes: N edits, S sources, K classes, D embedding, T texts, V held-out images for the thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from flyp_saflex.clip.image_tower import ImageTower
from flyp_saflex.clip.model import Clip, load_clip
from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.config import Config
from flyp_saflex.errors import DataError, ModelError, RunError
from flyp_saflex.evaluation.predict import Variant, predict
from flyp_saflex.filtering.alia import clip_score, confident_thresholds, semantic_log_odds
from flyp_saflex.filtering.inputs import Checked, model_of
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.images.reader import ImageReader
from flyp_saflex.records import Edit, Sample
from flyp_saflex.saflex.evidence import combine
from flyp_saflex.tasks.clip_evidence import edit_evidence
from flyp_saflex.tasks.clip_task import ClipTask
from flyp_saflex.tasks.task import Predictor

SOURCE_EVIDENCE = ("source", "source-middle")
"""Kinds of evidence that the filter `source` combines."""


@dataclass(slots=True)
class Scores:
    """Scores of edits; the rows of unreadable edits are NaN.

    Attributes:
        similarity_N: cosine to the source, -1..1; NaN also if the source cannot be read.
        log_odds_N: score of the semantic filter; empty if it is not run.
        consistency_N: source consistency (`_consistency`); empty if it is not run.
        directional_N: directional similarity, -1..1; NaN also where captions are not known; empty without source consistency.
        clip_score_N: CLIPScore of the edit and its class, 0..2.5; empty if it is not run.
        probabilities_NK: class probabilities from the run's model; empty if the confidence filter is not run.
        unreadable: reason by position of the edit.
    """

    similarity_N: NDArray[np.float64]
    log_odds_N: NDArray[np.float64]
    consistency_N: NDArray[np.float64]
    directional_N: NDArray[np.float64]
    clip_score_N: NDArray[np.float64]
    probabilities_NK: NDArray[np.float64]
    unreadable: dict[int, str]


def load_filter_clip(config: Config, device: torch.device) -> Clip:
    """Load the model that compares edits with texts and sources.

    Raises:
        ModelError: its weights cannot be loaded.
    """
    try:
        return load_clip(*model_of(config), device=device)
    except ModelError as error:
        if not config.filter.model:
            raise
        text = str(error).replace("model.name", "filter.model").replace("model.pretrained", "filter.pretrained")
        raise ModelError(text) from error


def thresholds(config: Config, checked: Checked, model: ClipTask, state: PartialState) -> NDArray[np.float64]:
    """Return threshold_K from the probabilities of the run's model on the held-out images."""
    assert checked.thresholds_from is not None, "the confidence filter has a split"
    samples = checked.thresholds_from.samples[state.process_index :: state.num_processes]
    loader = _loader(config, model.clip, state, max_unreadable=config.data.max_unreadable)
    (logits_VK,) = _predict([_variant(model)], loader, samples, f"filter.run = {config.filter.run}")
    read = [(sample.label, row) for sample, row in zip(samples, logits_VK, strict=True) if row.size and np.isfinite(row).all()]
    gathered = [pair for part in gather_object([read]) for pair in part]
    if not gathered:
        raise DataError(f"none of the {len(checked.thresholds_from)} images of {checked.thresholds_from.name} can be read")
    return confident_thresholds(_softmax(np.stack([row for _, row in gathered])), [label for label, _ in gathered])


def score_edits(config: Config, checked: Checked, clip: Clip, model: ClipTask | None, state: PartialState) -> Scores:
    """Score the edits; every process scores its share of the sources, and all get the whole.

    Raises:
        DataError: no edit can be read.
    """
    sources = list(dict.fromkeys(edit.source_id for edit in checked.edits))
    mine = set(sources[state.process_index :: state.num_processes])
    share = [position for position, edit in enumerate(checked.edits) if edit.source_id in mine]
    own = _score(config, checked, share, clip, model, state)
    parts: list[tuple[list[int], Scores]] = gather_object([(share, own)])
    num_edits = len(checked.edits)
    whole = Scores(
        np.full(num_edits, np.nan),
        np.full(num_edits if checked.texts is not None else 0, np.nan),
        np.empty(0) if checked.captions is None else _consistency(config, checked, clip, state),
        np.full(num_edits if checked.captions is not None else 0, np.nan),
        np.full(num_edits if checked.clip_score else 0, np.nan),
        np.full((num_edits, checked.dataset.num_classes) if model else (0, 0), np.nan),
        {},
    )
    for positions, part in parts:
        whole.similarity_N[positions] = part.similarity_N
        if checked.texts is not None:
            whole.log_odds_N[positions] = part.log_odds_N
        if checked.captions is not None:
            whole.directional_N[positions] = part.directional_N
        if checked.clip_score:
            whole.clip_score_N[positions] = part.clip_score_N
        if model:
            whole.probabilities_NK[positions] = part.probabilities_NK
        whole.unreadable |= {positions[at]: reason for at, reason in part.unreadable.items()}
    if len(whole.unreadable) == num_edits:
        raise DataError(f"none of the {num_edits} edits in {checked.cache.folder} can be read; first: {whole.unreadable[0]}")
    return whole


def _score(
    config: Config, checked: Checked, share: Sequence[int], clip: Clip, model: ClipTask | None, state: PartialState
) -> Scores:
    """Score the edits at some positions in this process, by everything but source consistency.

    Every image is read once; edits are read twice if the two models preprocess differently.
    """
    edits = [checked.edits[position] for position in share]
    embed, name = _embedder(clip), model_of(config)[0]
    loader = _loader(config, clip, state)
    if model is None:
        (embeddings_ND,) = _predict([embed], loader, edits, name)
        logits_NK = np.empty((len(edits), 0))
    elif model.clip.config["preprocess_cfg"] == clip.config["preprocess_cfg"]:
        embeddings_ND, logits_NK = _predict(
            [embed, _variant(model)],
            loader,
            edits,
            f"{name} or {config.filter.run}",
        )
    else:
        (embeddings_ND,) = _predict([embed], loader, edits, name)
        (logits_NK,) = _predict(
            [_variant(model)],
            _loader(config, model.clip, state),
            edits,
            config.filter.run,
        )
    reasons = dict(loader.unreadable)
    unreadable = {n: reasons[str(edit.path)] for n, edit in enumerate(edits) if str(edit.path) in reasons}
    if len(unreadable) == len(edits):
        nothing_N = np.full(len(edits), np.nan)
        nothing_NK = np.full((len(edits), checked.dataset.num_classes), np.nan)
        return Scores(nothing_N, nothing_N, np.empty(0), nothing_N, nothing_N, nothing_NK, unreadable)
    log_odds_N = np.empty(0)
    if checked.texts is not None:
        positive, negative = checked.texts
        texts_TD = zero_shot_head(clip, [*positive, *negative], ["{}"]).cpu().numpy().astype(np.float64)
        logits_NT = float(clip.model.logit_scale.detach().exp()) * embeddings_ND @ texts_TD.T
        log_odds_N = semantic_log_odds(logits_NT[:, : len(positive)], logits_NT[:, len(positive) :])
    score_N = np.empty(0)
    if checked.clip_score:
        names_KD = zero_shot_head(clip, checked.dataset.class_names, checked.dataset.templates).cpu().numpy().astype(np.float64)
        score_N = clip_score((embeddings_ND * names_KD[[edit.label for edit in edits]]).sum(axis=1))
    samples = {sample.sample_id: sample for sample in checked.dataset.train.samples}
    sources = [samples[source_id] for source_id in dict.fromkeys(edit.source_id for edit in edits)]
    (sources_SD,) = _predict([embed], loader, sources, name)
    place = {sample.sample_id: n for n, sample in enumerate(sources)}
    similarity_N = directional_N = np.full(len(edits), np.nan)
    if sources_SD.size:
        own_ND = sources_SD[[place[edit.source_id] for edit in edits]]
        similarity_N = (embeddings_ND * own_ND).sum(axis=1)
        if checked.captions is not None:
            directional_N = _directional(clip, embeddings_ND - own_ND, [checked.captions[position] for position in share])
    return Scores(similarity_N, log_odds_N, np.empty(0), directional_N, score_N, _softmax(logits_NK), unreadable)


def _directional(clip: Clip, change_ND: NDArray[np.float64], captions: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
    """Return the cosine between the change of the image and the change of its caption; the filter of InstructPix2Pix.

    Source: StyleGAN-NADA (arXiv 2108.00946), section 4.1; InstructPix2Pix (arXiv 2211.09800), section 3.1.2.

    Args:
        clip: gives the captions' embeddings.
        change_ND: embedding of the edit minus that of its source.
        captions: of source and edit; empty: not known, NaN.
    """
    texts = list(dict.fromkeys(text for pair in captions for text in pair if text))
    if not texts:
        return np.full(len(captions), np.nan)
    texts_TD = zero_shot_head(clip, texts, ["{}"]).cpu().numpy().astype(np.float64)
    at = {text: number for number, text in enumerate(texts)}
    nothing_D = np.full(texts_TD.shape[1], np.nan)
    asked_ND = np.stack([texts_TD[at[after]] - texts_TD[at[before]] if after else nothing_D for before, after in captions])
    lengths_N = np.linalg.norm(change_ND, axis=1) * np.linalg.norm(asked_ND, axis=1)
    return (change_ND * asked_ND).sum(axis=1) / np.where(lengths_N > 0, lengths_N, np.nan)


def _consistency(config: Config, checked: Checked, clip: Clip, state: PartialState) -> NDArray[np.float64]:
    """Return by how much an edit resembles sources of its own class more than those of the next best class.

    Final embeddings and a middle layer, combined as SAFLEX combines its evidence, in standard deviations over labels that edits
    did not come with. NaN for edits that cannot be read.
    """
    evidence = edit_evidence(
        clip,
        SOURCE_EVIDENCE,
        checked.dataset,
        checked.edits,
        _loader(config, clip, state),
        rank=state.process_index,
        num_processes=state.num_processes,
    )
    own_N1 = torch.tensor([[edit.label] for edit in checked.edits])
    scores_NK = combine(evidence, own_N1[:, 0]).scores_NK
    own_N = scores_NK.gather(1, own_N1)[:, 0]
    margin_N: NDArray[np.float64] = (own_N - scores_NK.scatter(1, own_N1, -torch.inf).amax(dim=1)).double().numpy()
    return margin_N


def _loader(config: Config, clip: Clip, state: PartialState, *, max_unreadable: float = 1.0) -> ImageLoader:
    """Return a loader; unreadable edits get `keep = false`, so by default any number of them is allowed."""
    return ImageLoader(
        ImageReader(clip.preprocess, clip.config["preprocess_cfg"], scaled=config.data.decoding == "scaled"),
        batch_size=config.filter.batch_size,
        workers=config.data.workers,
        max_unreadable=max_unreadable,
        box_crop=config.data.box_crop,
        progress=state.is_main_process,
        pin=state.device.type == "cuda",
    )


def _variant(model: ClipTask) -> Variant:
    """Return what gives the predictor of a run's model."""
    return partial(model.predictor, precision=model.config.train.precision)


def _embedder(clip: Clip) -> Variant:
    """Return a variant whose predictor gives normalised image embeddings."""
    device, tower = next(clip.model.parameters()).device, ImageTower(clip.model.visual)

    @torch.no_grad()
    def embed(images_BCHW: Tensor) -> Tensor:
        return normalize(tower(images_BCHW.to(device, non_blocking=True)).float(), dim=-1)

    def enter() -> Predictor:
        return embed

    return enter


def _predict(
    variants: Sequence[Variant], loader: ImageLoader, items: Sequence[Sample | Edit], name: str
) -> list[NDArray[np.float64]]:
    """Return one float64 `[N, *]` per variant; the rows of unreadable images are NaN.

    Raises:
        RunError: a model gives NaN or infinity.
    """
    positions, parts = predict(variants, loader.batches(items))
    outputs = []
    for part in parts:
        if not torch.isfinite(part).all():
            raise RunError(f"{name} gives NaN or infinity for an image: its weights are broken, use another model")
        outputs.append(np.full((len(items), part.shape[1]), np.nan))
        outputs[-1][positions.numpy()] = part.numpy()
    return outputs


def _softmax(logits_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    probabilities: NDArray[np.float64] = torch.from_numpy(logits_NK).softmax(dim=1).numpy()
    return probabilities
