"""Writer of the resized copies; it may be killed at any moment.

Bytes are appended to a shard and flushed, then their rows to the index: bytes that no row names are cut off at the next
start. Images are written in the order of the dataset, so a run that was killed and started again leaves the same files, byte
for byte, as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from filelock import Timeout
from PIL import Image
from tqdm import tqdm

from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import Box, decode_picture, read_bytes
from flyp_saflex.images.resized_copies import (
    INDEX,
    SETTINGS,
    Settings,
    Stored,
    key_of,
    read_index,
    read_settings,
    shard_name,
    stamps,
)
from flyp_saflex.records import Sample
from flyp_saflex.storage.files import append_rows, hold, mend_tail, replace_lines, write_troubles

JPEG_QUALITY = 95
SHARD_BYTES = 64 * 2**20
CHUNK = 64
"""Images between two flushes to disk: what a kill costs at most."""


@dataclass
class Made:
    """Counts of what was done.

    Attributes:
        kept: copies that were there and whose source is unchanged.
        resized: images stored at a smaller size.
        copied: small images stored as they are.
        todo: with `dry_run`, images that would be read.
        unreadable: (path, reason).
        source_bytes: size of the files behind the new copies.
        stored_bytes: size of the new copies.
    """

    kept: int = 0
    resized: int = 0
    copied: int = 0
    todo: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    source_bytes: int = 0
    stored_bytes: int = 0


def materialise(
    samples: Sequence[Sample], folder: Path, *, dataset: str, shorter_side_px: int, box_crop: bool = False, dry_run: bool = False
) -> Made:
    """Write a resized copy of every image that has none, or whose file changed.

    Args:
        samples: images; unreadable ones are listed and left out.
        folder: where the copies go; it is made if missing.
        dataset: name of the dataset.
        shorter_side_px: of the copies; smaller images are stored as they are.
        box_crop: cut every image to its box first.
        dry_run: only look what is to be done.

    Raises:
        DataError: the folder holds copies of another size or dataset, is in use, or cannot be written.
    """
    settings = Settings(dataset, shorter_side_px, JPEG_QUALITY)
    found = read_settings(folder)
    if found not in (None, settings):
        changed = [name for name in settings.__struct_fields__ if getattr(found, name) != getattr(settings, name)]
        shown = ", ".join(f"{name}: {getattr(found, name)} -> {getattr(settings, name)}" for name in changed)
        raise DataError(f"data.materialised = {folder} was made otherwise ({shown}): undo the change or choose another folder")
    if dry_run:
        made, pending = _pending(samples, read_index(folder), box_crop=box_crop)
        made.todo = len(pending)
        return made
    with write_troubles(f"data.materialised = {folder}", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if found is None:
                replace_lines(folder / SETTINGS, [msgspec.json.encode(settings)])
            for left in folder.glob(f".{SETTINGS}.*.tmp"):
                left.unlink()
            mend_tail(folder / INDEX)
            rows = read_index(folder)
            end = max(((row.shard, row.offset + row.length) for row in rows), default=(0, 0))
            _cut(folder, *end)
            made, pending = _pending(samples, rows, box_crop=box_crop)
            _write_all(pending, folder, end, made, settings)
    return made


@dataclass(frozen=True)
class _Task:
    """An image to be copied; `old` is the row of the copy that its file had earlier."""

    sample: Sample
    name: str
    box: Box | None
    stamp: tuple[int, int] | None
    old: Stored | None


def _pending(samples: Sequence[Sample], rows: Sequence[Stored], *, box_crop: bool) -> tuple[Made, list[_Task]]:
    known = {row.key: row for row in rows}
    wanted = {key_of(sample, box_crop=box_crop): sample for sample in samples}
    made, tasks = Made(), []
    for (key, sample), stamp in zip(wanted.items(), stamps(sample.path for sample in wanted.values()), strict=True):
        old = known.get(key)
        if old is not None and old.stamp == stamp:
            made.kept += 1
        else:
            tasks.append(_Task(sample, *key, stamp, old))
    return made, tasks


def _write_all(tasks: Sequence[_Task], folder: Path, end: tuple[int, int], made: Made, settings: Settings) -> None:
    bar = tqdm(total=len(tasks), unit="image", desc="resizing images", disable=None)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow works without holding Python's lock
        for start in range(0, len(tasks), CHUNK):
            part = tasks[start : start + CHUNK]
            copies = list(pool.map(lambda task: _copy(task, settings), part))
            rows: list[Stored] = []
            files: dict[int, bytearray] = {}
            for task, copy in zip(part, copies, strict=True):
                if isinstance(copy, str):
                    made.unreadable.append((str(task.sample.path), copy))
                    continue
                row, data = copy
                if data is None:  # the file was touched, its content is the same
                    made.kept += 1
                else:
                    if end[1] and end[1] + len(data) > SHARD_BYTES:
                        end = end[0] + 1, 0
                    row = msgspec.structs.replace(row, shard=end[0], offset=end[1], length=len(data), crc32=zlib.crc32(data))
                    files.setdefault(end[0], bytearray()).extend(data)
                    end = end[0], end[1] + len(data)
                    made.resized += row.full_size is not None
                    made.copied += row.full_size is None
                    made.source_bytes += row.source_bytes
                    made.stored_bytes += len(data)
                rows.append(row)
            for number, appended in files.items():
                with open(folder / shard_name(number), "ab") as file:
                    file.write(appended)
                    file.flush()
                    os.fsync(file.fileno())
            append_rows(folder / INDEX, [msgspec.to_builtins(row) for row in rows])
            bar.update(len(part))


def _copy(task: _Task, settings: Settings) -> tuple[Stored, bytes | None] | str:
    """Return a row and the bytes to store (None: those that the row names already), or why there are none."""
    path, px = task.sample.path, settings.shorter_side_px
    try:
        data = read_bytes(path)
        sha256 = hashlib.sha256(data).hexdigest()
        stamp = task.stamp or (len(data), 0)
        if task.old is not None and task.old.sha256 == sha256:
            return msgspec.structs.replace(task.old, source_bytes=stamp[0], mtime_ns=stamp[1]), None
        row = Stored(task.name, task.box, *stamp, sha256, 0, 0, 0, 0, None)
        picture = decode_picture(io.BytesIO(data), path, box=task.box)
    except DataError as error:
        return str(error)
    shorter = min(picture.size)
    if shorter <= px and task.box is None:
        return row, data
    width, height = (round(side * min(1, px / shorter)) for side in picture.size)
    buffer = io.BytesIO()
    # Lanczos: the copy is resized once more, and keeps more of what that needs.
    picture.resized(width, height, resample=Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=settings.jpeg_quality, subsampling=0
    )
    return msgspec.structs.replace(row, full_size=picture.size), buffer.getvalue()


def _cut(folder: Path, shard: int, end: int) -> None:
    """Remove bytes that no row names."""
    for path in folder.glob("shard-*.bin"):
        if path.name > shard_name(shard):
            path.unlink()
    last = folder / shard_name(shard)
    size = last.stat().st_size if last.is_file() else 0
    if size < end:
        raise DataError(f"{last} has {size} bytes, its index expects {end}: remove the folder and materialise again")
    if size > end:
        os.truncate(last, end)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second writer."""
    try:
        lock = hold(folder / ".lock")
    except Timeout:
        raise DataError(f"data.materialised = {folder} is being written by another process: wait for it") from None
    try:
        yield
    finally:
        lock.release()
