"""Progress of `generate`: counts of edits, and contact sheets at intervals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from flyp_saflex.editing.edit_images import EditResult
from flyp_saflex.images.contact_sheet import Tile, contact_sheet
from flyp_saflex.storage.augment_cache import SHEETS

SHEET_SOURCES, SHEET_COLUMNS, SHEET_PX = 12, 8, 256


@dataclass
class Tally:
    """Counts of edits, rejections and unreadable sources in this process."""

    made: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def add(self, results: Sequence[EditResult]) -> None:
        """Count some outcomes."""
        for result in results:
            if result.unreadable:
                self.unreadable[result.planned.sample.sample_id] = result.reason
            elif result.image is None:
                self.rejected[result.reason] += 1
            else:
                self.made += 1

    def line(self) -> str:
        """Return the counts as one line; the empty string if there are none."""
        if not (self.made or self.rejected or self.unreadable):
            return ""
        seconds = time.monotonic() - self.started
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common(3)) or "none"
        return (
            f"{self.made} edits made in {seconds:.0f} s ({self.made / max(seconds, 1e-9):.2f} a second); rejected: "
            f"{self.rejected.total()} ({reasons}); sources that cannot be read: {len(self.unreadable)}"
        )


class Sheets:
    """Contact sheets of the newest edits: each source is followed by its edits; sources with few edits share a row.

    Args:
        entry: folder of the cache entry.
        every: edits between sheets; 0: one at the end.
        index, count: number of the writer and number of writers, for the names of the sheets.
        done: edits that the entry had before; the numbers of the sheets continue from there.
    """

    def __init__(self, entry: Path, every: int, *, index: int, count: int, done: int = 0) -> None:
        self.every = every
        self.folder = entry / SHEETS
        self.name = "" if count == 1 else f"-{index}-of-{count}"
        self.rows: dict[str, list[Tile]] = {}
        self.made, self.since = done, 0

    def add(self, results: Sequence[EditResult]) -> None:
        """Add edits; write a sheet when `every` edits have come since the last one."""
        for result in results:
            if result.unreadable:
                continue
            sample = result.planned.sample
            if sample.sample_id not in self.rows:
                self.rows[sample.sample_id] = [Tile(_small(result.source), sample.sample_id)]
                self.rows = dict(list(self.rows.items())[-SHEET_SOURCES:])
            text = result.planned.text if result.image else f"rejected ({result.reason}): {result.planned.text}"
            self.rows[sample.sample_id].append(Tile(_small(result.image), text))
            self.made, self.since = self.made + 1, self.since + 1
        if self.every and self.since >= self.every:
            self._write()

    def write_rest(self) -> None:
        """Write a last sheet if edits have come since the one before."""
        if self.since:
            self._write()

    def _write(self) -> None:
        lines: list[list[Tile]] = []
        for tiles in self.rows.values():
            if lines and len(lines[-1]) + len(tiles) <= SHEET_COLUMNS:
                lines[-1] = [*lines[-1], *tiles]
            else:
                lines.append(tiles)
        contact_sheet(lines, self.folder / f"{self.made:06d}{self.name}.jpg")
        self.since = 0


def _small(image: Image.Image | None) -> Image.Image | None:
    if image is not None and max(image.size) > SHEET_PX:
        image = image.copy()
        image.thumbnail((SHEET_PX, SHEET_PX))
    return image
