"""Corrupted edits with a known truth: nesting in the rate, what an entry holds, going on after a stop."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex.demo.corruption import CLEAN, KnownEdit, draw_kind, read_truth, write_entry
from flyp_saflex.errors import DataError
from flyp_saflex.storage.augment_cache import AugmentCache

KINDS = ("swapped", "lost")


def kinds(rate: float, number: int = 4000) -> list[str]:
    return [draw_kind(rate, KINDS, np.random.default_rng(seed)) for seed in range(number)]


def test_corrupted_edits_are_corrupted_in_the_same_way_at_every_higher_rate() -> None:
    low, middle, high = kinds(0.25), kinds(0.5), kinds(0.75)
    assert all(a in (CLEAN, b) and b in (CLEAN, c) for a, b, c in zip(low, middle, high, strict=True))
    assert Counter(low) != Counter(middle) != Counter(high)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_the_rate_is_the_part_that_is_corrupted_half_in_each_way(rate: float) -> None:
    counts = Counter(kinds(rate))
    # Four standard deviations of a share of 4000 draws are at most 0.032.
    assert counts[CLEAN] / 4000 == pytest.approx(1 - rate, abs=0.032)
    assert counts["swapped"] / 4000 == pytest.approx(rate / 2, abs=0.032)


class Draw:
    """Draws grey pictures and counts them; fails from the `limit`-th on."""

    def __init__(self, limit: int = 100) -> None:
        self.count, self.limit = 0, limit

    def __call__(self) -> Image.Image:
        if self.count == self.limit:
            raise KeyboardInterrupt
        self.count += 1
        return Image.new("RGB", (8, 8), (40, 50, 60))

    def edits(self, number: int = 4) -> list[KnownEdit]:
        return [
            KnownEdit(
                file_name=f"images/{n}.png", source_id=f"{n}.jpg", label=n % 2, instruction="make it grey", domain="grey",
                kind=(CLEAN, "swapped", "lost")[n % 3], true_label=(n % 2, 1 - n % 2, None)[n % 3], draw=self,
            )
            for n in range(number)
        ]  # fmt: skip


def test_an_entry_tells_the_truth_beside_the_manifest_only(tmp_path: Path) -> None:
    folder = write_entry(tmp_path, "folder", "key", Draw().edits(), made_by="paint", seed=3)
    cache = AugmentCache.open(tmp_path, "folder", "key")
    assert cache.folder == folder
    assert cache.done
    assert [edit.label for edit in cache.edits] == [0, 1, 0, 1]
    assert {(edit.provenance["kind"], edit.provenance["seed"], edit.provenance["domain"]) for edit in cache.edits} == {
        ("paint", 3, "grey")
    }
    assert not any(word in (folder / "metadata.jsonl").read_text(encoding="utf-8") for word in (CLEAN, *KINDS))
    assert [edit.aug_id for edit in cache.kept("oracle.jsonl")] == ["images/0.png", "images/3.png"]
    assert [row["true_label"] for row in cache.scores("oracle.jsonl").values()] == [0, 0, None, 1]
    assert list(read_truth(tmp_path, "folder", "key").values()) == [CLEAN, "swapped", "lost", CLEAN]


def test_what_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    interrupted = Draw(limit=2)
    with pytest.raises(KeyboardInterrupt):
        write_entry(tmp_path, "folder", "key", interrupted.edits(), made_by="paint", seed=3)
    assert not AugmentCache.open(tmp_path, "folder", "key").done
    rest, nothing = Draw(), Draw()
    write_entry(tmp_path, "folder", "key", rest.edits(), made_by="paint", seed=3)
    write_entry(tmp_path, "folder", "key", nothing.edits(), made_by="paint", seed=3)
    assert (interrupted.count, rest.count, nothing.count) == (2, 2, 0)
    assert AugmentCache.open(tmp_path, "folder", "key").done


def test_edits_of_another_plan_are_refused(tmp_path: Path) -> None:
    write_entry(tmp_path, "folder", "key", Draw().edits(4), made_by="paint", seed=3)
    with pytest.raises(DataError, match="made with other settings"):
        write_entry(tmp_path, "folder", "key", Draw().edits(5), made_by="paint", seed=3)
