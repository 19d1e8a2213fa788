"""Evidence on cached edits from the pretrained CLIP, before anything is trained.

One pass over the edits and their sources gives zero-shot logits, final embeddings and a middle layer on a coarse grid. Each
kind of evidence (`tables.EVIDENCE`) turns them into scores of all labels; `saflex/evidence.py` combines the kinds.

Shapes: N edits, S sources, K classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import normalize

from flyp_saflex.clip.image_tower import ImageTower, num_blocks
from flyp_saflex.clip.model import Clip
from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.records import Dataset, Edit, Sample
from flyp_saflex.saflex.evidence import on_grid, source_evidence
from flyp_saflex.tables import EVIDENCE

MIDDLE = 0.7
"""Depth of the middle layer, a fraction of the tower's blocks."""
LARGEST_MIDDLE = 1024
"""Numbers kept of a middle layer: a random projection, which keeps angles, replaces longer ones."""


@dataclass(frozen=True, kw_only=True)
class EditFeatures:
    """Features of edits and of their sources; rows of unreadable images are NaN.

    Attributes:
        logits_NK: zero-shot logits of the edits.
        final_ND, middle_ND: final embeddings and middle layer of the edits.
        final_SD, middle_SD: the same of the sources, each once.
        labels_S: class of every source.
        groups_N: index of every edit's instruction.
    """

    logits_NK: Tensor
    final_ND: Tensor
    middle_ND: Tensor
    final_SD: Tensor
    middle_SD: Tensor
    labels_S: Tensor
    groups_N: Tensor


def zero_shot(features: EditFeatures) -> Tensor:
    """Return the zero-shot log-probabilities of the edits."""
    return features.logits_NK.log_softmax(dim=1)


def source_final(features: EditFeatures) -> Tensor:
    """Return source consistency by final embeddings."""
    return source_evidence(
        features.final_ND, features.final_SD, features.labels_S, features.groups_N, features.logits_NK.shape[1]
    )


def source_middle(features: EditFeatures) -> Tensor:
    """Return source consistency by a middle layer: layout and texture count, the class does not."""
    return source_evidence(
        features.middle_ND, features.middle_SD, features.labels_S, features.groups_N, features.logits_NK.shape[1]
    )


def edit_evidence(
    clip: Clip,
    kinds: Sequence[str],
    dataset: Dataset,
    edits: Sequence[Edit],
    loader: ImageLoader,
    *,
    rank: int = 0,
    num_processes: int = 1,
) -> dict[str, Tensor]:
    """Return scores_NK by kind; every process reads its share of the images, all get the whole.

    Args:
        clip: pretrained, in evaluation mode.
        kinds: names in `tables.EVIDENCE`.
        dataset: classes, templates, and the training samples that edits were made from.
        edits: N of them.
        loader: of the model's inputs.
        rank: this process.
        num_processes: how many there are.
    """
    used = {edit.source_id for edit in edits}
    sources = [sample for sample in dataset.train.samples if sample.sample_id in used]
    items: list[Sample | Edit] = [*edits, *sources]
    share = list(range(rank, len(items), num_processes))
    final, middle = _features(clip, [items[position] for position in share], loader)
    if num_processes > 1:
        parts = gather_object([(share, final.numpy(), middle.numpy())])
        share = [position for part in parts for position in part[0]]
        final, middle = (torch.from_numpy(np.concatenate([part[place] for part in parts])) for place in (1, 2))
    order = torch.tensor(share).argsort()
    final, middle = final[order], middle[order]
    head_KD = zero_shot_head(clip, dataset.class_names, dataset.templates).cpu()
    scale = float(clip.model.logit_scale.detach().exp())
    num_edits = len(edits)
    features = EditFeatures(
        logits_NK=scale * final[:num_edits].float() @ head_KD.T,
        final_ND=final[:num_edits],
        middle_ND=middle[:num_edits],
        final_SD=final[num_edits:],
        middle_SD=middle[num_edits:],
        labels_S=torch.tensor([sample.label for sample in sources]),
        groups_N=instruction_groups(edits, dataset.class_names),
    )
    return {kind: EVIDENCE[kind](features) for kind in kinds}


def instruction_groups(edits: Sequence[Edit], class_names: Sequence[str]) -> Tensor:
    """Return the index of each edit's instruction, without the class name, which must not be centred away."""
    texts = [edit.instruction.replace(class_names[edit.label], "{}") for edit in edits]
    index = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([index[text] for text in texts])


@torch.no_grad()
def _features(clip: Clip, items: Sequence[Sample | Edit], loader: ImageLoader) -> tuple[Tensor, Tensor]:
    """Return normalised final embeddings and the middle layer of some images, float32 on the CPU."""
    visual = clip.model.visual
    blocks = num_blocks(visual)
    tower = ImageTower(visual, max(1, round(MIDDLE * blocks)) if blocks else 0)
    device = next(visual.parameters()).device
    final: Tensor | None = None
    middle: Tensor | None = None
    project: Tensor | None = None
    for positions, images in loader.batches(items):
        hidden = tower.lower(images.to(device, non_blocking=True))
        embeddings = normalize(tower(hidden).float(), dim=1)
        grid = on_grid(hidden) if blocks and hidden.ndim in (3, 4) else embeddings  # a tower without blocks has one layer
        if grid.shape[1] > LARGEST_MIDDLE:
            if project is None:
                generator = torch.Generator().manual_seed(0)
                project = torch.randn(grid.shape[1], LARGEST_MIDDLE, generator=generator).to(grid) / LARGEST_MIDDLE**0.5
            grid = normalize(grid, dim=1) @ project
        if final is None or middle is None:
            final = torch.full((len(items), embeddings.shape[1]), torch.nan, dtype=torch.float32)
            middle = torch.full((len(items), grid.shape[1]), torch.nan, dtype=torch.float32)
        final[positions], middle[positions] = embeddings.cpu(), grid.float().cpu()
    if final is None or middle is None:
        final = middle = torch.full((len(items), 1), torch.nan)
    return final, middle
