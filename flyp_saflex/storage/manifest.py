"""Manifest of a cache entry: its rows as checked edits.

Rows of writers that are still at work lie in files of their own (`.writers/*/`), and count like those of the manifest.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Edit
from flyp_saflex.user_text import quoted

MANIFEST, WRITERS, ROWS = "metadata.jsonl", ".writers", "rows.jsonl"


class ManifestReader:
    """Reader of the rows of an entry.

    Args:
        folder: the entry.
        class_names: names that labels may be given by instead of indices.

    Attributes:
        notes: rows that were left out.
    """

    def __init__(self, folder: Path, class_names: Sequence[str] = ()) -> None:
        self.folder, self.class_names = folder, class_names
        self.notes: list[str] = []

    def checked(self) -> Iterator[Edit]:
        """Yield the edits one by one, for entries too large for memory.

        Raises:
            DataError: see `edits`.
        """
        seen: dict[str, tuple[Path, int, int]] = {}
        listings: dict[str, frozenset[str]] = {}
        # The manifest is read last: a writer that ends meanwhile merges its rows into it.
        parts = [(path, self.rows(path)) for path in sorted(self.folder.glob(f"{WRITERS}/*/{ROWS}"))]
        for path, rows in ((self.folder / MANIFEST, self.rows(self.folder / MANIFEST)), *parts):
            for number, row in rows:
                edit = self.edit(row, f"{path} line {number}")
                known, digest = seen.get(edit.aug_id), hash(msgspec.json.encode(row)) if parts else 0
                if known is not None:
                    if known[0] != path and known[2] == digest:
                        continue  # a row of a writer that has just been merged into the manifest
                    where = "" if known[0] == path else f" of {known[0]}"
                    raise DataError(
                        f"{path} line {number}: '{quoted(edit.aug_id)}' is already on line {known[1]}{where}; remove one"
                    )
                seen[edit.aug_id] = (path, number, digest)
                folder, name = os.path.split(edit.path)
                if folder not in listings:
                    listings[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
                if name not in listings[folder]:
                    raise DataError(
                        f"{path} line {number}: the image {quoted(str(edit.path))} is missing; copy it back or remove the line"
                    )
                yield edit

    def edit(self, row: Mapping[str, Any], where: str) -> Edit:
        """Return a row as an edit.

        Raises:
            DataError: a field is missing or wrong.
        """
        values = {**row, "aug_id": row.get("aug_id", row.get("file_name"))}
        if self.class_names and isinstance(values.get("label"), str):
            values["label"] = self._class_index(values["label"], where)
        for name, kind in (("file_name", str), ("aug_id", str), ("source_id", str), ("label", int)):
            value = values.get(name)
            if not isinstance(value, kind) or isinstance(value, bool) or value == "":
                expected = "a class index" if kind is int else "text"
                raise DataError(f"{where}: '{name}' is {quoted(repr(value))}, expected {expected}; correct the row")
        relative = PurePosixPath(values["file_name"])
        if relative.is_absolute() or ".." in relative.parts or "\\" in values["file_name"]:
            raise DataError(
                f"{where}: file_name '{quoted(values['file_name'])}' points outside of the cache entry; correct the row"
            )
        known = ("file_name", "aug_id", "source_id", "label", "instruction")
        return Edit(
            aug_id=values["aug_id"],
            path=self.folder / relative,
            source_id=values["source_id"],
            label=values["label"],
            instruction=str(values.get("instruction") or ""),
            provenance={name: value for name, value in values.items() if name not in known},
        )

    def _class_index(self, name: str, where: str) -> int:
        found = [label for label, known in enumerate(self.class_names) if known.casefold() == name.casefold()]
        if len(found) != 1:
            problem = "stands for several classes" if found else f"is no class{nearest(name, self.class_names)}"
            raise DataError(
                f"{where}: label '{quoted(name)}' {problem} (class names: {len(self.class_names)}); write the class index"
            )
        return found[0]

    def rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read a file at once; yield (line number, row).

        A last line that a kill cut off is skipped with a note.
        """
        try:
            lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        except FileNotFoundError:  # rows of a writer that were merged in the meantime
            lines = []
        return self._decoded(path, lines)

    def _decoded(self, path: Path, lines: list[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                if number == len(lines):  # no newline after it: the writer was killed
                    self.notes.append(f"{path} line {number} was cut off and is left out")
                    return
                raise DataError(f"{path} line {number}: no valid JSON row ({error}); mend or remove the line") from None
