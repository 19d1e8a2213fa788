"""Which rows go into which split: names to roles, held-out parts, few-shot draws, quick looks (floor 2).

Every draw ranks rows by a hash of (seed, sample_id): it does not depend on the order of files or on how many there are,
so adding one image moves at most one other.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from flyp_saflex.errors import DataError
from flyp_saflex.records import Role, Sample, Shift, Split

SELECT_NAMES = ("id_val", "val", "valid", "validation", "dev")
TEST_NAMES = ("id_test", "test")


def role_and_shift(name: str, names: Collection[str]) -> tuple[Role, Shift]:
    """Return what a split of this name is for.

    `train`; `val`, `valid`, `validation`, `dev`, `id_val` select; `test`, `id_test` test; `ood_val` selects and every other
    name is an OOD test split. Beside `id_val` or `id_test`, plain `val` and `test` are the OOD ones, as in WILDS.

    Args:
        name: the split's name.
        names: all names of the dataset.
    """
    if name == "train":
        return "train", "id"
    if name in SELECT_NAMES:
        return "select", "ood" if name != "id_val" and "id_val" in names else "id"
    if name in TEST_NAMES:
        return "test", "ood" if name == "test" and "id_test" in names else "id"
    is_select = name.startswith("ood_") and name.removeprefix("ood_") in SELECT_NAMES
    return ("select" if is_select else "test"), "ood"


def split_by_name(rows: Iterable[tuple[str, Sample]]) -> dict[str, Split]:
    """Group (split name, sample) rows into splits: train first, then those that select, then those that test."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for name, sample in rows:
        groups[name].append(sample)
    splits = []
    for name, samples in groups.items():
        role, shift = role_and_shift(name, groups)
        splits.append(Split(name=name, role=role, shift=shift, samples=tuple(samples)))
    return in_reporting_order(splits)


def in_reporting_order(splits: Iterable[Split]) -> dict[str, Split]:
    """Order splits: train, select, test; in-distribution before OOD; then as given."""
    rank = {"train": 0, "select": 1, "test": 2}
    ordered = sorted(splits, key=lambda split: (split.name != "train", rank[split.role], split.shift == "ood"))
    return {split.name: split for split in ordered}


def hold_out(
    samples: Sequence[Sample],
    *,
    select_fraction: float,
    select_per_class: int,
    test_fraction: float,
    seed: int,
    name_of: Callable[[int], str],
) -> dict[str, Split]:
    """Split one pool into `train`, `id_val` and `id_test`, class by class.

    A fraction above 0 takes at least one image of every class; a part of size 0 is left out.

    Raises:
        DataError: a class has too few images to leave one for training.
    """
    parts: dict[str, list[str]] = {"id_val": [], "id_test": []}
    for label, ranked in _ranked_by_class(samples, seed).items():
        num_test = max(1, round(test_fraction * len(ranked))) if test_fraction else 0
        num_select = select_per_class or (max(1, round(select_fraction * len(ranked))) if select_fraction else 0)
        if num_test + num_select >= len(ranked):
            raise DataError(
                f"class '{name_of(label)}' has {len(ranked)} images in the training domains, but {num_select} for id_val and "
                f"{num_test} for id_test are held out, which leaves none to train on: add images or lower data.select_per_class, "
                "data.select_fraction or data.test_fraction"
            )
        parts["id_test"] += [sample.sample_id for sample in ranked[:num_test]]
        parts["id_val"] += [sample.sample_id for sample in ranked[num_test : num_test + num_select]]
    held = {name: set(ids) for name, ids in parts.items()}
    splits = [Split(name="train", role="train", shift="id", samples=_without(samples, held["id_val"] | held["id_test"]))]
    for name, role in (("id_val", "select"), ("id_test", "test")):
        chosen = tuple(sample for sample in samples if sample.sample_id in held[name])
        if chosen:
            splits.append(Split(name=name, role=role, shift="id", samples=chosen))  # type: ignore[arg-type]
    return {split.name: split for split in splits}


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """Keep `shots` images per class, drawn with `seed`; a class that has fewer keeps all."""
    kept = {sample.sample_id for ranked in _ranked_by_class(split.samples, seed).values() for sample in ranked[:shots]}
    return replace(split, samples=tuple(sample for sample in split.samples if sample.sample_id in kept))


def quick_look(split: Split, limit: int, seed: int) -> Split:
    """Keep at most `limit` images, spread over classes as evenly as they go."""
    if len(split) <= limit:
        return split
    by_class = _ranked_by_class(split.samples, seed)
    turns = [
        (turn, _hash(seed, f"class {label}"), sample.sample_id)
        for label, ranked in by_class.items()
        for turn, sample in enumerate(ranked)
    ]
    kept = {sample_id for _, _, sample_id in sorted(turns)[:limit]}
    return replace(split, samples=tuple(sample for sample in split.samples if sample.sample_id in kept))


def _ranked_by_class(samples: Iterable[Sample], seed: int) -> dict[int, list[Sample]]:
    by_class: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_class[sample.label].append(sample)
    return {
        label: sorted(by_class[label], key=lambda sample: (_hash(seed, sample.sample_id), sample.sample_id))
        for label in sorted(by_class)
    }


def _without(samples: Iterable[Sample], ids: set[str]) -> tuple[Sample, ...]:
    return tuple(sample for sample in samples if sample.sample_id not in ids)


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogateescape")).digest()
