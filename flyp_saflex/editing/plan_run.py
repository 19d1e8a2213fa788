"""The command `flyp-saflex plan`: a table of the edits that a run kept, and a plan file."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from flyp_saflex.editing.allocation import EXPLORE, FLOOR, Allocation, allocate
from flyp_saflex.editing.outcomes import Outcome, RunOutcomes, mean_interval, read_outcomes
from flyp_saflex.editing.plan import Cell
from flyp_saflex.editing.plan_file import PlanFile, PlannedCell, loop_settings
from flyp_saflex.editing.settings import LEVELS
from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.storage.results import align, percent

HEAD = ("edits", "kept", "own class %", "bound %", "mean gain", "95 %", "edits per kept", "s per kept", "next %")
LEGEND = """\
kept: weight above 0; own class: mean weight under the class that the edit was made for; bound: its upper bound, after shrinkage;
mean gain with its 95 % interval over edits; s per kept: wall seconds; next: share of the next edits."""
LONGEST_NAME = 40


def plan(run: Path, out: Path | None = None, *, floor: float = FLOOR, explore: float = EXPLORE) -> str:
    """Print the outcomes of a run's edits per text, class and level, write a plan file, return the text.

    Args:
        run: folder of a run with SAFLEX on cached edits.
        out: the plan file; None: RUN/plan.json.
        floor: upper bound of usefulness, 0..1, below which no cell gets more edits.
        explore: part of the edits that is spread over all cells of texts that are not useless, 0..1.

    Raises:
        UserError: the run, its cache entry or the options cannot be used.
    """
    for name, value in (("floor", floor), ("explore", explore)):
        if not 0 <= value <= 1:
            raise ConfigError(f"--{name} {value:g}: expected a number from 0 to 1")
    found = read_outcomes(run)
    made: dict[Cell, list[float]] = defaultdict(list)
    for outcome in found.outcomes:
        made[outcome.cell].append(outcome.useful)
    allocation = allocate(made, _all_cells(found), floor=floor, explore=explore)
    text = "\n\n".join([*(f"note: {note}" for note in found.notes), *_tables(found, allocation), LEGEND])
    if not allocation.shares:
        print(text)
        raise RunError(
            f"run {run}: no class and text reaches --floor {floor:g}, so there is nothing to plan: lower it, or make edits with "
            "other texts"
        )
    path = out or run / "plan.json"
    PlanFile(
        dataset=found.record.name,
        fingerprint=found.record.fingerprint,
        settings=loop_settings(found.settings),
        cells=tuple(
            PlannedCell(
                label=cell[0],
                text=cell[1],
                level=cell[2],
                edits=len(made.get(cell, ())),
                useful=round(estimate.mean, 4),
                upper=round(estimate.upper, 4),
                share=allocation.shares.get(cell, 0.0),
            )
            for cell, estimate in allocation.cells.items()
        ),
    ).write(path)
    text += f"\n\n{path}: follow it with flyp-saflex generate RECIPE --plan {path} --set editor.budget=N"
    print(text)
    return text


def _all_cells(found: RunOutcomes) -> list[Cell]:
    """Return every class that was edited with every text and level."""
    levels = next((found.settings[name] for name in LEVELS if found.settings.get(name)), [None])
    labels = sorted({outcome.cell[0] for outcome in found.outcomes})
    return [(label, text, level) for label in labels for text in range(len(found.settings["texts"])) for level in levels]


def _tables(found: RunOutcomes, allocation: Allocation) -> list[str]:
    """Return a table per text, per class and, if there are several, per level."""
    texts = {number: str(text["domain"] or text["text"]) for number, text in enumerate(found.settings["texts"])}
    labels = {cell[0] for cell in allocation.cells}
    classes = {label: name for label, name in enumerate(found.record.class_names) if label in labels}
    levels = sorted({cell[2] for cell in allocation.cells if cell[2] is not None})
    tables = [_table("text", texts, 1, found, allocation), _table("class", classes, 0, found, allocation)]
    return tables + ([_table("level", {level: f"{level:g}" for level in levels}, 2, found, allocation)] if levels else [])


def _table(
    title: str, names: Mapping[int, str] | Mapping[float, str], part: int, found: RunOutcomes, allocation: Allocation
) -> str:
    of: dict[Hashable, list[Outcome]] = defaultdict(list)
    for outcome in found.outcomes:
        of[outcome.cell[part]].append(outcome)
    lines = [(title, *HEAD)]
    bounds = allocation.texts if part == 1 else {}
    for key, name in names.items():
        share = math.fsum(share for cell, share in allocation.shares.items() if cell[part] == key)
        bound = bounds.get(key) if isinstance(key, int) else None
        lines.append((name[:LONGEST_NAME], *_cells(of[key]), *_gain(of[key]), *_cost(of[key]), percent(share)))
        if bound is not None:
            lines[-1] = (*lines[-1][:4], percent(bound.upper), *lines[-1][5:])
    lines.append(("all", *_cells(found.outcomes), *_gain(found.outcomes), *_cost(found.outcomes), "100.0"))
    return align(lines, left=1)


def _cells(outcomes: Sequence[Outcome]) -> tuple[str, str, str, str]:
    own = math.fsum(one.useful for one in outcomes) / len(outcomes) if outcomes else None
    return str(len(outcomes)), str(sum(one.kept for one in outcomes)), percent(own), "-"


def _gain(outcomes: Sequence[Outcome]) -> tuple[str, str]:
    found = mean_interval(one.gain for one in outcomes if one.gain is not None)
    if found is None:
        return "-", "-"
    mean, half = found
    return f"{mean:+.3g}", "-" if math.isnan(half) else f"{mean - half:+.2g}..{mean + half:+.2g}"


def _cost(outcomes: Sequence[Outcome]) -> tuple[str, str]:
    kept = sum(one.kept for one in outcomes)
    if not kept:
        return "-", "-"
    seconds = [one.seconds for one in outcomes if one.seconds is not None]
    each = math.fsum(seconds) / len(seconds) if seconds else None
    return f"{len(outcomes) / kept:.1f}", "-" if each is None else f"{each * len(outcomes) / kept:.2g}"
