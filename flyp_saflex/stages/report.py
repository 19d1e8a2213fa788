"""Compare runs: mean, spread and n over seeds, paired differences (floor 3; reads results.json only, no torch).

Runs with the same recipe name are seeds of one condition. Accuracy and macro-F1 have tables of their own, and so have
ID and OOD splits; splits that were trained on are left out. Rows at WiSE-FT's chosen alpha stand apart from the
finetuned model's (alpha = 1).
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flyp_saflex.errors import RunError, nearest
from flyp_saflex.method.statistics import Interval, Summary, paired_difference, summarise
from flyp_saflex.results import align, read_results
from flyp_saflex.rundir import atomic_write

Form = Literal["md", "csv", "json", "html"]
Kind = Literal["finetuned", "wise"]

METRICS = {"accuracy": "Accuracy", "macro_f1": "Macro-F1", "worst_group_accuracy": "Worst-group accuracy"}
SHIFTS = {"id": "in distribution (ID)", "ood": "out of distribution (OOD)"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One condition on one split in one metric, over its seeds.

    Attributes:
        metric: key of `METRICS`.
        shift: `id` or `ood`.
        split: its name.
        role: `select` or `test`.
        recipe: the condition.
        kind: `finetuned` (alpha = 1), or `wise` (every run at its chosen alpha).
        alphas: the alphas of the runs, each once.
        values: value by seed.
        summary: mean, sample standard deviation and n of the values.
        difference: from the baseline's finetuned model, paired by seed; None without a shared seed and for itself.
    """

    metric: str
    shift: str
    split: str
    role: str
    recipe: str
    kind: Kind
    alphas: tuple[float, ...]
    values: dict[int, float]
    summary: Summary
    difference: Interval | None


@dataclass(frozen=True)
class Table:
    """A table of the report: what every text form is made from."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def report(runs: Sequence[Path], *, out: Path | None = None, form: Form = "md", baseline: str | None = None) -> str:
    """Compare runs and return the report.

    Args:
        runs: run folders that `evaluate` has been run on.
        out: write here, and print nothing but the name; a name in `.csv`, `.json` or `.html` sets the form if `form` is `md`.
        form: Markdown, one row per cell (CSV, JSON), or a page (HTML).
        baseline: recipe that the others are compared with; None: the first run's.

    Raises:
        RunError: a run without results.json, two runs with the same recipe and seed, or an unknown baseline.
    """
    results = collect([Path(run) for run in runs])
    recipes = list(dict.fromkeys(result["recipe"] for result in results.values()))
    baseline = recipes[0] if baseline is None else baseline
    if baseline not in recipes:
        raise RunError(
            f"--baseline {baseline}: no run has this recipe{nearest(baseline, recipes)} (recipes: {', '.join(recipes)})"
        )
    suffix = out.suffix.removeprefix(".") if out is not None else ""
    chosen = suffix if form == "md" and suffix in RENDERERS else form
    text = RENDERERS[chosen](cells(list(results.values()), baseline), notes(results), baseline)
    if out is None:
        print(text, end="")
    else:
        with atomic_write(out) as file:
            file.write(text)
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


def cells(results: Sequence[dict[str, Any]], baseline: str) -> list[Cell]:
    """Return every cell, ordered by metric, shift, split (as first seen), recipe (as first seen) and kind."""
    splits: dict[tuple[str, str], str] = {}
    groups: dict[tuple[str, str, str, Kind], dict[int, tuple[float, dict[str, Any]]]] = {}
    for result in results:
        for row in result["results"]:
            if row["role"] == "train":
                continue
            splits.setdefault((row["shift"], row["split"]), row["role"])
            kinds: list[Kind] = ["finetuned"] if row["wise_alpha"] == 1 else []
            if result.get("chosen_alpha") == row["wise_alpha"]:
                kinds.append("wise")
            for kind in kinds:
                group = groups.setdefault((row["shift"], row["split"], result["recipe"], kind), {})
                group[result["seed"]] = row["wise_alpha"], row
    recipes = list(dict.fromkeys(result["recipe"] for result in results))
    found = []
    for metric in METRICS:
        for shift in SHIFTS:
            for split in (name for row_shift, name in splits if row_shift == shift):
                for recipe in recipes:
                    for kind in ("finetuned", "wise"):
                        values = _values(groups.get((shift, split, recipe, kind), {}), metric)
                        if not values:
                            continue
                        reference = _values(groups.get((shift, split, baseline, "finetuned"), {}), metric)
                        is_reference = recipe == baseline and kind == "finetuned"
                        found.append(
                            Cell(
                                metric=metric,
                                shift=shift,
                                split=split,
                                role=splits[shift, split],
                                recipe=recipe,
                                kind=kind,
                                alphas=tuple(sorted({alpha for alpha, _ in groups[shift, split, recipe, kind].values()})),
                                values=values,
                                summary=summarise(values.values()),
                                difference=None if is_reference else paired_difference(values, reference),
                            )
                        )
    return found


def notes(results: dict[Path, dict[str, Any]]) -> list[str]:
    """Return what a reader must know: rows on part of the images, with overrides, or on other images than the rest."""
    lines: list[str] = []
    sizes: dict[str, dict[int, None]] = {}
    for run, result in results.items():
        for row in result["results"]:
            if row["wise_alpha"] == 1 and row["role"] != "train":
                sizes.setdefault(row["split"], {})[row["n"]] = None
        if any(row.get("limit") for row in result["results"]):
            lines.append(f"{run}: evaluated with --limit, a quick look and no result")
        overrides = sorted({override for row in result["results"] for override in row.get("overrides", [])})
        if overrides:
            lines.append(f"{run}: evaluated with --set {' --set '.join(overrides)}")
    for split, found in sizes.items():
        if len(found) > 1:
            lines.append(f"{split}: runs differ in the number of images ({', '.join(map(str, found))})")
    return lines


def tables(found: Sequence[Cell], baseline: str) -> list[Table]:
    """Return one table of values and one of differences per metric and shift, in percent and points."""
    made = []
    for metric, title in METRICS.items():
        for shift, words in SHIFTS.items():
            here = [cell for cell in found if (cell.metric, cell.shift) == (metric, shift)]
            if not here or (metric == "worst_group_accuracy" and not _has_groups(found, shift)):
                continue
            splits = {cell.split: cell.role for cell in here}
            header = ("", *(f"{split} (select)" if role == "select" else split for split, role in splits.items()))
            by_condition: dict[tuple[str, Kind], dict[str, Cell]] = {}
            for cell in here:
                by_condition.setdefault((cell.recipe, cell.kind), {})[cell.split] = cell
            rows = sorted(by_condition.items(), key=lambda item: item[0][1])  # finetuned first, then WiSE-FT; stable
            values = [
                (_condition(line), *(_value(line[split].summary) if split in line else "-" for split in splits))
                for _, line in rows
            ]
            made.append(Table(f"{title}, {words}: percent, mean ± standard deviation (n seeds)", header, tuple(values)))
            changes = [
                (_condition(line), *(_difference(line[split].difference) if split in line else "-" for split in splits))
                for key, line in rows
                if key != (baseline, "finetuned")
            ]
            if changes:
                name = f"{title}, {words}: difference from {baseline} in points, paired by seed [95 % t-interval] (n pairs)"
                made.append(Table(name, header, tuple(changes)))
    return made


def _markdown(found: Sequence[Cell], remarks: Sequence[str], baseline: str) -> str:
    parts = []
    for table in tables(found, baseline):
        rule = tuple("---" if c == 0 else "---:" for c in range(len(table.header)))
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (table.header, rule, *table.lines)]
        grid = align([[*line] for line in lines], left=1, separator=" | ")
        parts.append(f"### {table.title}\n\n" + "\n".join(f"| {line} |" for line in grid.splitlines()) + "\n")
    parts += ["\n".join(f"Note: {remark}" for remark in remarks) + "\n"] if remarks else []
    return "\n".join(parts)


def _html(found: Sequence[Cell], remarks: Sequence[str], baseline: str) -> str:
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}td:first-child{text-align:left}"
    parts = [f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>flyp-saflex report</title><style>{style}</style>']
    for table in tables(found, baseline):
        parts.append(f"<h3>{html.escape(table.title)}</h3>\n<table>")
        parts.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header) + "</tr>")
        parts += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in table.lines]
        parts.append("</table>")
    parts += [f"<p>Note: {html.escape(remark)}</p>" for remark in remarks]
    return "\n".join([*parts, "</html>", ""])


def _csv(found: Sequence[Cell], remarks: Sequence[str], baseline: str) -> str:
    text = io.StringIO()
    columns = ["metric", "shift", "split", "role", "recipe", "kind", "alphas", "mean", "deviation", "n", "seeds"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "baseline", "difference", "difference_low", "difference_high", "pairs"])
    for cell in found:
        fields = [cell.metric, cell.shift, cell.split, cell.role, cell.recipe, cell.kind, " ".join(f"{a:g}" for a in cell.alphas)]
        summary, change = cell.summary, cell.difference
        ends = [change.mean, change.low, change.high, change.n] if change else [None] * 4
        writer.writerow(
            [*fields, summary.mean, summary.deviation, summary.n, " ".join(map(str, sorted(cell.values))), baseline, *ends]
        )
    return text.getvalue()


def _json(found: Sequence[Cell], remarks: Sequence[str], baseline: str) -> str:
    return json.dumps({"baseline": baseline, "cells": [asdict(cell) for cell in found], "notes": list(remarks)}, indent=2) + "\n"


RENDERERS: dict[str, Callable[[Sequence[Cell], Sequence[str], str], str]] = {
    "md": _markdown,
    "csv": _csv,
    "json": _json,
    "html": _html,
}


def _has_groups(found: Sequence[Cell], shift: str) -> bool:
    """Whether the worst group is anywhere another number than the accuracy: with one domain per split it is not."""
    here = [cell for cell in found if cell.shift == shift]
    values = {metric: [cell.values for cell in here if cell.metric == metric] for metric in ("accuracy", "worst_group_accuracy")}
    return values["worst_group_accuracy"] not in ([], values["accuracy"])


def _values(group: dict[int, tuple[float, dict[str, Any]]], metric: str) -> dict[int, float]:
    return {seed: float(row[metric]) for seed, (_, row) in sorted(group.items()) if row.get(metric) is not None}


def _condition(line: dict[str, Cell]) -> str:
    cell = next(iter(line.values()))
    if cell.kind == "finetuned":
        return cell.recipe
    alphas = sorted({alpha for part in line.values() for alpha in part.alphas})
    return f"{cell.recipe} + WiSE-FT, alpha {', '.join(f'{alpha:g}' for alpha in alphas)}"


def _value(summary: Summary) -> str:
    spread = "" if summary.deviation is None else f" ± {100 * summary.deviation:.1f}"
    return f"{100 * summary.mean:.1f}{spread} ({summary.n})"


def _difference(change: Interval | None) -> str:
    if change is None:
        return "no shared seed"
    ends = "" if change.low is None or change.high is None else f" [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    return f"{100 * change.mean:+.1f}{ends} ({change.n})"
