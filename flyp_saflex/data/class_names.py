"""Class keys of a dataset and the names that go into its captions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from flyp_saflex.config import DataConfig
from flyp_saflex.data.class_prompts import Prompts, load_prompts
from flyp_saflex.data.text import listed, nfc, nfc_all, shown
from flyp_saflex.errors import DataError, nearest

NUMBERING = re.compile(r"\d+\.(?=[^\W\d_])")
"""CUB's numbering: digits and a dot before a letter."""
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
WNID = re.compile(r"n\d{8}")
MISSING = frozenset(("nan", "none", "null", "na", "n/a", "<na>", "#n/a"))
"""Spellings of a missing value, in lower case."""


def readable(name: str) -> str:
    """Turn underscores and hyphens of a class key into spaces: `polar-bear` -> `polar bear`."""
    return re.sub(r"[_\-]+", " ", name).strip() or name


def readable_names(keys: Sequence[str]) -> tuple[str, ...]:
    """Turn class keys into words; CUB's numbering goes (`003.Sooty_Albatross` -> `Sooty Albatross`).

    The numbering goes only where every key has one and what is left begins with a letter and is distinct: `1.5T` stays.
    """
    rests = [NUMBERING.sub("", key, count=1) for key in keys]
    numbered = all(NUMBERING.match(key) for key in keys) and len({rest.casefold() for rest in rests}) == len(keys)
    return tuple(readable(name) for name in (rests if numbered else keys))


def class_list(config: DataConfig, keys: Sequence[str]) -> tuple[tuple[str, ...], Prompts]:
    """Return the class keys by index and the prompts, whose names belong to these keys.

    Without `classes.txt` the keys are those of the training data and their names are made readable. With it, the file
    decides which classes there are and in which order; a line's key (or, without a tab, its name) is matched with `keys`.

    Args:
        config: `prompts` names the folder.
        keys: distinct keys of the training data in Unicode's composed form.

    Raises:
        DataError: a training class is missing in `classes.txt`.
    """
    prompts = load_prompts(config.prompts or "default")
    if not prompts.class_keys:
        keys, names = tuple(keys), readable_names(keys)
        return keys, Prompts(class_names=names, class_keys=keys, templates=prompts.templates, folder=prompts.folder)
    found = set(keys)
    by_words = {words.casefold(): key for key, words in zip(keys, readable_names(keys), strict=True)}
    lines = zip(nfc_all(prompts.class_keys), readable_names(prompts.class_keys), strict=True)
    known = tuple(key if key in found else by_words.get(nfc(words).casefold(), key) for key, words in lines)
    if missing := [key for key in keys if key not in set(known)]:
        raise DataError(
            f"{prompts.folder / 'classes.txt'} has no line for the class '{shown(missing[0])}'"
            f"{nearest(shown(missing[0]), prompts.class_keys)} ({len(known)} classes there); "
            "add a line 'key<tab>English name'"
        )
    return known, prompts


def class_name_notes(names: Sequence[str]) -> list[str]:
    """Return notes on names whose captions say little: shared by classes, numbers, WordNet ids, missing values."""
    notes = []
    labels: dict[str, list[int]] = defaultdict(list)
    for label, name in enumerate(names):
        labels[nfc(name).casefold()].append(label)
    doubled = sorted(key for key, group in labels.items() if len(group) > 1)
    if doubled:
        told = listed([f"'{names[labels[key][0]]}' ({', '.join(map(str, labels[key]))})" for key in doubled], 4)
        notes.append(f"{len(doubled)} class names stand for more than one class, whose captions are then the same: {told}")
    tests = {"only numbers": NUMBER.fullmatch, "WordNet ids": WNID.fullmatch}
    for what, test in tests.items():
        if found := [f"'{name}'" for name in names if test(name)]:
            notes.append(
                f"{len(found)} of {len(names)} class names are {what} ({listed(found, 4)}), which say nothing in a caption: "
                "write names into a classes.txt and set data.prompts to its folder"
            )
    if missing := [f"'{name}'" for name in names if name.casefold() in MISSING]:
        notes.append(f"the class {listed(missing)} looks like a missing value: drop its images if they have no label")
    return notes
