"""The writing side of a cache entry, for any number of processes that may be killed at any moment (floor 1; no torch).

    settings.json          what the edits are made with; other settings are refused
    rejected.jsonl         edits that were made and not kept, and sources that cannot be read (those without an aug_id)
    .writers/<i>-of-<n>/   of writer i while it works: its lock, images under way, and with several writers their rows

A single writer appends to the manifest itself. With several, each has rows of its own, merged into the manifest when it ends
or, after a kill, when any writer starts next. Whoever finds everything planned done writes the manifest anew in the plan's
order: the finished entry has the same bytes whatever the number of writers, the kills and the order of the work.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec

from flyp_saflex.cache import FORMATS, MANIFEST, ROWS, WRITERS, AugmentCache, SavableImage
from flyp_saflex.errors import DataError, RunError
from flyp_saflex.rundir import atomic_write, write_json

if sys.platform != "win32":
    import fcntl

SETTINGS, REJECTED, DONE = "settings.json", "rejected.jsonl", "DONE"
JPEG_QUALITY = 95


class _Id(msgspec.Struct):
    """What has to be known of a row to merge it."""

    aug_id: str | None = None
    source_id: str = ""


class CacheWriter:
    """Writes one entry, alone or as one of several writers. A context manager.

    Args:
        folder: the entry; it is made if missing.
        dataset: name of the dataset that the edits are made from.
        index, count: this is writer `index` of `count`.

    Attributes:
        made: aug_ids of the edits that the entry has.
        rejected: aug_ids of the edits that were made and not kept.

    Raises:
        DataError: the entry cannot be written, is broken, or is being written by another process.
    """

    def __init__(self, folder: Path, dataset: str, *, index: int = 0, count: int = 1) -> None:
        self.folder, self.dataset, self.index, self.count = folder, dataset, index, count
        self.made: set[str] = set()
        self.rejected: set[str] = set()
        self._home = folder / WRITERS / f"{index}-of-{count}"
        self._alone = count == 1
        self._lock: IO[str] | None = None

    def __enter__(self) -> CacheWriter:
        with _troubles(self.folder):
            self._home.parent.mkdir(parents=True, exist_ok=True)
            with _entry_lock(self.folder) as locked:
                dead = self._dead_writers()
                if locked:
                    self._tidy(alone=len(dead) == len(list(self._home.parent.iterdir())))
                self._merge(dead)
                for home in dead:
                    shutil.rmtree(home)
                self._home.mkdir()
                self._lock = _hold(self._home / "lock")
                (self.folder / MANIFEST).touch()
        try:
            self.made = {edit.aug_id for edit in AugmentCache.at(self.folder, self.dataset).checked()}
            self.rejected = set(read_rejected(self.folder)[0])
        except DataError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Merge this writer's rows, unless the disk refuses: then the next start does."""
        try:
            with _troubles(self.folder), _entry_lock(self.folder):
                self._merge([self._home])
                shutil.rmtree(self._home, ignore_errors=True)
                if not any(self._home.parent.iterdir()):
                    self._home.parent.rmdir()
        except DataError:
            if error is None:
                raise
        finally:
            if self._lock is not None:
                self._lock.close()

    def write(self, edits: Sequence[tuple[SavableImage, Mapping[str, Any]]], rejected: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write images, then their rows; a kill in between leaves images without rows, which do not exist for the cache.

        Args:
            edits: images and manifest rows with `file_name` (of `AugmentCache.file_name`), `source_id` and `label`; `sha256`
                of the file is added.
            rejected: rows with `aug_id` (None: the source cannot be read), `source_id` and `reason`.

        Raises:
            DataError: the disk is full or refuses; the entry is then as it was before.
        """
        with _troubles(self.folder):
            if edits:
                (self.folder / DONE).unlink(missing_ok=True)
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a PNG of 512 px takes a tenth of a second
                files = list(pool.map(lambda edit: _encoded(*edit), edits))
            rows = []
            for data, (_, row) in zip(files, edits, strict=True):
                self._write_file(data, self.folder / str(row["file_name"]))
                rows.append(self._full_row(row) | {"sha256": hashlib.sha256(data).hexdigest()})
            place = self.folder if self._alone else self._home
            _append(place / (MANIFEST if self._alone else ROWS), rows)
            _append(place / REJECTED, rejected)
            first = not self.made
            self.made |= {row["aug_id"] for row in rows}
            self.rejected |= {str(row["aug_id"]) for row in rejected if row["aug_id"]}
            if first and rows and not self._alone:
                # Hugging Face's imagefolder takes the columns from the manifest and stumbles over an empty one.
                with _entry_lock(self.folder):
                    self._merge([self._home])

    def finish(self, plan: Sequence[tuple[str, str]], max_unreadable: int) -> bool:
        """Finish the entry if all of the plan is done, by whomever, and return whether it is.

        Args:
            plan: (aug_id, source_id) of every planned edit, in the order that the manifest gets.
            max_unreadable: as many sources may be unreadable.

        Raises:
            DataError: more sources are unreadable, or the disk refuses.
        """
        with _troubles(self.folder), _entry_lock(self.folder):
            homes = [home for home in self._home.parent.iterdir() if home.is_dir()]
            rows = _rows_by_id([self.folder / MANIFEST, *(home / ROWS for home in homes)])
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
            _replace(self.folder / MANIFEST, [rows[aug_id] for aug_id in order])
            _replace(self.folder / REJECTED, [msgspec.json.encode(row) for row in refused])
            _replace(self.folder / DONE, [f"{len(order)} edits".encode()])
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
        """Return the homes that a kill left, this writer's own among them.

        Raises:
            DataError: another process has this writer's part, or writes the entry in another number of parts.
        """
        dead = []
        for home in sorted(path for path in self._home.parent.iterdir() if path.is_dir()):
            held = _held(home / "lock")
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
        """Remove temporary files that a kill left; those of the entry's own files are only ever written with its lock."""
        left = [path for name in (MANIFEST, REJECTED, DONE, SETTINGS) for path in self.folder.glob(f".{name}.*.tmp")]
        for path in (*left, *(self.folder.glob("sheets/.[0-9]*.tmp") if alone else ())):
            path.unlink(missing_ok=True)

    def _merge(self, homes: Sequence[Path]) -> None:
        """Add the rows of these writers to the manifest and their rejections to rejected.jsonl; to be called with the lock."""
        _mend_tail(self.folder / MANIFEST)
        _mend_tail(self.folder / REJECTED)
        files = [home / ROWS for home in homes if (home / ROWS).is_file()]
        if files:
            manifest = _rows_by_id([self.folder / MANIFEST])
            merged = manifest | {key: row for key, row in _rows_by_id(files).items() if key not in manifest}
            if len(merged) > len(manifest):
                _replace(self.folder / MANIFEST, list(merged.values()))
        refused = [line for home in homes if (home / REJECTED).is_file() for line in _lines(home / REJECTED)]
        known = set(_lines(self.folder / REJECTED)) if refused else set()
        new = [line for line in dict.fromkeys(refused) if line not in known]
        if new:
            _replace(self.folder / REJECTED, [*_lines(self.folder / REJECTED), *new])


def state_settings(folder: Path, settings: Mapping[str, Any], *, write: bool) -> None:
    """Check an entry's settings.json against `settings`, and write it where there is none.

    Args:
        folder: the entry.
        settings: what decides how its edits look; options that are not in both are not compared.
        write: whether to write; otherwise only check.

    Raises:
        DataError: the entry was made with other settings, or the file cannot be read or written.
    """
    path = folder / SETTINGS
    if path.is_file():
        try:
            found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}); remove the entry or choose another cache.key") from None
        wanted = msgspec.json.decode(msgspec.json.encode(settings))
        changed = [name for name in wanted if name in found and found[name] != wanted[name]]
        if changed:
            shown = ", ".join(f"{name}: {_short(found[name])} -> {_short(wanted[name])}" for name in changed[:3])
            raise DataError(
                f"augment cache {folder} was made with other settings ({shown}{' ...' if len(changed) > 3 else ''}): undo the "
                "change, or choose another cache.key (empty: a name made from the settings)"
            )
        if set(wanted) <= set(found):
            return
    elif (folder / MANIFEST).is_file() and (folder / MANIFEST).stat().st_size:
        raise DataError(f"augment cache {folder} holds edits made otherwise (it has no {SETTINGS}): choose another cache.key")
    if write:
        with _troubles(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with _entry_lock(folder):
                write_json(path, dict(settings))


def read_rejected(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the rejected edits by aug_id and the unreadable sources by source_id, of all writers.

    Raises:
        DataError: a row that is no rejection.
    """
    edits, sources = {}, {}
    for path in (folder / REJECTED, *sorted(folder.glob(f"{WRITERS}/*/{REJECTED}"))):
        for number, line in enumerate(_lines(path), 1):
            try:
                row = msgspec.json.decode(line, type=dict[str, Any])
                source, aug_id = str(row["source_id"]), row["aug_id"]
            except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as error:
                raise DataError(f"{path} line {number}: no row with aug_id and source_id ({error}); remove the line") from None
            if aug_id:
                edits[str(aug_id)] = row
            else:
                sources[source] = row
    return edits, sources


def _encoded(image: SavableImage, row: Mapping[str, Any]) -> bytes:
    buffer, suffix = io.BytesIO(), Path(str(row["file_name"])).suffix
    options = {"quality": JPEG_QUALITY} if FORMATS[suffix] == "JPEG" else {}
    image.save(buffer, format=FORMATS[suffix], **options)
    return buffer.getvalue()


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows, all or none, and flush them to disk."""
    if not rows:
        return
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        data = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
        try:
            written = file.write(data)
            if written != len(data):  # a disk that fills up takes what fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def _replace(path: Path, lines: Sequence[bytes]) -> None:
    """Replace a file at once; without lines it is removed, but for the manifest."""
    data = b"".join(line + b"\n" for line in lines)
    if not lines and path.name != MANIFEST:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != data:
        with atomic_write(path, "wb") as file:
            file.write(data)


def _lines(path: Path) -> list[bytes]:
    """Return the whole lines of a file, none if it is not there; what follows the last newline was cut off by a kill."""
    try:
        return [line for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]
    except FileNotFoundError:
        return []


def _rows_by_id(files: Sequence[Path]) -> dict[str, bytes]:
    """Return rows as they are written, by aug_id; the first one counts."""
    decoder = msgspec.json.Decoder(_Id)
    rows: dict[str, bytes] = {}
    for path in files:
        for number, line in enumerate(_lines(path), 1):
            try:
                aug_id = decoder.decode(line).aug_id
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path} line {number}: no valid JSON row ({error}); mend or remove the line") from None
            if aug_id is None:
                raise DataError(f"{path} line {number}: there is no aug_id; mend or remove the line")
            rows.setdefault(aug_id, line)
    return rows


def _mend_tail(path: Path) -> None:
    """Cut off what a killed writer left after the last newline."""
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            os.fsync(file.fileno())


@contextmanager
def _entry_lock(folder: Path) -> Iterator[bool]:
    """Wait for the entry's lock, which writers hold for moments only; yield whether the file system has locks."""
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        locked = False
        if sys.platform != "win32":
            with suppress(OSError):  # without locks nothing is protected from a second process
                fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
        yield locked


def _hold(path: Path) -> IO[str]:
    """Open and lock a file until it is closed or the process ends, however it ends."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held until __exit__
    if sys.platform != "win32":
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _held(path: Path) -> bool | None:
    """Return whether a living process holds the lock; None where that cannot be known."""
    if sys.platform == "win32":
        return None
    try:
        with open(path, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return True if error.errno in (errno.EAGAIN, errno.EACCES) else None


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def _troubles(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line."""
    try:
        yield
    except (OSError, RunError) as error:
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or cause
        raise DataError(
            f"augment cache {folder} cannot be written: {reason}; free disk space or change cache.root: what is done stays, the "
            "same command goes on"
        ) from None
