"""Class names: what is stripped, what is told."""

from __future__ import annotations

import random
import unicodedata

import pytest

from flyp_saflex.data.class_names import class_name_notes, readable_names


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (("001.Black_footed_Albatross", "002.Laysan_Albatross"), ("Black footed Albatross", "Laysan Albatross")),
        (("1.5T", "3.5T", "7.62mm"), ("1.5T", "3.5T", "7.62mm")),
        (("1.5T", "3.0T"), ("1.5T", "3.0T")),
        (("0.0", "1.0"), ("0.0", "1.0")),
        (("001.Cat", "dog"), ("001.Cat", "dog")),
        (("1.cat", "2.cat"), ("1.cat", "2.cat")),
        (("1.cat", "2.Cat"), ("1.cat", "2.Cat")),
        (("1.Ä", "2.ß"), ("Ä", "ß")),
        (("polar-bear", "_", "C++"), ("polar bear", "_", "C++")),
    ],
)
def test_numbering_goes_only_where_all_have_one_and_names_stay_distinct(keys: tuple[str, ...], names: tuple[str, ...]):
    assert readable_names(keys) == names


@pytest.mark.parametrize("seed", range(50))
def test_distinct_keys_keep_distinct_names_or_are_told(seed: int):
    rng = random.Random(seed)
    keys = tuple({"".join(rng.choice("12.-_aT") for _ in range(rng.randrange(1, 6))) for _ in range(8)})
    names = readable_names(keys)
    assert len(names) == len(keys)
    doubled = len({name.casefold() for name in names}) < len(names)
    assert doubled == any("stand for more than one class" in note for note in class_name_notes(names))
    plain = tuple("".join(c for c in key if c not in "-_") for key in keys)
    if len(set(plain)) == len(keys) and all(plain):
        assert len(set(readable_names(plain))) == len(keys)


def test_names_that_say_nothing_are_told():
    assert class_name_notes(["cat", "dog", "n02 engine", "1.5T"]) == []
    (note,) = class_name_notes(["0", "1", "12.5", "cat"])
    assert note.startswith("3 of 4 class names are only numbers ('0', '1', '12.5')")
    (note,) = class_name_notes(["n01440764", "n01443537"])
    assert note.startswith("2 of 2 class names are WordNet ids ('n01440764', 'n01443537')")
    (note,) = class_name_notes(["cat", "NaN"])
    assert "'NaN' looks like a missing value" in note
    (note,) = class_name_notes(["Köter", unicodedata.normalize("NFD", "köter")])
    assert note.endswith("whose captions are then the same: 'Köter' (0, 1)")
