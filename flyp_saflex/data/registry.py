"""Checked datasets from a recipe's `[data]` section.

The readers know one layout each. Here is what holds for every dataset: one `train` split, no image in two splits, every class
trained on, every file there; and what every recipe may ask for: few shots, more training rows, a quick look.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flyp_saflex.config import DataConfig
from flyp_saflex.data.boxes import with_boxes
from flyp_saflex.data.class_names import class_name_notes
from flyp_saflex.data.splitting import EVAL_NAMES, SELECT_NAMES, few_shot, folded, quick_look
from flyp_saflex.data.text import listed, nfc, shown
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Dataset, Role, Sample, Split
from flyp_saflex.tables import DATASETS, TEST_SETS

# Lists that are published as they are: a class that nobody trains on is worth a note, not an error.
CLASS_FOLDERS = "class-folders"
"""Reader of a test set under a name of the user's own."""
PUBLISHED = frozenset(("iwildcam", "iwildcam-mini", "cub", "waterbirds", "fmow", "camelyon17"))


def load_dataset(
    config: DataConfig, *, seed: int = 0, limit: int | None = None, check_files: bool = True, test_set: str = ""
) -> Dataset:
    """Read, check and cut a dataset as the recipe says; no image is decoded.

    Args:
        config: the recipe's `[data]` section.
        seed: seed of the few-shot draw.
        limit: at most this many images of each split, spread over classes; the same ones for every `seed`.
        check_files: whether every image file has to exist.
        test_set: read `config.root` as this one of `tables.TEST_SETS`, or as class folders under any other name; there is no
            training split then. Empty: read the dataset `config.name`.

    Raises:
        DataError: the dataset, or what the recipe asks of it, is wrong.
    """
    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit}: expected at least 1 image per split")
    dataset = (TEST_SETS[test_set if test_set in TEST_SETS else CLASS_FOLDERS] if test_set else DATASETS[config.name])(config)
    _check_splits(dataset, needs_train=not test_set)
    if check_files:
        _check_files(dataset)
    dataset = _with_own_classes(_with_groups(dataset, config), config)
    if config.boxes and not test_set:
        dataset = with_boxes(dataset, config.boxes)
    splits = dict(dataset.splits)
    notes = [*dataset.notes, *class_name_notes(dataset.class_names)]
    if config.shots:
        splits["train"] = few_shot(dataset.train, config.shots, seed)
        notes.append(f"data.shots = {config.shots}: {len(splits['train'])} of {len(dataset.train)} training images are used")
        short = [label for label, count in splits["train"].class_counts().items() if count < config.shots]
        if short:
            notes.append(
                f"data.shots = {config.shots}, but {len(short)} classes have fewer training images: all of theirs are used"
            )
    for name in config.add_to_train:
        added = _addable(dataset, name)
        splits["train"] = replace(splits["train"], samples=(*splits["train"].samples, *added.samples))
        splits.pop(added.name)
        notes.append(f"{len(added)} images of '{name}' are trained on (data.add_to_train)")
    notes += [] if test_set else _check_classes(replace(dataset, splits=splits), strict=config.name not in PUBLISHED)
    if limit is not None:
        whole = sum(len(split) for split in splits.values())
        splits = {name: quick_look(split, limit, config.split_seed) for name, split in splits.items()}
        kept = sum(len(split) for split in splits.values())
        notes.append(f"a quick look: at most {limit} images of each split, {kept} of {whole} in all")
    return replace(dataset, splits=splits, notes=tuple(notes), whole=dataset.splits)


def split_for(dataset: Dataset, name: str, role: Role | None = None) -> Split:
    """Return a split by name, and see to it that it is used for what it is there for.

    `id_val` also finds the in-distribution split of role `select` under its other usual names (`val`, `Valid`, `dev` ...).

    Args:
        dataset: where to look.
        name: the split's name.
        role: what it is wanted for; None: anything.

    Raises:
        DataError: there is no such split, or its role forbids the use.
    """
    split = dataset.splits.get(name) or dataset.splits.get(nfc(name)) or _synonym(dataset, name)
    if split is None:
        raise DataError(
            f"dataset '{dataset.name}' has no split '{name}'{nearest(name, dataset.splits)} (it has: {', '.join(dataset.splits)})"
        )
    if role is None or role == split.role:
        return split
    others = ", ".join(other.name for other in dataset.splits.values() if other.role == role) or "none"
    reason = {
        ("test", "select"): "test splits never select a model or steer training",
        ("test", "train"): "test splits are never trained on",
        ("select", "test"): "a split that selects models is no test of them",
    }.get((split.role, role), f"it has the role '{split.role}'")
    raise DataError(f"split '{split.name}' cannot be used as a '{role}' split: {reason}; use one of: {others}")


def _synonym(dataset: Dataset, name: str) -> Split | None:
    if folded(name) not in SELECT_NAMES:
        return None
    found = [
        split
        for split in dataset.splits.values()
        if folded(split.name) in (*SELECT_NAMES, *EVAL_NAMES) and (split.role, split.shift) == ("select", "id")
    ]
    return found[0] if len(found) == 1 else None


def _with_groups(dataset: Dataset, config: DataConfig) -> Dataset:
    """Return the dataset with the groups of `data.group_columns`, unless its reader has made them.

    Raises:
        DataError: a name is neither `class` nor `domain`.
    """
    names = config.group_columns
    if not names or any(sample.group for split in dataset.splits.values() for sample in split.samples):
        return dataset
    for name in names:
        if name not in ("class", "domain"):
            raise DataError(
                f"data.group_columns: '{shown(name)}' is no column of '{dataset.name}'; expected class and domain, or "
                "data.name = table and a table with the column"
            )

    def group(sample: Sample) -> str:
        values = {"class": dataset.class_names[sample.label], "domain": sample.domain}
        return ", ".join(f"{name}={values[name]}" for name in names)

    splits = {
        name: replace(split, samples=tuple(replace(sample, group=group(sample)) for sample in split.samples))
        for name, split in dataset.splits.items()
    }
    return replace(dataset, splits=splits)


def _with_own_classes(dataset: Dataset, config: DataConfig) -> Dataset:
    """Return the dataset with the classes of the splits of `data.own_classes`.

    Raises:
        DataError: there is no such split, or it is trained on.
    """
    splits = dict(dataset.splits)
    for name in config.own_classes:
        split = split_for(dataset, name)
        if split.role == "train":
            raise DataError(f"data.own_classes: '{name}' is trained on; name splits that are scored")
        splits[split.name] = replace(split, own_classes=tuple(sorted(split.class_counts())))
    return replace(dataset, splits=splits)


def _addable(dataset: Dataset, name: str) -> Split:
    split = split_for(dataset, name)
    if split.name == "train" or split.role == "test":
        allowed = [other.name for other in dataset.splits.values() if other.name != "train" and other.role != "test"]
        raise DataError(
            f"data.add_to_train: '{name}' cannot be added, its role is '{split.role}'; "
            f"possible are: {', '.join(allowed) or 'none'}"
        )
    return split


def _check_splits(dataset: Dataset, *, needs_train: bool) -> None:
    if needs_train and "train" not in dataset.splits:
        raise DataError(
            f"dataset '{dataset.name}' in {dataset.root} has no split 'train' (found: {', '.join(dataset.splits) or 'none'}); "
            "call one of the splits train"
        )
    for split in dataset.splits.values():
        if not split.samples:
            raise DataError(f"split '{split.name}' of '{dataset.name}' is empty: put images into it or remove it from the data")
    if _are_regular(dataset):
        return
    homes: dict[str, str] = {}
    for split in dataset.splits.values():
        for sample in split.samples:
            if not 0 <= sample.label < dataset.num_classes:
                raise DataError(
                    f"image '{sample.sample_id}' of split '{split.name}' has the label {sample.label}, but there are "
                    f"{dataset.num_classes} classes (0..{dataset.num_classes - 1}); correct the label or the class file"
                )
            if sample.sample_id in homes:
                where = (
                    f"'{homes[sample.sample_id]}' and '{split.name}'"
                    if homes[sample.sample_id] != split.name
                    else "the same split"
                )
                raise DataError(
                    f"image '{sample.sample_id}' is there twice, in {where}; an image belongs to one split, drop one of them"
                )
            homes[sample.sample_id] = split.name


def _are_regular(dataset: Dataset) -> bool:
    """Return whether all labels are those of a class and no image is there twice."""
    splits = dataset.splits.values()
    if any(min(split.labels) < 0 or max(split.labels) >= dataset.num_classes for split in splits):
        return False
    return len({sample_id for split in splits for sample_id in split.sample_ids}) == sum(map(len, splits))


def _check_files(dataset: Dataset) -> None:
    """Look every file up in its folder's listing: one call per folder, not per image, and paths as text."""
    listings: dict[str, frozenset[str]] = {}
    missing: dict[str, list[Sample]] = defaultdict(list)
    for split in dataset.splits.values():
        for place, file in enumerate(split.files()):
            if not file:
                continue
            folder, slash, name = file.rpartition("/")
            if folder not in listings:
                home = folder or slash or "."
                listings[folder] = frozenset(os.listdir(home)) if os.path.isdir(home) else frozenset()
            if name not in listings[folder]:
                missing[split.name].append(split.samples[place])
    if missing:
        lost = [sample for samples in missing.values() for sample in samples]
        counts = ", ".join(f"{len(samples)} of {len(dataset.splits[name])} in {name}" for name, samples in missing.items())
        raise DataError(
            f"images of '{dataset.name}' are missing ({counts}), first: "
            f"{', '.join(shown(str(sample.path), 200) for sample in lost[:3])}{_other_spelling(lost[0].path, listings)}; "
            "copy them there or correct data.root"
        )


def _other_spelling(path: Path, listings: Mapping[str, frozenset[str]]) -> str:
    """Return a hint if a file of this name is there in another case or another Unicode form."""
    wanted = nfc(path.name).casefold()
    other = next((name for name in sorted(listings[path.as_posix().rpartition("/")[0]]) if nfc(name).casefold() == wanted), None)
    if other is None:
        return ""
    how = "another Unicode form" if nfc(other) == nfc(path.name) else "another case"
    return f" (there is '{shown(other)}', the name in {how})"


def _check_classes(dataset: Dataset, *, strict: bool) -> list[str]:
    """Require training images of every class; for published lists return notes instead."""
    trained = dataset.train.class_counts()
    problems = []
    for split in dataset.splits.values():
        counts = split.class_counts()
        unseen = [label for label in sorted(counts) if label not in trained]
        if unseen:
            problems.append(
                f"split '{split.name}' has {sum(counts[label] for label in unseen)} images of classes without any training image "
                f"({_named(dataset, unseen)}); add training images of them or drop those rows"
            )
    absent = [label for label in range(dataset.num_classes) if label not in trained]
    if absent:
        problems.append(
            f"{len(absent)} of {dataset.num_classes} classes have no training image ({_named(dataset, absent)}); "
            "add images, or remove them from the class list or the training folder"
        )
    if problems and strict:
        raise DataError(f"dataset '{dataset.name}': {problems[0]}")
    return problems


def _named(dataset: Dataset, labels: list[int]) -> str:
    return listed([f"'{dataset.class_names[label]}'" for label in labels], 5)
