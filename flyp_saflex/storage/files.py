"""Safe files on disk: atomic writes, JSON lines that survive a kill, locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
from filelock import FileLock, Timeout

from flyp_saflex.errors import DataError, RunError

BLOCK_BYTES = 2**20
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # of network file systems mounted without locks


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` on a clean exit and is removed on an error.

    Raises:
        RunError: the folder is missing or read-only, or the disk is full; `path` is then as before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; free disk space or choose another --run-dir") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_mapping(path: Path) -> dict[str, Any]:
    """Return a JSON file's object that can be done without: empty where it is missing, damaged or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def hash_stream(stream: IO[bytes], digest: hashlib._Hash) -> str:
    """Feed the rest of a stream to a hash, block by block, and return its hexadecimal digest."""
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def mend_tail(path: Path) -> None:
    """Remove the incomplete last line that a killed writer left, so that the next row starts on a new line."""
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            os.fsync(file.fileno())


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append all rows or none, and flush them to disk.

    Raises:
        OSError: the disk is full or not writable; the file is then as before.
    """
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


def replace_lines(path: Path, lines: Sequence[bytes], *, keep_empty: bool = False) -> None:
    """Replace the content of a file atomically; without lines, remove the file unless it is the manifest."""
    data = b"".join(line + b"\n" for line in lines)
    if not lines and not keep_empty:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != data:
        with atomic_write(path, "wb") as file:
            file.write(data)


def whole_lines(path: Path) -> list[bytes]:
    """Return the complete lines of a file, none if it is missing.

    Text after the last newline is an interrupted write and is left out, and so are blank lines.
    """
    try:
        return [line for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]
    except FileNotFoundError:
        return []


@contextmanager
def write_troubles(what: str, another: str) -> Iterator[None]:
    """Turn what the file system refuses into one line.

    Args:
        what: what is written, with its folder.
        another: how to write it elsewhere.

    Raises:
        DataError: in place of an `OSError` or `RunError`.
    """
    try:
        yield
    except (OSError, RunError) as error:
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or cause
        raise DataError(
            f"{what} cannot be written: {reason}; free disk space or {another}: what is done stays, the same command goes on"
        ) from None


def hold(path: Path, *, wait: bool = False) -> FileLock:
    """Lock a file until `release()` or any end of the process.

    Args:
        path: the file; it is created if missing, and stays.
        wait: wait for another holder.

    Returns:
        The lock. Its `is_locked` is False on a file system without locks, where nothing protects from a second process.

    Raises:
        Timeout: another process, or another lock of this one, holds it, and `wait` is False.
        OSError: the file cannot be opened for writing.
    """
    # No fallback: filelock's own would be a file that a killed process leaves behind.
    lock = FileLock(path, blocking=wait, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return lock


@contextmanager
def entry_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of an entry, waiting for it; yield whether the file system supports locks."""
    lock = hold(folder / ".lock", wait=True)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def held_by_other(path: Path) -> bool | None:
    """Return whether another running process holds the lock; None if that cannot be determined."""
    try:
        lock = hold(path)
    except (Timeout, PermissionError):  # another user's file is taken for a held one
        return True
    except OSError:
        return None
    known = lock.is_locked
    lock.release()
    return False if known else None
