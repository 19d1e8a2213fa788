"""The command `flyp-saflex report`: mean, spread and n over seeds, and paired differences between runs.

The numbers are those of results.json. Where data.json and config.toml are there, they say whether runs are seeds of one
experiment. The HTML page (`page.py`) also reads the other files of the run folders; it names those that are missing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flyp_saflex.errors import RunError, nearest
from flyp_saflex.reporting.latex import latex
from flyp_saflex.reporting.published import CAUTION, Published, published_beside, published_tables
from flyp_saflex.reporting.runs import Preface
from flyp_saflex.reporting.seeds import seed_notes
from flyp_saflex.reporting.tables import BOOTSTRAP_NOTE, Cell, Table, cells, notes, tables
from flyp_saflex.storage.files import atomic_write
from flyp_saflex.storage.results import align, read_results

Form = Literal["md", "csv", "json", "tex", "html"]
Results = dict[Path, dict[str, Any]]


@dataclass(frozen=True)
class Content:
    """All that a report tells, in any form.

    Attributes:
        results: results.json of every run.
        found: cells of the tables.
        remarks: notes below them.
        baseline: recipe that the others are compared with.
        preface: paragraphs above everything else.
        literature: published figures about the same data.
    """

    results: Results
    found: Sequence[Cell]
    remarks: Sequence[str]
    baseline: str
    preface: Preface
    literature: Sequence[Published]


def report(
    runs: Sequence[Path],
    *,
    out: Path | None = None,
    form: Form = "md",
    baseline: str | None = None,
    preface: Preface | None = None,
    published: bool = False,
) -> str:
    """Compare runs; write or print the report, and return it.

    Args:
        runs: run folders that `evaluate` has been run on.
        out: file to write; None: print. With `form` = `md` a suffix `.csv`, `.json`, `.tex` or `.html` sets the form.
        form: Markdown, one row per cell (CSV, JSON), tables for a paper (LaTeX), or a self-contained page with plots and
            pictures (HTML).
        baseline: recipe that the other ones are compared with; None: that of the first run.
        preface: paragraphs above everything else in Markdown and HTML.
        published: add published figures about the same datasets, marked as literature.

    Raises:
        RunError: a run without results.json, two runs with the same recipe and seed, seeds of one recipe on different data,
            an unknown baseline, no published figure about the data, or a file that cannot be written.
    """
    results = collect([Path(run) for run in runs])
    recipes = list(dict.fromkeys(result["recipe"] for result in results.values()))
    baseline = recipes[0] if baseline is None else baseline
    if baseline not in recipes:
        raise RunError(
            f"--baseline {baseline}: no run has this recipe{nearest(baseline, recipes)} (recipes: {', '.join(recipes)})"
        )
    preface = preface or Preface()
    literature = published_beside(list(results)) if published else []
    remarks = [*notes(results), *seed_notes(results, baseline, preface.by_seed)]
    suffix = out.suffix.removeprefix(".") if out is not None else ""
    chosen = suffix if form == "md" and suffix in RENDERERS else form
    found = cells(list(results.values()), baseline)
    if any(cell.interval is not None for cell in found):
        remarks.append(BOOTSTRAP_NOTE)
    text = RENDERERS[chosen](Content(results, found, remarks, baseline, preface, literature))
    if out is None:
        print(text, end="")
        return text
    try:
        with atomic_write(out) as file:
            file.write(text)
    except RunError as error:
        raise RunError(str(error).replace("--run-dir", "--out")) from None
    print(f"wrote {out}")
    return text


def collect(runs: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Read the results of every run, in the order given.

    Raises:
        RunError: a run without results.json, or two runs with the same recipe and seed.
    """
    results: dict[Path, dict[str, Any]] = {}
    seen: dict[tuple[str, int], Path] = {}
    for run in dict.fromkeys(runs):
        result = read_results(run)
        key = (result["recipe"], result["seed"])
        if key in seen:
            raise RunError(
                f"{seen[key]} and {run} are both recipe '{key[0]}' with seed {key[1]}: give one of them, or tell two conditions "
                f"apart by name when training (--set recipe={key[0]}-variant)"
            )
        seen[key] = run
        results[run] = result
    return results


def _markdown(content: Content) -> str:
    parts = ["\n\n".join(content.preface.paragraphs) + "\n"] if content.preface.paragraphs else []
    parts += [_grid(table) for table in tables(content.found, content.baseline)]
    parts += ["\n".join(f"Note: {remark}" for remark in content.remarks) + "\n"] if content.remarks else []
    if content.literature:
        parts += ["---\n", *(_grid(table) for table in published_tables(content.literature)), CAUTION + "\n"]
    return "\n".join(parts)


def _grid(table: Table) -> str:
    rule = tuple("---" if c == 0 else "---:" for c in range(len(table.header)))
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (table.header, rule, *table.lines)]
    grid = align([[*line] for line in lines], left=1, separator=" | ")
    return f"### {table.title}\n\n" + "\n".join(f"| {line} |" for line in grid.splitlines()) + "\n"


def _html(content: Content) -> str:
    from flyp_saflex.reporting.page import page  # matplotlib: a second that the other forms need not wait

    return page(content.results, content.found, content.remarks, content.baseline, content.preface, content.literature)


def _csv(content: Content) -> str:
    text = io.StringIO()
    columns = ["metric", "shift", "split", "role", "recipe", "kind", "alphas", "mean", "deviation", "n", "seeds"]
    columns += ["interval_low", "interval_high"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "baseline", "difference", "difference_low", "difference_high", "pairs", "notes"])
    for cell in content.found:
        fields = [cell.metric, cell.shift, cell.split, cell.role, cell.recipe, cell.kind, " ".join(f"{a:g}" for a in cell.alphas)]
        summary, change = cell.summary, cell.difference
        ends = [change.mean, change.low, change.high, change.n] if change else [None] * 4
        writer.writerow(
            [
                *fields,
                summary.mean,
                summary.deviation,
                summary.n,
                " ".join(map(str, sorted(cell.values))),
                *(cell.interval or (None, None)),
                content.baseline,
                *ends,
                "; ".join(content.remarks),
            ]
        )
    width = len(columns) + 6
    for row in content.literature:
        known = [row.metric, "", row.split, "", f"{row.method} ({row.model})", "published", "", float(row.percent) / 100]
        spread = float(row.spread) / 100 if row.spread else None
        cells_ = [*known, spread, *[None] * (width - len(known) - 2), "; ".join(filter(None, (row.source, row.note)))]
        writer.writerow(cells_)
    return text.getvalue()


def _tex(content: Content) -> str:
    return latex(
        [*tables(content.found, content.baseline), *(published_tables(content.literature) if content.literature else [])],
        [*content.preface.paragraphs, *content.remarks, *([CAUTION] if content.literature else [])],
    )


def _json(content: Content) -> str:
    made = {"baseline": content.baseline, "cells": [asdict(cell) for cell in content.found], "notes": list(content.remarks)}
    published = {"published": [asdict(row) for row in content.literature]} if content.literature else {}
    return json.dumps(made | published, indent=2) + "\n"


RENDERERS: dict[str, Callable[[Content], str]] = {"md": _markdown, "csv": _csv, "json": _json, "tex": _tex, "html": _html}
