"""Parquet files as tables: cells of text and numbers; lists, structs and bytes are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flyp_saflex.data.table_file import Table, check_columns
from flyp_saflex.data.text import nfc_all, shown
from flyp_saflex.errors import DataError


def load_parquet(file: Path, wanted: Sequence[str]) -> Table:
    """Read columns of a Parquet file.

    Args:
        file: the file.
        wanted: columns.

    Raises:
        DataError: names the column that is missing or cannot be used.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(file).names
        check_columns(file, 1, nfc_all(names), wanted)
        stored = dict(zip(nfc_all(names), names, strict=True))
        data = pq.read_table(file, columns=[stored[name] for name in wanted])
        columns = {name: _texts(file, name, data.column(stored[name])) for name in wanted}
    except pa.ArrowException as error:
        raise DataError(f"{file} cannot be read: {shown(' '.join(str(error).split()), 200)}; save it anew") from None
    return Table(file=file, columns=columns, num_rows=data.num_rows, first_row=1)


def _texts(file: Path, name: str, column: Any) -> list[str]:
    """Return a Parquet column as text; numbers without fraction, and whole columns of them, as whole numbers.

    Raises:
        DataError: its cells are lists, structs or bytes.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_struct(kind):
        keys = [kind.field(index).name for index in range(kind.num_fields)]
        hint = "write the images to files and their paths into the column" if {"bytes", "path"} <= set(keys) else "write text"
        raise DataError(f"{file} row 1, column '{name}' holds {{{', '.join(keys)}}}, expected text; {hint}")
    if pa.types.is_nested(kind):
        raise DataError(f"{file} row 1, column '{name}' holds a list, expected text; write one text per row")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        try:
            column = column.cast(pa.string())  # text of older writers
        except pa.ArrowInvalid:
            raise DataError(f"{file} row 1, column '{name}' holds bytes, expected text; write text") from None
    if pa.types.is_floating(kind):
        whole = pc.all(pc.or_kleene(pc.equal(column, pc.floor(column)), pc.is_nan(column))).as_py()
        column = pc.if_else(pc.is_nan(column), None, column)
        column = column.cast(pa.int64()) if whole is not False else column
    return ["" if value is None else str(value).strip() for value in column.to_pylist()]
