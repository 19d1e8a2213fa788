"""Measured cost of the edits to make: one batch is timed, nothing is written."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path

from PIL import Image

from flyp_saflex.editing.edit_images import EditResult, edit_batches
from flyp_saflex.editing.editor import Editor
from flyp_saflex.editing.plan import PlannedEdit
from flyp_saflex.storage.augment_cache import FORMATS

PROBE_AGAIN_S = 30.0
"""Probes below this many seconds are repeated: the first batch includes the set-up of the device."""


def probe(
    editor: Editor, batch: list[PlannedEdit], num_edits: int, *, folder: Path, box_crop: bool, suffix: str, count: int
) -> str:
    """Time one batch and return a line about the cost of all edits.

    Args:
        editor: loaded.
        batch: edits that are made and thrown away.
        num_edits: edits to make.
        folder: the cache entry, whose disk is looked at.
        box_crop: crop sources to their boxes.
        suffix: of the files.
        count: number of processes.
    """
    seconds, results = _timed(editor, batch, box_crop)
    if seconds < PROBE_AGAIN_S:
        seconds, results = _timed(editor, batch, box_crop)
    sizes = [_bytes(result.image, suffix) for result in results if result.image]
    edit_bytes = sum(sizes) / len(sizes) if sizes else 0.0
    home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    hours = num_edits * seconds / len(batch) / 3600
    shared = f", {hours / count:.2f} h with {count} processes alike" if count > 1 else ""
    return (
        f"a batch of {len(batch)} took {seconds:.2f} s, {sum(result.image is None for result in results)} of them rejected; "
        f"{num_edits} edits: about {hours:.2f} h{shared}, {num_edits * edit_bytes / 1e9:.3f} GB "
        f"({shutil.disk_usage(home).free / 1e9:.1f} GB free); nothing was written"
    )


def _timed(editor: Editor, batch: list[PlannedEdit], box_crop: bool) -> tuple[float, list[EditResult]]:
    started = time.monotonic()
    results = next(edit_batches(editor, [batch], box_crop=box_crop))
    return time.monotonic() - started, results


def _bytes(image: Image.Image, suffix: str) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format=FORMATS[suffix])
    return buffer.tell()
