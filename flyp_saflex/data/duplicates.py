"""Rows that are in two splits: what is trained on and tested on alike tests nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

from flyp_saflex.data.text import shown
from flyp_saflex.records import Sample, Split


def duplicates_across(splits: Mapping[str, Split], key_of: Callable[[Sample], Hashable]) -> list[dict[str, str]]:
    """Return groups of equal rows that are in more than one split: the first sample id by split.

    Args:
        splits: of the dataset.
        key_of: content of a sample, equal for equal ones.
    """
    homes: dict[Hashable, dict[str, str]] = {}
    for split in splits.values():
        for sample in split.samples:
            homes.setdefault(key_of(sample), {}).setdefault(split.name, sample.sample_id)
    return [found for found in homes.values() if len(found) > 1]


def duplicate_notes(splits: Mapping[str, Split], key_of: Callable[[Sample], Hashable], what: str) -> list[str]:
    """Return a note that counts equal rows in two splits and names the first; nothing if there are none."""
    found = duplicates_across(splits, key_of)
    if not found:
        return []
    first = " = ".join(f"{split}: {shown(sample_id)}" for split, sample_id in found[0].items())
    return [f"{len(found)} {what} are in two splits (first: {first}); what is trained on and tested on alike tests nothing"]
