"""Account of a dataset's rows or files: what was found is used or left out for a named reason."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

SHOWN_REASONS = 12


@dataclass
class Account:
    """Number of rows or files found, and of those left out by reason.

    Attributes:
        what: what is counted, for example `rows of t.csv`.
        found: number found.
        left_out: number left out, by reason; a reason reads well behind a number (`6 .txt files`).
    """

    what: str
    found: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count what is left out; `found` grows by as much."""
        if count:
            self.found += count
            self.left_out[reason] += count

    def reasons(self) -> str:
        """Return what was left out and why, the largest numbers first; empty if nothing was."""
        rows = self.left_out.most_common()
        shown = [f"{count} {_of_one(reason) if count == 1 else reason}" for reason, count in rows[:SHOWN_REASONS]]
        if rest := rows[SHOWN_REASONS:]:
            shown.append(f"{sum(count for _, count in rest)} for {len(rest)} other reasons")
        return ", ".join(shown)

    def note(self, used: int) -> str:
        """Return the sum as a sentence.

        Args:
            used: number in the splits.
        """
        left = self.left_out.total()
        assert self.found == used + left, f"{self.found} {self.what}, but {used} used and {left} left out"
        line = f"{self.found} {self.what} = {used} in splits"
        return f"{line} + {left} left out ({self.reasons()})" if left else line


def _of_one(reason: str) -> str:
    return re.sub(r"\b(image|file|line)s\b", r"\1", reason, count=1)
