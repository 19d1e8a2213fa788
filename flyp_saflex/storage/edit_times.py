"""Wall seconds of edits: a log beside the manifest, which repeated runs do not reproduce.

    times.jsonl, or times-<i>-of-<n>.jsonl of one of several writers: {"aug_ids": [...], "seconds": 3.2, "device": "cpu"}

A row is a batch: reading its sources, editing, checking and writing. The manifest holds no time, so that a killed and resumed
entry has the bytes of an undisturbed one. Lost rows of a killed writer are lost times, not lost edits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from flyp_saflex.errors import DataError
from flyp_saflex.storage.augment_cache_files import refuse_links, troubles
from flyp_saflex.storage.files import append_rows, mend_tail, whole_lines

TIMES = "times"


class _Batch(msgspec.Struct):
    """Row of the log."""

    aug_ids: tuple[str, ...]
    seconds: float
    device: str = ""


class EditTimes:
    """Log of one writer; time runs from its creation, and from one batch to the next.

    Args:
        folder: of the cache entry.
        device: the edits are made on; a person reads it.
        index, count: number of the writer and number of writers.
    """

    def __init__(self, folder: Path, device: str, *, index: int = 0, count: int = 1) -> None:
        self.folder, self.device = folder, device
        self.path = folder / (f"{TIMES}.jsonl" if count == 1 else f"{TIMES}-{index}-of-{count}.jsonl")
        with troubles(folder):
            refuse_links(folder, self.path)
            mend_tail(self.path)
        self._last = time.monotonic()

    def add(self, aug_ids: Sequence[str]) -> None:
        """Log the seconds since the last batch for these edits, made or rejected; nothing for an empty batch."""
        now = time.monotonic()
        if aug_ids:
            row = _Batch(tuple(aug_ids), round(now - self._last, 3), self.device)
            with troubles(self.folder):
                append_rows(self.path, [msgspec.to_builtins(row)])
        self._last = now


def seconds_of_edits(folder: Path) -> dict[str, float]:
    """Return the wall seconds of every edit of an entry: its batch's, shared evenly; of one made twice, their sum.

    Edits without a row have no time: those of older entries, and those written just before a kill.

    Raises:
        DataError: a row that is no batch.
    """
    seconds: dict[str, float] = {}
    for path in sorted(folder.glob(f"{TIMES}*.jsonl")):
        for number, line in enumerate(whole_lines(path), 1):
            try:
                batch = msgspec.json.decode(line, type=_Batch)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise DataError(f"{path} line {number}: no row of times ({error}); remove the line") from None
            for aug_id in batch.aug_ids:
                seconds[aug_id] = seconds.get(aug_id, 0.0) + batch.seconds / len(batch.aug_ids)
    return seconds
