"""Splits of a dataset: names to roles, held-out parts, few-shot draws, quick looks.

Every draw ranks rows by a hash of (seed, sample_id): it does not depend on the order of files or on how many there are,
so adding one image moves at most one other.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from flyp_saflex.data.text import listed, nfc, shown
from flyp_saflex.errors import DataError
from flyp_saflex.records import Role, Sample, Shift, Split, rows_at

TRAIN_NAMES = ("train", "training")
SELECT_NAMES = ("id_val", "val", "valid", "validation", "dev", "development")
TEST_NAMES = ("id_test", "test", "testing")
EVAL_NAMES = ("eval", "evaluation")
"""Two habits: the split that selects beside a test split, and the test split itself."""
OWN_NAMES = ("train", "id_val", "id_test")
"""Names of the splits that `hold_out` makes."""
MOST_BYTES = 200
"""Longest name of a split in UTF-8: with endings, a file of this name has to fit into 255 bytes."""


def folded(name: str) -> str:
    """Return a split's name for comparison: Unicode's composed form, lower case, `_` for spaces and hyphens."""
    return re.sub(r"[\s\-]+", "_", nfc(name).strip()).casefold()


def role_and_shift(name: str, names: Collection[str]) -> tuple[Role, Shift]:
    """Return what a split of this name is for.

    In any case: `train`, `training`; `val`, `valid`, `validation`, `dev`, `id_val` select; `test`, `testing`, `id_test` test;
    `ood_val` selects and every other name is an OOD test split. Beside `id_val` or `id_test`, plain `val` and `test` are the
    OOD ones, as in WILDS. `eval` selects where another split tests and none selects, otherwise it tests.

    Args:
        name: the split's name.
        names: all names of the dataset.
    """
    name, known = folded(name), {folded(other) for other in names}
    if name in TRAIN_NAMES:
        return "train", "id"
    if name in EVAL_NAMES:
        selects = not known.isdisjoint(TEST_NAMES) and known.isdisjoint(SELECT_NAMES)
        return ("select", "id") if selects else ("test", "ood" if "id_test" in known else "id")
    if name in SELECT_NAMES:
        return "select", "ood" if name != "id_val" and "id_val" in known else "id"
    if name in TEST_NAMES:
        return "test", "ood" if name != "id_test" and "id_test" in known else "id"
    is_select = name.startswith("ood_") and name.removeprefix("ood_") in SELECT_NAMES
    return ("select" if is_select else "test"), "ood"


def canonical_split(name: str) -> str:
    """Return the name that a split goes by: `train` for every spelling of it, others in Unicode's composed form."""
    return "train" if folded(name) in TRAIN_NAMES else nfc(name)


def split_notes(names: Collection[str]) -> list[str]:
    """Return notes on names that are read in a way a person may not expect.

    Args:
        names: names of the splits as the dataset spells them.
    """
    notes = [f"the split '{shown(name)}' is read as 'train'" for name in names if canonical_split(name) == "train" != name]
    for name in names:
        if folded(name) in EVAL_NAMES:
            role = {"select": "selects models", "test": "tests"}[role_and_shift(name, names)[0]]
            notes.append(f"the split '{shown(name)}' {role}; call it val or test if that is wrong")
    ordinary = (*TRAIN_NAMES, *SELECT_NAMES, *TEST_NAMES, *EVAL_NAMES)
    if others := [f"'{name}'" for name in names if folded(name) not in ordinary and not folded(name).startswith("ood_")]:
        notes.append(
            f"{listed(others)}: taken for out-of-distribution test splits, as every name is but train, val, test, "
            "their synonyms and ood_val"
        )
    return notes


def check_domain_names(option: str, domain: str, *, fix: str) -> None:
    """Refuse a domain whose split would have the name of a split that is held out.

    Args:
        option: the option that names it.
        domain: its name.
        fix: what to do.

    Raises:
        DataError: it is called train, id_val or id_test, in any case.
    """
    if folded(domain) in OWN_NAMES:
        raise DataError(f"{option}: a domain called '{shown(domain)}' is taken for a split; {fix}")


def split_by_name(names: Sequence[str], samples: Sequence[Sample]) -> dict[str, Split]:
    """Group rows into splits: train first, then those that select, then those that test.

    Args:
        names: name of every row's split.
        samples: the rows.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        groups[name].append(place)
    splits = []
    for name, places in groups.items():
        role, shift = role_and_shift(name, groups)
        splits.append(Split(name=name, role=role, shift=shift, samples=rows_at(samples, places)))
    return in_reporting_order(splits)


def in_reporting_order(splits: Iterable[Split]) -> dict[str, Split]:
    """Order splits: train, select, test; in-distribution before OOD; then as given.

    Raises:
        DataError: two splits have one name, perhaps in another case, or a name is longer than a file's may be.
    """
    rank = {"train": 0, "select": 1, "test": 2}
    ordered = sorted(splits, key=lambda split: (split.name != "train", rank[split.role], split.shift == "ood"))
    spelt: dict[str, str] = {}
    for split in ordered:
        key = nfc(split.name).casefold()
        if (other := spelt.get(key)) is not None:
            how = "are called" if other == split.name else "differ in upper and lower case or in Unicode form only:"
            raise DataError(
                f"two splits {how} '{shown(other)}' and '{shown(split.name)}'; rename one, or join them under one name"
            )
        spelt[key] = split.name
        if (size := len(split.name.encode("utf-8", "backslashreplace"))) > MOST_BYTES:
            raise DataError(
                f"the name of the split '{shown(split.name, 60)}' has {size} bytes, at most {MOST_BYTES} fit into the name of "
                "its files; shorten the domain's or split's name in the data"
            )
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
    pool = Split(name="train", role="train", shift="id", samples=samples)
    parts: dict[str, list[str]] = {"id_val": [], "id_test": []}
    for label, ranked in _ranked_by_class(pool, seed).items():
        num_test = max(1, round(test_fraction * len(ranked))) if test_fraction else 0
        num_select = select_per_class or (max(1, round(select_fraction * len(ranked))) if select_fraction else 0)
        if num_test + num_select >= len(ranked):
            raise DataError(
                f"class '{name_of(label)}' has {len(ranked)} images in the training domains, but {num_select} for id_val and "
                f"{num_test} for id_test are held out, which leaves none to train on: add images or lower data.select_per_class, "
                "data.select_fraction or data.test_fraction"
            )
        parts["id_test"] += ranked[:num_test]
        parts["id_val"] += ranked[num_test : num_test + num_select]
    held = {name: set(ids) for name, ids in parts.items()}
    trained = set(pool.sample_ids) - held["id_val"] - held["id_test"]
    splits = [replace(pool, samples=pool.keep(trained))]
    for name, role in (("id_val", "select"), ("id_test", "test")):
        chosen = pool.keep(held[name])
        if chosen:
            splits.append(Split(name=name, role=role, shift="id", samples=chosen))  # type: ignore[arg-type]
    return {split.name: split for split in splits}


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """Keep `shots` images per class, drawn with `seed`; a class that has fewer keeps all."""
    kept = {sample_id for ranked in _ranked_by_class(split, seed).values() for sample_id in ranked[:shots]}
    return replace(split, samples=split.keep(kept))


def quick_look(split: Split, limit: int, seed: int) -> Split:
    """Keep at most `limit` images, spread over classes as evenly as they go."""
    if len(split) <= limit:
        return split
    turns = [
        (turn, _hash(seed, f"class {label}"), sample_id)
        for label, ranked in _ranked_by_class(split, seed).items()
        for turn, sample_id in enumerate(ranked)
    ]
    kept = {sample_id for _, _, sample_id in sorted(turns)[:limit]}
    return replace(split, samples=split.keep(kept))


def _ranked_by_class(split: Split, seed: int) -> dict[int, list[str]]:
    """Return the identities of every class, in the order of their hashes."""
    by_class: dict[int, list[str]] = defaultdict(list)
    for sample_id, label in zip(split.sample_ids, split.labels, strict=True):
        by_class[label].append(sample_id)
    return {
        label: sorted(by_class[label], key=lambda sample_id: (_hash(seed, sample_id), sample_id)) for label in sorted(by_class)
    }


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogateescape")).digest()
