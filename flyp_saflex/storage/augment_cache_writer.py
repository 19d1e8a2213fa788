"""Writer of a cache entry, for one or several processes that may be killed at any time.

    settings.json          settings of the edits; an entry refuses other settings
    rejected.jsonl         rejected edits, and unreadable source images (rows without an aug_id)
    .writers/<i>-of-<n>/   files of writer i while it runs: its lock, unfinished images and, with several writers, its rows

A single writer appends to the manifest directly. Several writers append to files of their own, which are merged into the
manifest when the writer ends or, after a kill, when the next writer starts. The writer that finishes the plan rewrites the
manifest in the order of the plan, so the finished entry has the same bytes for any number of writers, kills and any order.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from filelock import FileLock

from flyp_saflex.errors import DataError
from flyp_saflex.storage.augment_cache import DONE, FORMATS, SHEETS, AugmentCache, SavableImage
from flyp_saflex.storage.augment_cache_files import REJECTED, SETTINGS, read_rejected, refuse_links, rows_by_id, troubles
from flyp_saflex.storage.files import append_rows, entry_lock, held_by_other, hold, mend_tail, replace_lines, whole_lines
from flyp_saflex.storage.manifest import MANIFEST, ROWS, WRITERS
from flyp_saflex.storage.manifest_index import INDEX

JPEG_QUALITY = 95


class CacheWriter:
    """Writer of one cache entry, alone or as one of several; a context manager.

    Args:
        folder: folder of the entry; it is created if missing.
        dataset: name of the dataset of the source images.
        index: number of this writer, 0 .. count - 1.
        count: number of writers.

    Attributes:
        made: aug_ids of the edits in the entry.
        rejected: aug_ids of the rejected edits.

    Raises:
        DataError: the entry cannot be written, is broken, or is being written by another process.
    """

    def __init__(self, folder: Path, dataset: str, *, index: int = 0, count: int = 1) -> None:
        self.folder, self.dataset, self.index, self.count = folder, dataset, index, count
        self.made: set[str] = set()
        self.rejected: set[str] = set()
        self._home = folder / WRITERS / f"{index}-of-{count}"
        self._alone = count == 1
        self._lock: FileLock | None = None

    def __enter__(self) -> CacheWriter:
        with troubles(self.folder):
            refuse_links(self.folder)
            self._home.parent.mkdir(parents=True, exist_ok=True)
            with entry_lock(self.folder) as locked:
                dead = self._dead_writers()
                if locked:
                    self._tidy(alone=len(dead) == len(list(self._home.parent.iterdir())))
                self._merge(dead)
                for home in dead:
                    shutil.rmtree(home)
                self._home.mkdir()
                self._lock = hold(self._home / "lock")
                (self.folder / MANIFEST).touch()
        try:
            self.made = set(AugmentCache.at(self.folder, self.dataset).aug_ids)
            self.rejected = set(read_rejected(self.folder)[0])
        except DataError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Merge the rows of this writer; if that fails, the next writer that starts merges them."""
        try:
            with troubles(self.folder), entry_lock(self.folder):
                self._merge([self._home])
                shutil.rmtree(self._home, ignore_errors=True)
                if not any(self._home.parent.iterdir()):
                    self._home.parent.rmdir()
        except DataError:
            if error is None:
                raise
        finally:
            if self._lock is not None:
                self._lock.release()

    def write(self, edits: Sequence[tuple[SavableImage, Mapping[str, Any]]], rejected: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write images, then their rows; after a kill in between, the images without rows are ignored.

        Args:
            edits: images and manifest rows with `file_name` (see `AugmentCache.file_name`), `source_id` and `label`; the
                `sha256` of the file is added.
            rejected: rows with `aug_id` (None: the source is unreadable), `source_id` and `reason`.

        Raises:
            DataError: the disk is full or not writable; the entry is then as before.
        """
        with troubles(self.folder):
            if edits:
                (self.folder / DONE).unlink(missing_ok=True)
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a PNG of 512 px takes a tenth of a second
                files = list(pool.map(lambda edit: _encoded(*edit), edits))
            rows = []
            for data, (_, row) in zip(files, edits, strict=True):
                path = self.folder / str(row["file_name"])
                refuse_links(self.folder, path)
                self._write_file(data, path)
                rows.append(self._full_row(row) | {"sha256": hashlib.sha256(data).hexdigest()})
            place = self.folder if self._alone else self._home
            append_rows(place / (MANIFEST if self._alone else ROWS), rows)
            append_rows(place / REJECTED, rejected)
            first = not self.made
            self.made |= {row["aug_id"] for row in rows}
            self.rejected |= {str(row["aug_id"]) for row in rejected if row["aug_id"]}
            if first and rows and not self._alone:
                # Hugging Face's imagefolder reads its columns from the manifest and fails on an empty one.
                with entry_lock(self.folder):
                    self._merge([self._home])

    def finish(self, plan: Sequence[tuple[str, str]], max_unreadable: int) -> bool:
        """Finish the entry if every planned edit is done, by any writer.

        Args:
            plan: (aug_id, source_id) of every planned edit, in the order of the final manifest.
            max_unreadable: largest number of unreadable source images.

        Returns:
            Whether the entry is finished.

        Raises:
            DataError: more sources are unreadable, or the disk is not writable.
        """
        with troubles(self.folder), entry_lock(self.folder):
            homes = [home for home in self._home.parent.iterdir() if home.is_dir()]
            rows = rows_by_id([self.folder / MANIFEST, *(home / ROWS for home in homes)])
            rejected, unreadable = read_rejected(self.folder)
            open_sources = {source for aug_id, source in plan if aug_id not in rows and aug_id not in rejected}
            if open_sources - unreadable.keys():
                return False
            if len(open_sources) > max_unreadable:
                raise DataError(
                    f"{len(open_sources)} sources cannot be read, more than data.max_unreadable allows; {self.folder / REJECTED} "
                    "lists them: replace them, or raise data.max_unreadable"
                )
            refused = [
                *(rejected[aug_id] for aug_id, _ in plan if aug_id in rejected and aug_id not in rows),
                *(unreadable[source] for source in dict.fromkeys(source for _, source in plan) if source in open_sources),
            ]
            planned = {aug_id for aug_id, _ in plan}
            order = [aug_id for aug_id, _ in plan if aug_id in rows] + [aug_id for aug_id in rows if aug_id not in planned]
            replace_lines(self.folder / MANIFEST, [rows[aug_id] for aug_id in order], keep_empty=True)
            replace_lines(self.folder / REJECTED, [msgspec.json.encode(row) for row in refused])
            replace_lines(self.folder / DONE, [f"{len(order)} edits".encode()])
        return True

    def _full_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        first = {"file_name": row["file_name"], "aug_id": row.get("aug_id", row["file_name"]), "dataset": self.dataset}
        return first | dict(row)

    def _write_file(self, data: bytes, path: Path) -> None:
        temporary = self._home / path.name
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)

    def _dead_writers(self) -> list[Path]:
        """Return the folders of killed writers, including a former one with this index.

        Raises:
            DataError: another process is this writer, or writes the entry with another number of writers.
        """
        dead = []
        for home in sorted(path for path in self._home.parent.iterdir() if path.is_dir()):
            held = held_by_other(home / "lock")
            if held and (home == self._home or not home.name.endswith(f"-of-{self.count}")):
                index, _, count = home.name.partition("-of-")
                raise DataError(
                    f"augment cache {self.folder} is being written by another process (part {index} of {count}): wait for it or "
                    "stop it; to share the work, start every process with its own --shard i/n of the same n"
                )
            if held is False or home == self._home:
                dead.append(home)
        return dead

    def _tidy(self, *, alone: bool) -> None:
        """Remove temporary files of killed writers; the caller holds the lock under which these files are written."""
        left = [path for name in (MANIFEST, INDEX, REJECTED, DONE, SETTINGS) for path in self.folder.glob(f".{name}.*.tmp")]
        for path in (*left, *(self.folder.glob(f"{SHEETS}/.[0-9]*.tmp") if alone else ())):
            path.unlink(missing_ok=True)

    def _merge(self, homes: Sequence[Path]) -> None:
        """Merge rows and rejections of writers into manifest and rejected.jsonl; the caller holds the lock."""
        mend_tail(self.folder / MANIFEST)
        mend_tail(self.folder / REJECTED)
        files = [home / ROWS for home in homes if (home / ROWS).is_file()]
        if files:
            manifest = rows_by_id([self.folder / MANIFEST])
            merged = manifest | {key: row for key, row in rows_by_id(files).items() if key not in manifest}
            if len(merged) > len(manifest):
                replace_lines(self.folder / MANIFEST, list(merged.values()), keep_empty=True)
        refused = [line for home in homes if (home / REJECTED).is_file() for line in whole_lines(home / REJECTED)]
        known = set(whole_lines(self.folder / REJECTED)) if refused else set()
        new = [line for line in dict.fromkeys(refused) if line not in known]
        if new:
            replace_lines(self.folder / REJECTED, [*whole_lines(self.folder / REJECTED), *new])


def _encoded(image: SavableImage, row: Mapping[str, Any]) -> bytes:
    buffer, suffix = io.BytesIO(), Path(str(row["file_name"])).suffix
    options = {"quality": JPEG_QUALITY} if FORMATS[suffix] == "JPEG" else {}
    image.save(buffer, format=FORMATS[suffix], **options)
    return buffer.getvalue()
