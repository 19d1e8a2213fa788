"""Index of a large manifest: its columns that are checked at every start, beside it in an Arrow file.

The manifest stays what people read and writers append to. The index is made from it once and used only where it fits: its own
bytes have the digest at its end, and the manifest has the size and the digest that the index was made from. An index that does
not fit is thrown away and made anew. Nobody needs it: without it the same columns are read from the manifest.

    .index.arrow    an Arrow stream with the columns of `ManifestColumns`, then its sha256 (32 bytes)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from flyp_saflex.errors import RunError
from flyp_saflex.storage.files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = ".index.arrow"
SMALLEST_BYTES = 8 * 2**20
"""Manifests up to this size are read in less time than an index is worth."""
BLOCK_BYTES = 16 * 2**20
VERSION = "1"
ODD_NAME = r"(^|/)\.{0,2}(/|$)|\\"
"""Parts of a file name that a path leaves out or that lead out of the entry: such a manifest is read row by row."""


class _Row(msgspec.Struct):
    """Fields of a row that are checked at every start."""

    file_name: str
    source_id: str
    label: int
    aug_id: str | msgspec.UnsetType = msgspec.UNSET
    dataset: str = ""


@dataclass(frozen=True)
class ManifestColumns:
    """Columns of a manifest, a row per edit.

    Attributes:
        table: `start` and `length` (place of the row's line in the manifest, bytes), `file_name`, `aug_id`, `source_id`, `label`.
        dataset: name of the dataset that the rows state first; empty: none does.
        manifest: what the places belong to, whatever is at its path later: its content, or the descriptor of the open file.
    """

    table: pa.Table
    dataset: str
    manifest: bytes | int

    def __del__(self) -> None:
        if isinstance(self.manifest, int):
            os.close(self.manifest)

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column by name."""
        return self.table[name]

    def line(self, place: int) -> bytes:
        """Return a row as it is written."""
        start, length = self.table["start"][place].as_py(), self.table["length"][place].as_py()
        return os.pread(self.manifest, length, start) if isinstance(self.manifest, int) else self.manifest[start : start + length]


def read_columns(manifest: Path) -> ManifestColumns | None:
    """Return the columns of a manifest, from its index if that fits.

    Returns:
        The columns; None where a row needs a closer look: it is damaged, unusual or cut off, or there is no manifest.
    """
    try:
        descriptor = os.open(manifest, os.O_RDONLY)
    except OSError:
        return None
    columns = None
    try:
        columns = _columns(manifest, descriptor)
    finally:
        if columns is None or columns.manifest is not descriptor:
            os.close(descriptor)
    return columns


def _columns(manifest: Path, descriptor: int) -> ManifestColumns | None:
    size, index = os.fstat(descriptor).st_size, manifest.with_name(INDEX)
    is_large = size > SMALLEST_BYTES
    key = _digest(descriptor, size) if is_large else ""
    table = _read(index, key) if is_large else None
    if table is None:
        try:
            table = _parse(descriptor, size)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError):
            return None
        if table is not None and is_large:
            table = _write(index, table, key)
    if table is None:
        return None
    content = descriptor if is_large else os.pread(descriptor, size, 0)
    return ManifestColumns(table, (table.schema.metadata or {}).get(b"dataset", b"").decode(), content)


def _blocks(descriptor: int, size: int) -> Iterator[bytes]:
    """Yield the first `size` bytes of a file."""
    for start in range(0, size, BLOCK_BYTES):
        yield os.pread(descriptor, min(BLOCK_BYTES, size - start), start)


def _digest(descriptor: int, size: int) -> str:
    digest = hashlib.sha256()
    for block in _blocks(descriptor, size):
        digest.update(block)
    return f"{VERSION} {size} {digest.hexdigest()}"


def _parse(descriptor: int, size: int) -> pa.Table | None:
    """Read the columns from the manifest itself; None if a row is unusual or the last line is not whole."""
    import pyarrow as pa
    import pyarrow.compute as pc

    decoder, batches, rest, place, dataset = msgspec.json.Decoder(_Row), [], b"", 0, ""
    for block in _blocks(descriptor, size):
        *lines, rest = (rest + block).split(b"\n")
        columns: dict[str, list[Any]] = {name: [] for name in ("start", "length", "file_name", "aug_id", "source_id", "label")}
        for line in lines:
            if line and not line.isspace():
                line.decode()
                row = decoder.decode(line)
                aug_id = row.file_name if row.aug_id is msgspec.UNSET else row.aug_id
                if not (row.file_name and aug_id and row.source_id):
                    return None
                for column, value in zip(
                    columns.values(), (place, len(line), row.file_name, aug_id, row.source_id, row.label), strict=True
                ):
                    column.append(value)
                dataset = dataset or row.dataset
            place += len(line) + 1
        types = (pa.int64(), pa.int32(), pa.string(), pa.string(), pa.string(), pa.int64())
        arrays = [pa.array(values, kind) for values, kind in zip(columns.values(), types, strict=True)]
        batches.append(pa.record_batch(arrays, names=list(columns)))
    if rest or not batches:
        return None
    table = pa.Table.from_batches(batches).replace_schema_metadata({"dataset": dataset})
    if pc.any(pc.match_substring_regex(table["file_name"], ODD_NAME)).as_py():
        return None
    return table if pc.count_distinct(table["aug_id"]).as_py() == table.num_rows else None


def _read(index: Path, key: str) -> pa.Table | None:
    """Return the index if it is whole and belongs to the manifest; throw it away if not."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(index)) as file:
            data = file.read_buffer()
        digest = hashlib.sha256(memoryview(data)[:-32]).digest()
        if len(data) > 32 and digest == bytes(memoryview(data)[-32:]):
            table = pa.ipc.open_stream(data.slice(0, len(data) - 32)).read_all()
            if (table.schema.metadata or {}).get(b"key") == key.encode():
                return table
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException):
        pass
    with suppress(OSError):  # of a folder that may only be read
        index.unlink(missing_ok=True)
    return None


class _HashedFile:
    """A file that is written and hashed at the same time; closing it leaves the file open.

    Args:
        file: open for writing bytes.
    """

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self._hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write bytes."""
        self._hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Leave the flushing to the file's owner."""

    def close(self) -> None:
        """Leave the closing to the file's owner."""

    def digest(self) -> bytes:
        """Return the sha256 of what was written, 32 bytes."""
        return self._hash.digest()


def _write(index: Path, table: pa.Table, key: str) -> pa.Table:
    """Write the index and return its table, from the disk where it could be written."""
    import pyarrow as pa

    table = table.replace_schema_metadata({**(table.schema.metadata or {}), "key": key})
    try:
        with atomic_write(index, "wb") as file:
            hashed = _HashedFile(file)
            with pa.PythonFile(hashed, "w") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            file.write(hashed.digest())
    except RunError:
        return table  # a full disk or a folder that may only be read
    return _read(index, key) or table
