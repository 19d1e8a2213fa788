"""Cards of tables: file format, target, columns and published counts, one TOML file per table.

The shipped cards are in `assets/tabular`; `my-table` is the template for a table of your own.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from flyp_saflex.errors import DataError, nearest
from flyp_saflex.user_text import parse_toml, quoted, read_toml

Column = str | int
REST = "*"
"""Target value of a class that stands for every value that no other class names."""


class Counts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Expected counts; 0 and -1 (of `missing`): unknown, not checked."""

    rows: int = 0
    features: int = 0
    positives: int = 0
    missing: int = -1
    """Missing cells in the features."""


class Paper(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Row of the paper's Tables 5 and 6: what it says about the table, and where it links to."""

    rows: int
    features: int
    categorical: int
    positives: int = 0
    link: str


class Card(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Description of one table.

    Attributes:
        title: name of the data set.
        file: file name below `data.root`.
        target: column of the class: its name, or its number from 0 where there is no header.
        separator: character between cells.
        header: whether the first line names the columns.
        missing: cells that mean a missing value.
        ignore: columns that are no features (ids, target leaks).
        categorical: features that are categories; the others are numbers.
        classes: target values by class name, in the order of the class indices; `*`: every other value. Empty: every value is
            a class.
        expected: counts of the unaltered file.
        paper: counts in the paper, and its link.
    """

    title: str
    file: str
    target: Column
    separator: str = ","
    header: bool = True
    missing: tuple[str, ...] = ("",)
    ignore: tuple[Column, ...] = ()
    categorical: tuple[Column, ...] = ()
    classes: dict[str, tuple[str, ...]] = {}
    expected: Counts = Counts()
    paper: Paper | None = None


def shipped_cards() -> list[str]:
    """Return the sorted names of the shipped cards."""
    folder = resources.files("flyp_saflex.assets") / "tabular"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_card(name: str) -> Card:
    """Read a card.

    Args:
        name: of a shipped card, or path of a TOML file.

    Raises:
        DataError: there is none, or it is wrong.
    """
    known = shipped_cards()
    if name in known:
        text = (resources.files("flyp_saflex.assets") / "tabular" / f"{name}.toml").read_text(encoding="utf-8")
        values, source = parse_toml(text, f"card {name}", DataError), f"card {name}"
    elif name.endswith(".toml"):
        values, source = read_toml(Path(name), DataError), name
    else:
        raise DataError(
            f"data.card = {quoted(repr(name))}: expected a shipped card ({', '.join(known)}) or a .toml file"
            f"{nearest(name, known)}"
        )
    return _card_of(values, source)


def _card_of(values: dict[str, Any], source: str) -> Card:
    try:
        card = msgspec.convert(values, Card)
    except msgspec.ValidationError as error:
        raise DataError(f"{source}: {quoted(str(error))}; the card 'my-table' explains every key") from None
    if len(card.separator) != 1:
        raise DataError(f"{source}: separator = {quoted(repr(card.separator))}: expected one character, for example ','")
    wild = [kind for kind, found in card.classes.items() if REST in found]
    if len(wild) > 1 or len(card.classes) == 1:
        raise DataError(f"{source}: classes: expected two classes or more, of them at most one with '{REST}'")
    return card
