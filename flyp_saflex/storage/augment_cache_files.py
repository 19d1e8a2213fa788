"""File operations for writing a cache entry: locks, settings, rejections, appending and replacing lines.

`augment_cache_writer.py` documents the layout of the files and uses these functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from flyp_saflex.errors import DataError
from flyp_saflex.storage.files import entry_lock, whole_lines, write_json, write_troubles
from flyp_saflex.storage.manifest import MANIFEST, WRITERS

SETTINGS, REJECTED = "settings.json", "rejected.jsonl"


def refuse_links(folder: Path, *paths: Path) -> None:
    """Check that writing an entry changes no file outside of it.

    Args:
        folder: the entry; it may itself be a link, set by the user.
        paths: files to be written; without any, what lies in the entry and in the folders of its writers is checked.

    Raises:
        DataError: one of them, or a folder on the way to it, is a symbolic link.
    """
    if not paths:
        paths = (*folder.glob("*"), *folder.glob(f"{WRITERS}/*"), *folder.glob(f"{WRITERS}/*/*"))
    for path in paths:
        for part in (path, *path.parents):
            if part == folder:
                break
            if part.is_symlink():
                raise DataError(
                    f"augment cache {folder}: {part.relative_to(folder)} is a symbolic link, so files elsewhere would be "
                    "changed; expected files and folders: put what it points to in its place, or choose another cache.key"
                )


class _Id(msgspec.Struct):
    """Fields of a row that merging needs."""

    aug_id: str | None = None
    source_id: str = ""


def state_settings(folder: Path, settings: Mapping[str, Any], *, write: bool) -> None:
    """Check settings.json of an entry against `settings`, and write it if it is missing.

    Args:
        folder: folder of the entry.
        settings: options that determine the edits; options missing on either side are not compared.
        write: whether to write a missing or incomplete file; otherwise only check.

    Raises:
        DataError: the entry was made with other settings, or the file cannot be read or written.
    """
    path = folder / SETTINGS
    refuse_links(folder)
    if path.is_file():
        try:
            found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
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
        with troubles(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with entry_lock(folder):
                write_json(path, dict(settings))


def read_rejected(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the rejected edits by aug_id and the unreadable sources by source_id, of all writers.

    Raises:
        DataError: a row without aug_id or source_id.
    """
    edits, sources = {}, {}
    for path in (folder / REJECTED, *sorted(folder.glob(f"{WRITERS}/*/{REJECTED}"))):
        for number, line in enumerate(whole_lines(path), 1):
            try:
                row = msgspec.json.decode(line, type=dict[str, Any])
                source, aug_id = str(row["source_id"]), row["aug_id"]
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError) as error:
                raise DataError(f"{path} line {number}: no row with aug_id and source_id ({error}); remove the line") from None
            if aug_id:
                edits[str(aug_id)] = row
            else:
                sources[source] = row
    return edits, sources


def rows_by_id(files: Sequence[Path]) -> dict[str, bytes]:
    """Return the undecoded rows of several files by aug_id; the first row of an edit counts.

    Raises:
        DataError: an invalid row, or one without aug_id.
    """
    decoder = msgspec.json.Decoder(_Id)
    rows: dict[str, bytes] = {}
    for path in files:
        for number, line in enumerate(whole_lines(path), 1):
            try:
                aug_id = decoder.decode(line).aug_id
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise DataError(f"{path} line {number}: no valid JSON row ({error}); mend or remove the line") from None
            if aug_id is None:
                raise DataError(f"{path} line {number}: there is no aug_id; mend or remove the line")
            rows.setdefault(aug_id, line)
    return rows


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def troubles(folder: Path) -> Iterator[None]:
    """Convert errors of the file system into a one-line `DataError`."""
    with write_troubles(f"augment cache {folder}", "change cache.root"):
        yield
