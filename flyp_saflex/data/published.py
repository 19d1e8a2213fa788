"""Differences between a copy of a data set and the published one: errors, or notes with `data.accept_altered`."""

from __future__ import annotations

from dataclasses import dataclass, field

from flyp_saflex.data.text import listed
from flyp_saflex.errors import DataError
from flyp_saflex.records import Split

FEW = 10
"""Rows of a class in a split below which a score of the class is mostly chance."""


@dataclass
class Problems:
    """Differences found so far.

    Attributes:
        accepted: `data.accept_altered`.
        notes: differences that were accepted.
    """

    accepted: bool
    notes: list[str] = field(default_factory=list)

    def found(self, text: str, fix: str = "") -> None:
        """Stop at a difference, or take a note of it.

        Raises:
            DataError: differences are not accepted.
        """
        if not self.accepted:
            raise DataError(f"{text}; {fix or 'get the published file, or go on with data.accept_altered=true'}")
        self.notes.append(f"altered copy: {text}")


def few_notes(splits: dict[str, Split], names: tuple[str, ...]) -> list[str]:
    """Return a warning for every split that selects with few rows of a class."""
    notes = []
    for split in splits.values():
        counts = split.class_counts()
        if split.role == "select" and (few := [label for label in range(len(names)) if counts[label] < FEW]):
            told = listed([f"'{names[label]}' ({counts[label]})" for label in few])
            notes.append(
                f"warning: split '{split.name}' has fewer than {FEW} rows of {told}: what is chosen on it is mostly chance"
            )
    return notes
