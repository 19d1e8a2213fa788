"""CSV and TSV files as tables: every row has the header's shape or is named."""

from __future__ import annotations

import csv
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Literal, TextIO

from flyp_saflex.data.table_file import Table, check_columns
from flyp_saflex.data.text import nfc, shown
from flyp_saflex.errors import DataError

OTHER_DELIMITERS = (",", ";", "\t", "|")
SEP_LINE = re.compile(r'"?sep=(.)"?')
"""Excel's first line of a CSV, which names the delimiter."""
BLOCK_ROWS = 16_384
"""Rows that are held as rows before they are moved to the columns."""
MOST_KNOWN = 65_536
"""Distinct cells of a column that are looked up to be kept once."""


def load_delimited(file: Path, wanted: Sequence[str], delimiter: str) -> Table:
    """Read columns of a delimited text file.

    Args:
        file: the file.
        wanted: columns, the first one that of the paths.
        delimiter: what the ending of the file says.

    Raises:
        DataError: names file, row and column of what cannot be read.
        UnicodeDecodeError: the file is not UTF-8.
    """
    try:
        return _Reader(file, wanted, delimiter).table()
    except DataError:
        if delimiter != "\t":
            raise
    table = _Reader(file, wanted, delimiter, quoting=False).table()
    table.notes.append(f"{file} is read as text without quoting: its quotation marks enclose no cells")
    return table


class _Reader:
    """One pass over a delimited text file.

    Args:
        file: the file.
        wanted: columns, the first one that of the paths.
        delimiter: what the ending of the file says; the header or a `sep=` line may say otherwise.
        quoting: quotation marks enclose cells.
    """

    def __init__(self, file: Path, wanted: Sequence[str], delimiter: str, *, quoting: bool = True) -> None:
        self.file, self.wanted, self.delimiter = file, wanted, delimiter
        self.quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
        self.notes: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.first_line = 1

    def table(self) -> Table:
        """Read the file.

        Raises:
            DataError: a row has another shape than the header, or a quotation mark is not closed.
        """
        with open(self.file, encoding="utf-8-sig", newline="") as lines:
            header = self._header(lines)
            columns, rows = self._rows(lines, header)
        regular = not rows or rows[-1] - rows[0] == len(rows) - 1
        first = rows[0] if rows else self.first_line
        return Table(
            file=self.file,
            columns=dict(zip(self.wanted, columns, strict=True)),
            num_rows=len(rows),
            first_row=first,
            rows=[] if regular else rows,
            left_out=self.left_out,
            notes=self.notes,
        )

    def _header(self, lines: TextIO) -> list[str]:
        """Return the header's cells; blank lines, comments and a `sep=` line may stand before it."""
        for line in lines:
            self.first_line += 1
            text = line.strip()
            if found := SEP_LINE.fullmatch(text):
                self.delimiter = found[1]
            elif text.startswith("#") and not self._named_in(self._split(line, self.delimiter)):
                self.left_out["comment lines"] += 1
            elif text:
                return self._with_delimiter(line)
        raise DataError(f"{self.file} is empty; expected a header and one row per image")

    def _with_delimiter(self, line: str) -> list[str]:
        header = self._split(line, self.delimiter)
        if not self._named_in(header):
            for other in OTHER_DELIMITERS:
                if self._named_in(cells := self._split(line, other)):
                    self.notes.append(f"{self.file} is read with {_told(other)} between cells, as in its header")
                    self.delimiter, header = other, cells
                    break
        check_columns(self.file, self.first_line - 1, header, self.wanted)
        return header

    def _split(self, line: str, delimiter: str) -> list[str]:
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, quoting=self.quoting), [])
        except csv.Error:
            cells = line.split(delimiter)
        return [nfc(cell.strip()) for cell in cells]

    def _named_in(self, header: Sequence[str]) -> bool:
        return all(name in header for name in self.wanted)

    def _rows(self, lines: TextIO, header: Sequence[str]) -> tuple[list[list[str]], array[int]]:
        """Return the wanted columns and the rows' numbers."""
        width, last = len(header), 0
        places = [header.index(name) for name in self.wanted]
        pick = itemgetter(*places) if len(places) > 1 else lambda cells: (cells[places[0]],)
        path = places[0]
        reader = csv.reader(lines, delimiter=self.delimiter, skipinitialspace=True, strict=True, quoting=self.quoting)
        columns = _Columns(len(places))
        rows: list[Sequence[str]] = []
        numbers = array("q")
        try:
            for record in reader:
                number, last, num_lines = self.first_line + last, reader.line_num, reader.line_num - last
                cells = record if len(record) == width else self._mended(record, header, number)
                if num_lines != 1:
                    self._check_swallowed(cells, width, number, num_lines)
                if len(cells) == 1 != width:  # a comment
                    self.left_out["comment lines"] += 1
                elif not cells or (not cells[path] and not any(cell.strip() for cell in cells)):
                    self.left_out["empty lines"] += 1
                else:
                    rows.append(pick(cells))
                    numbers.append(number)
                    if len(rows) == BLOCK_ROWS:
                        columns.take(rows)
        except csv.Error as error:
            number = self.first_line + last
            raise DataError(
                f"{self.file} row {number}: {self._quote_error(str(error))}; "
                'close the quotation mark, and write one inside of a quoted cell twice ("")'
            ) from None
        columns.take(rows)
        return columns.cells, numbers

    def _mended(self, cells: list[str], header: Sequence[str], number: int) -> list[str]:
        """Return the cells of a row of another width: empty ones added or taken off, none of an empty line, one of a comment.

        Raises:
            DataError: the row has more or fewer cells than the header.
        """
        width = len(header)
        if not any(cell.strip() for cell in cells):
            return []
        if cells[0].lstrip().startswith("#"):
            return cells[:1]
        if len(cells) > width and not any(cell.strip() for cell in cells[width:]):
            return cells[:width]
        if len(cells) < width and not any(header[len(cells) :]):
            return [*cells, *[""] * (width - len(cells))]
        found = f"{self.file} row {number}: {len(cells)} cells where the header has {width}"
        if len(cells) < width:
            raise DataError(f"{found}, the last one is '{shown(cells[-1])}'; add the missing cells, empty ones included")
        hint = ", or name the column of row numbers in the header" if cells[0].isdecimal() and len(cells) == width + 1 else ""
        raise DataError(
            f"{found}, the surplus begins with '{shown(cells[width])}'; put text with {_told(self.delimiter)} in it into double "
            f"quotes{hint}"
        )

    def _check_swallowed(self, cells: Sequence[str], width: int, number: int, num_lines: int) -> None:
        """Refuse a cell over several lines that has the delimiters of whole rows in it.

        A quotation mark opened in column j and closed in column j of a later row leaves a row of the right width, whose cell
        holds the rest of its own row, whole rows, and the start of the last one.
        """
        for column, cell in enumerate(cells):
            first, *inner = re.split(r"\r\n|\r|\n", cell)
            if not inner:
                continue
            *whole, end = [line.count(self.delimiter) for line in inner]
            if first.count(self.delimiter) >= width - 1 - column and end >= column and all(n >= width - 1 for n in whole):
                raise DataError(
                    f"{self.file} row {number}: the cell '{shown(cell, 40)}' runs over {num_lines} rows; close the quotation "
                    "mark that it begins with, or remove its line ends"
                )

    def _quote_error(self, error: str) -> str:
        if "field larger" in error or "unexpected end" in error:
            return "a quotation mark is opened and not closed"
        if "expected after" in error:
            return f"a quotation mark is opened in this row and closed before text that is not {_told(self.delimiter)}"
        return error


class _Columns:
    """Cells by column, stripped; of equal cells (a class, a split, a camera) one is kept.

    Args:
        num_columns: columns; the first one is that of the paths, which do not repeat.
    """

    def __init__(self, num_columns: int) -> None:
        self.cells: list[list[str]] = [[] for _ in range(num_columns)]
        self._known: list[dict[str, str]] = [{} for _ in range(num_columns)]

    def take(self, rows: list[Sequence[str]]) -> None:
        """Move rows to the columns; empties the list."""
        if not rows:
            return
        paths, *others = zip(*rows, strict=True)
        self.cells[0] += [path.strip() for path in paths]
        for column, known, cells in zip(self.cells[1:], self._known[1:], others, strict=True):
            stripped = map(str.strip, cells)
            column.extend([known.setdefault(cell, cell) for cell in stripped] if len(known) < MOST_KNOWN else stripped)
        rows.clear()


def _told(delimiter: str) -> str:
    return {"\t": "a tab", " ": "a space"}.get(delimiter, f"'{delimiter}'")
