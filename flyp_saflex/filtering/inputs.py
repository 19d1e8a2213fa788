"""Inputs of the command `filter`, checked before any weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from flyp_saflex.clip.model import RANDOM
from flyp_saflex.config import Config, DataConfig
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.errors import ConfigError, DataError, RunError, UserError
from flyp_saflex.evaluation.load_run import check_model
from flyp_saflex.extras import require
from flyp_saflex.prompting.edit_prompts import load_edit_prompts
from flyp_saflex.records import Dataset, Edit, Split
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.augment_cache_files import refuse_links
from flyp_saflex.storage.data_record import class_difference, read_record
from flyp_saflex.storage.run_folder import RunDir


@dataclass(frozen=True, slots=True)
class Checked:
    """Checked inputs of the command `filter`; no weights are loaded.

    Attributes:
        cache: the cache entry.
        edits: edits of training images; only these are scored.
        dataset: the dataset of the sources.
        texts: positive and negative texts of the semantic filter; None: the filter is not run.
        captions: per edit, captions of its source and of the edit, empty where they are not known; None: source consistency is
            not run.
        run: recipe of the run whose model the confidence filter uses; None: the filter is not run.
        run_dataset: the run's own dataset; it has the same classes.
        thresholds_from: split that gives the thresholds; None without the confidence filter.
        clip_score: whether edits are compared with the names of their classes.
        hashes: whether edits are compared with their sources by perceptual hashes.
        notes: remarks for the user.
    """

    cache: AugmentCache
    edits: Sequence[Edit]
    dataset: Dataset
    texts: tuple[list[str], list[str]] | None
    captions: list[tuple[str, str]] | None
    run: Config | None
    run_dataset: Dataset
    thresholds_from: Split | None
    clip_score: bool
    hashes: bool
    notes: list[str]


def check(config: Config, *, limit: int | None = None) -> Checked:
    """Check everything that needs no weights.

    Raises:
        ConfigError, DataError, RunError: see `filter.filter_edits`.
    """
    options = config.filter
    dataset = load_dataset(replace(config.data, shots=0), seed=config.seed, limit=limit)
    cache = AugmentCache.open(config.cache.root, config.data.name, config.cache.key, dataset.class_names)
    if not len(cache):
        raise DataError(f"augment cache {cache.folder} holds no edit: run flyp-saflex generate first, or set cache.key")
    edits = cache.check_against(dataset, partial=limit is not None)
    notes = [*cache.notes]
    if limit is not None:
        notes.append(f"--limit: only {len(edits)} of {len(cache)} edits are scored, and {config.cache.scores} is not written")
    elif len(edits) < len(cache):
        notes.append(f"{len(cache) - len(edits)} edits were made from images that are not trained on: keep = false, not scored")
    if not edits:
        raise DataError(f"augment cache {cache.folder}: none of its {len(cache)} edits was made from a training image")
    if limit is None:
        _check_writable(cache, config.cache.scores)
    if options.pretrained and not options.model:
        notes.append("filter.pretrained has no effect without filter.model")
    texts, captions, run, run_dataset, split = None, None, None, dataset, None
    if "semantic" in options.use:
        texts = _texts(config, dataset)
    if "source" in options.use:
        captions = _captions(config, dataset, edits, notes)
    if "clip-score" in options.use:
        _check_pretrained(config, "CLIPScore")
    if hashes := "near-duplicate" in options.use:
        require('filter.use = "near-duplicate"', "imagehash")
    if "confidence" in options.use:
        split = _threshold_images(config, dataset, notes)
        run, run_dataset = _check_run(config, dataset, split, notes)
        if absent := [dataset.class_names[label] for label in range(dataset.num_classes) if label not in split.class_counts()]:
            shown = ", ".join(absent[:4]) + (" ..." if len(absent) > 4 else "")
            notes.append(
                f"{len(absent)} of {dataset.num_classes} classes have no image in {split.name}, so no threshold ({shown}): "
                f"the confidence filter never flags an edit {'of' if options.rule == 'alia' else 'predicted as'} one of them"
            )
    return Checked(cache, edits, dataset, texts, captions, run, run_dataset, split, "clip-score" in options.use, hashes, notes)


def _threshold_images(config: Config, dataset: Dataset, notes: list[str]) -> Split:
    """Return the images that give the thresholds."""
    options = config.filter
    if options.rule == "alia":
        notes.append(
            "filter.rule = alia: the threshold of the source's class, from training images, as in ALIA's released code; "
            "filter.threshold_split has no effect"
        )
        return dataset.train
    try:
        return split_for(dataset, options.threshold_split, "select")
    except DataError as error:
        raise ConfigError(f"filter.threshold_split = {options.threshold_split} cannot give thresholds: {error}") from None


def _texts(config: Config, dataset: Dataset) -> tuple[list[str], list[str]]:
    """Return the positive and the negative texts, with `{}` replaced by every class name in turn."""
    prompts = load_edit_prompts(config.editor.prompts, config.data.name)
    if not prompts.positive:
        raise DataError(
            f'{prompts.path} has no texts for the semantic filter: add [semantic] with positive = ["a photo of an animal"] and '
            'negative = ["a photo without animals"] in your own words, or set filter.use=["confidence"]'
        )
    _check_pretrained(config, "the semantic filter")
    positive, negative = (
        [*dict.fromkeys(text.replace("{}", name) for text in texts for name in (dataset.class_names if "{}" in text else ("",)))]
        for texts in (prompts.positive, prompts.negative)
    )
    return positive, negative


def _check_pretrained(config: Config, filter_: str) -> None:
    if model_of(config)[1] == RANDOM:
        raise ConfigError(
            f"{filter_} needs a pretrained model, but model.pretrained = {RANDOM}: set filter.model and "
            'filter.pretrained, or filter.use=["confidence"]'
        )


def _captions(config: Config, dataset: Dataset, edits: Sequence[Edit], notes: list[str]) -> list[tuple[str, str]]:
    """Return per edit the captions of its source and of itself; empty ones where no text of the file fits the edit."""
    _check_pretrained(config, "source consistency")
    if len({edit.label for edit in edits}) < 2:
        raise DataError(
            "source consistency compares the classes of the edits' sources, but all edits are of one class: "
            'leave "source" out of filter.use'
        )
    try:
        texts = load_edit_prompts(config.editor.prompts, config.data.name).edits
    except UserError as error:
        if config.editor.prompts:
            raise
        notes.append(f"no directional similarity, which takes captions from a file of edit texts: {error}")
        return [("", "")] * len(edits)
    found = {}
    for label, name in enumerate(dataset.class_names):
        before = dataset.templates[0].replace("{}", name)
        for text in texts:
            for asked in (text.instruction, text.prompt):
                found[label, asked.replace("{}", name)] = before, text.prompt.replace("{}", name)
    captions = [found.get((edit.label, edit.instruction), ("", "")) for edit in edits]
    if unknown := sum(not after for _, after in captions):
        notes.append(f"{unknown} edits have no directional similarity: no text of editor.prompts fits their instruction")
    return captions


def _check_run(config: Config, dataset: Dataset, split: Split, notes: list[str]) -> tuple[Config, Dataset]:
    """Check the run of the confidence filter; return its recipe and its dataset."""
    path = Path(config.filter.run)
    if not config.filter.run:
        raise ConfigError(
            'filter.run is empty, but filter.use has "confidence": train on the clean images (flyp-saflex train RECIPE '
            "--set augment.upstream=[] --set saflex.enabled=false --run-dir RUN) and set filter.run=RUN, or set "
            'filter.use=["semantic"]'
        )
    if not path.is_dir():
        raise RunError(f"filter.run = {path}: there is no such folder; give the folder that `flyp-saflex train` wrote")
    folder = RunDir(path, lock=False)
    run = folder.read_config()
    check_model(folder, run)
    own = dataset
    if _which_images(run.data) != _which_images(config.data):
        own = load_dataset(run.data, seed=run.seed, check_files=False)
    record = read_record(path)
    for names in (record.class_names if record is not None else own.class_names, own.class_names):
        if changed := class_difference(names, dataset.class_names):
            raise RunError(
                f"filter.run = {path} was trained on {len(names)} classes of '{own.name}', not on the {dataset.num_classes} "
                f"of '{dataset.name}' (first difference: {changed}): give a run trained on this dataset"
            )
    if "cache" in run.augment.upstream:
        notes.append(
            f"filter.run = {path} was itself trained on edits (augment.upstream): it may have learned their faults; a run "
            "with augment.upstream=[] is the better judge"
        )
    trained = {sample.sample_id for sample in own.train.samples}
    if config.filter.rule != "alia" and (seen := sum(sample.sample_id in trained for sample in split.samples)):
        notes.append(
            f"filter.run = {path} was trained on {seen} of the {len(split)} images of {split.name}: thresholds come out too high"
        )
    return run, own


def _check_writable(cache: AugmentCache, file: str) -> None:
    """Refuse a folder that cannot be written, and a file that holds no scores."""
    path = cache.folder / file
    refuse_links(cache.folder)
    if not os.access(cache.folder, os.W_OK):
        raise DataError(f"augment cache {cache.folder} cannot be written: check its permissions, or copy it and set cache.root")
    if path.exists() and not _is_scores(path):
        raise ConfigError(f"cache.scores = {file}: {path} exists and holds no scores; choose another name")


def _is_scores(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            row = msgspec.json.decode(file.readline() or b'{"keep": null}')
        return isinstance(row, dict) and "keep" in row
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def plan_line(config: Config, checked: Checked, *, dry_run: bool) -> str:
    """Return one line that says which edits are scored and by which filters."""
    parts = [f"similarity to the source ({model_of(config)[0]})"]
    if checked.texts is not None:
        parts.append(f"semantic filter ({len(checked.texts[0])} positive, {len(checked.texts[1])} negative texts)")
    if checked.captions is not None:
        num_sources = len({edit.source_id for edit in checked.edits})
        parts.append(f"source consistency ({num_sources} sources) and directional similarity")
    if checked.clip_score:
        parts.append(f"CLIPScore of the class's name (at least {config.filter.min_clip_score:g})")
    if checked.hashes:
        parts.append(f"perceptual hashes of edit and source (at least {config.filter.min_hash_distance} bits apart)")
    if checked.thresholds_from is not None:
        split = checked.thresholds_from
        parts.append(f"confidence filter ({config.filter.run}, thresholds from {len(split)} images of {split.name})")
    done = "dry run: all checks passed; would score" if dry_run else "scoring"
    return f"{done} {len(checked.edits)} edits in {checked.cache.folder}: {', '.join(parts)}"


def model_of(config: Config) -> tuple[str, str]:
    """Return name and pretrained tag of the CLIP model that compares edits with texts and sources."""
    options = config.filter
    return (options.model, options.pretrained) if options.model else (config.model.name, config.model.pretrained)


def _which_images(data: DataConfig) -> DataConfig:
    """Return the section without the options on how images are read: equal sections have equal images."""
    return replace(data, workers=0, max_unreadable=0, decoding="exact", materialised="", materialised_px=1)
