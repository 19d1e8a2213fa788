"""Table of text cells: columns that the recipe names, and the row numbers of messages.

Rows are counted as an editor shows them: the first line of a CSV is row 1. A Parquet file's first row is row 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flyp_saflex.data.text import listed
from flyp_saflex.errors import DataError, nearest

INTEGRAL = re.compile(r"[-+]?\d{1,15}\.0*")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text cells of the columns that the recipe names.

    Attributes:
        file: where they were read.
        columns: cells by column, stripped; missing values are empty.
        num_rows: number of rows in `columns`.
        first_row: number of the first row, if there is one on every line.
        rows: numbers of the rows; empty: they follow each other.
        left_out: number of rows that hold no data, by what they are.
        notes: what a person should know about the file.
    """

    file: Path
    columns: dict[str, list[str]]
    num_rows: int
    first_row: int
    rows: Sequence[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def row(self, index: int) -> int:
        """Return the number of a row."""
        return self.rows[index] if self.rows else index + self.first_row

    def at(self, index: int, column: str) -> str:
        """Return file, row and column of a cell for a message."""
        return f"{self.file} row {self.row(index)}, column '{column}'"


def without_fractions(cells: list[str]) -> list[str]:
    """Return whole numbers that were written as fractions (`1.0`) as whole numbers, if all cells are whole numbers."""
    kinds = set(cells)
    if not any(INTEGRAL.fullmatch(cell) for cell in kinds):
        return cells
    if not all(cell.isdecimal() or not cell or INTEGRAL.fullmatch(cell) for cell in kinds):
        return cells
    whole = {cell: cell.partition(".")[0] for cell in kinds}
    return [whole[cell] for cell in cells]


def check_columns(file: Path, row: int, header: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that every wanted column is there once and is used for one thing.

    Raises:
        DataError: it is not.
    """
    for name in dict.fromkeys(wanted):
        if header.count(name) > 1:
            raise DataError(
                f"{file} row {row}: the column '{name}' is there {header.count(name)} times; rename or remove all but one"
            )
        if name not in header:
            raise DataError(
                f"{file} row {row}: there is no column '{name}'{nearest(name, header)} (columns: {listed(header, 20)}); "
                "set data.path_column, label_column, split_column, domain_column, caption_column or group_columns"
            )
    doubled = [name for name in dict.fromkeys(wanted) if wanted.count(name) > 1]
    if doubled:
        raise DataError(f"the recipe uses the column '{doubled[0]}' of {file} for two things; correct the data.*_column options")
