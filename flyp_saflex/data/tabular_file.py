"""Cells of a delimited text file as a card describes it, each problem named by line and column."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flyp_saflex.data.published import Problems
from flyp_saflex.data.tabular_card import Card, Column
from flyp_saflex.data.text import listed, read_text, shown
from flyp_saflex.errors import DataError, nearest

SEPARATORS = (",", ";", "\t", "|", " ")


@dataclass(frozen=True)
class RawTable:
    """Columns of a file.

    Attributes:
        names: of the features, in the order of the file.
        numbers: float64 with NaN for missing cells, by feature.
        categories: text with None for missing cells, by feature.
        target_N: cells of the target.
        lines_N: all cells of a row as one text: what a row is told apart by.
        features_N: the same of its features alone.
    """

    names: tuple[str, ...]
    numbers: dict[str, NDArray[np.float64]]
    categories: dict[str, NDArray[np.object_]]
    target_N: list[str]
    lines_N: list[str]
    features_N: list[str]

    @property
    def num_missing(self) -> int:
        """Missing cells of all features."""
        numbers = sum(int(np.isnan(column).sum()) for column in self.numbers.values())
        return numbers + sum(sum(cell is None for cell in column) for column in self.categories.values())


def read_cells(path: Path, card: Card, problems: Problems) -> RawTable:
    """Read a table.

    Args:
        path: the file.
        card: its format.
        problems: takes rows of another length and cells that are no numbers.

    Raises:
        DataError: the file cannot be read as the card says.
    """
    lines = read_text(path).splitlines()
    rows = [(number, row) for number, row in _split(path, lines, card.separator) if row]
    if not rows:
        raise DataError(f"{path} is empty; expected rows of '{card.title}'")
    width = len(rows[0][1])
    if width < 2:
        raise DataError(
            f"{path}: line {rows[0][0]} has one cell with the separator {card.separator!r}{_other(lines[rows[0][0] - 1])}; "
            "correct separator in the card"
        )
    names = [cell.strip() for cell in rows[0][1]] if card.header else [str(place) for place in range(width)]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{path}: the header has {listed(twice)} twice; rename one")
    target = _place(path, names, card.target, "target", card)
    left_out = {target, *(_place(path, names, column, "ignore", card) for column in card.ignore)}
    kinds = {_place(path, names, column, "categorical", card) for column in card.categorical} - left_out
    good = []
    for number, row in rows[card.header :]:
        if len(row) == width:
            good.append((number, [cell.strip() for cell in row]))
        else:
            problems.found(f"{path}: line {number} has {len(row)} cells, expected {width}", "mend or remove the line")
    if not good:
        raise DataError(f"{path} has no rows below its header; expected rows of '{card.title}'")
    features = [place for place in range(width) if place not in left_out]
    missing = {mark.strip() for mark in card.missing} | {""}
    numbers, categories = {}, {}
    for place in features:
        cells = [row[place] for _, row in good]
        if place in kinds:
            categories[names[place]] = np.array([None if cell in missing else cell for cell in cells], dtype=object)
        else:
            where = [number for number, _ in good]
            numbers[names[place]] = _numbers(path, names[place], cells, where, missing, problems)
    return RawTable(
        names=tuple(names[place] for place in features),
        numbers=numbers,
        categories=categories,
        target_N=[row[target] for _, row in good],
        lines_N=["\x1f".join(row) for _, row in good],
        features_N=["\x1f".join([row[place] for place in features]) for _, row in good],
    )


def _split(path: Path, lines: Sequence[str], separator: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=separator)
    rows = []
    try:
        for row in reader:
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} cannot be read as a row ({error}); mend its quotation marks") from None
    return rows


def _other(line: str) -> str:
    """Return a hint if another separator divides the line."""
    best = max(SEPARATORS, key=line.count)
    return f", but {line.count(best) + 1} with {best!r}" if line.count(best) else ""


def _place(path: Path, names: Sequence[str], column: Column, key: str, card: Card) -> int:
    """Return the number of a column."""
    name = str(column)
    if isinstance(column, int) and card.header:
        name = names[column] if -len(names) <= column < len(names) else name
    if name not in names:
        raise DataError(
            f"{path} has no column '{shown(name)}', the {key} in the card of '{card.title}'{nearest(name, names)} "
            f"(it has {len(names)}: {listed(names)}); correct the card"
        )
    return names.index(name)


def _numbers(
    path: Path, name: str, cells: Sequence[str], lines: Sequence[int], missing: set[str], problems: Problems
) -> NDArray[np.float64]:
    values = np.full(len(cells), math.nan)
    odd: list[tuple[int, str]] = []
    for place, cell in enumerate(cells):
        if cell in missing:
            continue
        try:
            values[place] = float(cell)
        except ValueError:
            odd.append((lines[place], cell))
            continue
        if not math.isfinite(values[place]):
            odd.append((lines[place], cell))
            values[place] = math.nan
    if odd:
        line, cell = odd[0]
        problems.found(
            f"{path}: line {line}, column '{shown(name)}' has '{shown(cell)}', expected a number ({len(odd)} such cells)",
            "name the column in categorical or the cell in missing of the card, or take such cells as missing with "
            "data.accept_altered=true",
        )
    return values
