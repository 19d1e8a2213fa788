"""Published figures (`flyp_saflex/published.csv`), set apart from our runs in a report.

They are copied from papers: other code, seeds and hardware. They are never paired with runs, averaged, or compared by a test.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from flyp_saflex.errors import RunError
from flyp_saflex.reporting.html import Markup, paragraph, section, table
from flyp_saflex.reporting.tables import Table
from flyp_saflex.storage.data_record import read_record
from flyp_saflex.tables import METRICS

MARK = "Literature, not our runs"
CAUTION = "Copied from the papers named in each row: other code, seeds and hardware. No difference is computed with them."
HEADER = ("method", "model", "split", "percent", "source", "note")


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        dataset: name of the dataset, as in `data.name` where we read it.
        split: name of the split.
        metric: name in `tables.METRICS`.
        method: as the source calls it.
        model: architecture.
        percent: the figure as printed in the source.
        spread: standard deviation as printed; empty if none is given.
        source: paper and table.
        note: what a reader should know; may be empty.
    """

    dataset: str
    split: str
    metric: str
    method: str
    model: str
    percent: str
    spread: str
    source: str
    note: str

    @property
    def value(self) -> str:
        """Figure and spread as printed."""
        return f"{self.percent} ± {self.spread}" if self.spread else self.percent


def published() -> list[Published]:
    """Return all published figures in the order of the file."""
    text = (resources.files("flyp_saflex") / "published.csv").read_text(encoding="utf-8")
    return [Published(**row) for row in csv.DictReader(text.splitlines())]


def published_beside(runs: Collection[Path]) -> list[Published]:
    """Return the figures about the datasets of some runs.

    Args:
        runs: run folders; their data.json names the dataset.

    Raises:
        RunError: there is no published figure about any of them.
    """
    every = published()
    names = sorted({record.name for run in runs if (record := read_record(run)) is not None})
    found = [row for row in every if row.dataset in names]
    if not found:
        known = ", ".join(dict.fromkeys(row.dataset for row in every))
        raise RunError(
            f"--published: no published figure is known for the data of these runs ({', '.join(names) or 'no data.json'}); "
            f"known are {known}: leave --published out"
        )
    return found


def published_tables(rows: Sequence[Published]) -> list[Table]:
    """Return one table per dataset and metric."""
    return [Table(title, HEADER, tuple(lines)) for title, lines in _grouped(rows).items()]


def published_chapter(rows: Sequence[Published]) -> Markup:
    """Return the chapter of the HTML page."""
    made = [table(title, HEADER, lines, seen=title) for title, lines in _grouped(rows).items()]
    return section("published", MARK, paragraph(CAUTION, class_="note"), *made)


def _grouped(rows: Sequence[Published]) -> Mapping[str, list[tuple[str, ...]]]:
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        title = f"{MARK}: {METRICS[row.metric].title} on {row.dataset}"
        groups.setdefault(title, []).append((row.method, row.model, row.split, row.value, row.source, row.note))
    return groups
