"""Results of several runs: a cell per condition, split and metric, tables of cells, remarks.

Runs with the same recipe name are seeds of one condition. Every metric has its own table for ID and for OOD splits; splits
that were trained on are left out. Results at the chosen alpha of WiSE-FT are rows of their own, apart from the finetuned model
(alpha = 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flyp_saflex.evaluation.statistics import Interval, Summary, paired_difference, summarise
from flyp_saflex.tables import METRICS

Kind = Literal["finetuned", "wise"]

BOOTSTRAP_NOTE = (
    "[low, high] behind a value of one seed: 95 % bootstrap interval over the images of the split, so it tells how much other "
    "images would change the value, not how much another seed would."
)
WISE_AT_ONE = "WiSE-FT: alpha 1"
"""Mark of a finetuned model that is its own WiSE-FT choice."""
SHIFTS = {"id": "in distribution (ID)", "ood": "out of distribution (OOD)"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One condition on one split in one metric, over its seeds.

    Attributes:
        metric: name in `tables.METRICS`.
        shift: `id` or `ood`.
        split: name of the split.
        role: `select` or `test`.
        recipe: the condition.
        kind: `finetuned` (alpha = 1), or `wise` (WiSE-FT at the alpha that each run chose).
        alphas: distinct alphas of the runs.
        values: value by seed, a fraction.
        summary: mean, sample standard deviation and n of the values.
        difference: difference from the finetuned baseline, paired by seed; None without a shared seed, and for the baseline.
        interval: ends of the bootstrap interval over the images, fractions; of a single seed only, None where there is none.
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
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Block:
    """Cells of one metric and one shift, the content of one table.

    Attributes:
        metric: name in `tables.METRICS`.
        shift: key of `SHIFTS`.
        splits: role by name, in reporting order.
        lines: (name of the condition, its cells by split), finetuned models first.
    """

    metric: str
    shift: str
    splits: dict[str, str]
    lines: tuple[tuple[str, dict[str, Cell]], ...]

    @property
    def title(self) -> str:
        """Title: metric and shift."""
        return f"{METRICS[self.metric].title}, {SHIFTS[self.shift]}"

    @property
    def columns(self) -> list[str]:
        """Names of the splits; those that select are marked."""
        return [f"{split} (select)" if role == "select" else split for split, role in self.splits.items()]


@dataclass(frozen=True)
class Table:
    """A table of text, for the terminal and Markdown."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def cells(results: Sequence[dict[str, Any]], baseline: str) -> list[Cell]:
    """Return all cells, ordered by metric, shift, split, recipe (both as first seen) and kind."""
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
    for metric in (name for name in METRICS if METRICS[name].in_report):
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
                                interval=_interval(groups[shift, split, recipe, kind], metric),
                            )
                        )
    return found


def notes(results: dict[Path, dict[str, Any]]) -> list[str]:
    """Return remarks on results that are not comparable: --limit, overrides, or unequal numbers of images."""
    lines: list[str] = []
    sizes: dict[str, dict[int, None]] = {}
    for run, result in results.items():
        for row in result["results"]:
            if row["wise_alpha"] == 1 and row["role"] != "train":
                sizes.setdefault(row["split"], {})[row["n"]] = None
        if any(row.get("limit") for row in result["results"]):
            lines.append(f"{run}: evaluated with --limit, on a part of the images only")
        overrides = sorted({override for row in result["results"] for override in row.get("overrides", [])})
        if overrides:
            lines.append(f"{run}: evaluated with --set {' --set '.join(overrides)}")
    for split, found in sizes.items():
        if len(found) > 1:
            lines.append(f"{split}: runs differ in the number of images ({', '.join(map(str, found))})")
    return lines


def blocks(found: Sequence[Cell]) -> list[Block]:
    """Group cells by metric and shift; worst-group accuracy is left out where it equals the accuracy.

    A WiSE-FT row at alpha 1 is the finetuned model again: it is left out, and the name of the finetuned row says so.
    """
    made = []
    for metric in METRICS:
        for shift in SHIFTS:
            here = [cell for cell in found if (cell.metric, cell.shift) == (metric, shift)]
            if not here or (metric == "worst_group_accuracy" and not _has_groups(found, shift)):
                continue
            by_condition: dict[tuple[str, Kind], dict[str, Cell]] = {}
            for cell in here:
                by_condition.setdefault((cell.recipe, cell.kind), {})[cell.split] = cell
            rows = sorted(by_condition.items(), key=lambda item: item[0][1])  # finetuned first, then WiSE-FT; stable
            same = {recipe for (recipe, kind), line in rows if kind == "wise" and _all_finetuned(line, by_condition)}
            lines = tuple(
                (f"{recipe} ({WISE_AT_ONE})" if recipe in same else _condition(line), line)
                for (recipe, kind), line in rows
                if kind == "finetuned" or recipe not in same
            )
            made.append(Block(metric, shift, {cell.split: cell.role for cell in here}, lines))
    return made


def tables(found: Sequence[Cell], baseline: str) -> list[Table]:
    """Return a table of values (percent) and one of differences (points) per metric and shift."""
    made = []
    for block in blocks(found):
        header = ("", *block.columns)
        is_fraction = METRICS[block.metric].is_fraction
        unit, points = ("percent, ", " in points") if is_fraction else ("", "")
        values = [
            (
                name,
                *(value_text(line[split], count=True) if split in line else "-" for split in block.splits),
            )
            for name, line in block.lines
        ]
        single = ", [95 % bootstrap interval over images]" if has_intervals(block) else ""
        made.append(Table(f"{block.title}: {unit}mean ± standard deviation{single} (n seeds)", header, tuple(values)))
        changes = [
            (
                name,
                *(
                    difference_text(line[split].difference, block.metric, count=True) if split in line else "-"
                    for split in block.splits
                ),
            )
            for name, line in block.lines
            if not is_baseline(line, baseline)
        ]
        if changes:
            title = f"{block.title}: difference from {baseline}{points}, paired by seed [95 % t-interval] (n pairs)"
            made.append(Table(title, header, tuple(changes)))
    return made


def is_baseline(line: dict[str, Cell], baseline: str) -> bool:
    """Return whether a line of a block is the baseline."""
    return all((cell.recipe, cell.kind) == (baseline, "finetuned") for cell in line.values())


def has_intervals(block: Block) -> bool:
    """Return whether any cell of a block has a bootstrap interval."""
    return any(cell.interval is not None for _, line in block.lines for cell in line.values())


def value_text(cell: Cell, *, count: bool = False) -> str:
    """Return mean and standard deviation, or value and bootstrap interval, in the metric's unit; with `count` also n."""
    unit = METRICS[cell.metric]
    spread = "" if cell.summary.deviation is None else f" ± {unit.text(cell.summary.deviation)}"
    if cell.interval is not None:
        low, high = cell.interval
        spread = f" [{unit.text(low)}, {unit.text(high)}]"
    return f"{unit.text(cell.summary.mean)}{spread}" + (f" ({cell.summary.n})" if count else "")


def difference_text(change: Interval | None, metric: str, *, count: bool = False) -> str:
    """Return a difference with its interval in the metric's unit; with `count` also the number of pairs in brackets."""
    if change is None:
        return "no shared seed"
    unit = METRICS[metric]
    known = change.low is not None and change.high is not None
    ends = f" [{unit.text(change.low, sign=True)}, {unit.text(change.high, sign=True)}]" if known else ""
    return f"{unit.text(change.mean, sign=True)}{ends}" + (f" ({change.n})" if count else "")


def _has_groups(found: Sequence[Cell], shift: str) -> bool:
    """Return whether worst-group accuracy differs from accuracy anywhere: with one domain per split it does not."""
    here = [cell for cell in found if cell.shift == shift]
    values = {metric: [cell.values for cell in here if cell.metric == metric] for metric in ("accuracy", "worst_group_accuracy")}
    return values["worst_group_accuracy"] not in ([], values["accuracy"])


def _values(group: dict[int, tuple[float, dict[str, Any]]], metric: str) -> dict[int, float]:
    return {seed: float(row[metric]) for seed, (_, row) in sorted(group.items()) if row.get(metric) is not None}


def _interval(group: dict[int, tuple[float, dict[str, Any]]], metric: str) -> tuple[float, float] | None:
    """Return the bootstrap interval of a single seed; None for several seeds, whose spread says more."""
    if len(group) != 1:
        return None
    ((_, row),) = group.values()
    try:
        low, high = (float(end) for end in row.get(f"{metric}_interval") or ())
    except (TypeError, ValueError):
        return None
    return (low, high) if low <= high else None


def _all_finetuned(line: dict[str, Cell], others: dict[tuple[str, Kind], dict[str, Cell]]) -> bool:
    """Return whether a WiSE-FT row is at alpha 1 on every split, with the splits and seeds of the finetuned row."""
    cell = next(iter(line.values()))
    finetuned = others.get((cell.recipe, "finetuned"), {})
    same_splits = line.keys() == finetuned.keys()
    return same_splits and all(part.alphas == (1.0,) and part.values == finetuned[split].values for split, part in line.items())


def _condition(line: dict[str, Cell]) -> str:
    cell = next(iter(line.values()))
    if cell.kind == "finetuned":
        return cell.recipe
    alphas = sorted({alpha for part in line.values() for alpha in part.alphas})
    return f"{cell.recipe} + WiSE-FT, alpha {', '.join(f'{alpha:g}' for alpha in alphas)}"
