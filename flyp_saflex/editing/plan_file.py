"""Plan file: shares of the edits per cell (class x text x level), which `plan` writes and `generate --plan` follows.

    {"dataset", "fingerprint", "settings": {...}, "cells": [{"label", "text", "level", "edits", "useful", "upper", "share"}]}

`settings` are those of the cache entry: texts, seed and how the edits are made. The shares are yours to change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flyp_saflex.editing.allocation import split_budget
from flyp_saflex.editing.choice import check_number, take
from flyp_saflex.editing.plan import CHOICE, Cell, EditPlan
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.records import Dataset, Sample
from flyp_saflex.storage.data_record import record_of
from flyp_saflex.storage.files import write_json
from flyp_saflex.user_text import quoted


class PlannedCell(msgspec.Struct, frozen=True, kw_only=True):
    """One cell: class index, text number, level, edits so far, usefulness, its upper bound, share of the next edits."""

    label: int
    text: int
    level: float | None
    edits: int
    useful: float
    upper: float
    share: float

    @property
    def cell(self) -> Cell:
        """Class, text and level."""
        return self.label, self.text, self.level


class PlanFile(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a plan file."""

    dataset: str
    fingerprint: str
    settings: dict[str, Any]
    cells: tuple[PlannedCell, ...]

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, msgspec.to_builtins(self))

    def check(self, path: Path, dataset: Dataset, stated: Mapping[str, Any]) -> None:
        """Check that the plan was made for this data and for edits of these settings.

        Raises:
            DataError: it was not; says the first difference.
        """
        if self.dataset != dataset.name or self.fingerprint != record_of(dataset).fingerprint:
            raise DataError(
                f"--plan {path} was made for other data (dataset '{quoted(self.dataset)}', fingerprint "
                f"{quoted(self.fingerprint)}): make a plan from a run on this data"
            )
        wanted = loop_settings(msgspec.json.decode(msgspec.json.encode(stated)))
        own = loop_settings(self.settings)
        changed = [name for name in dict.fromkeys([*wanted, *own]) if wanted.get(name) != own.get(name)]
        if changed:
            shown = "other texts" if changed[0] == "texts" else f"{changed[0]}: {own.get(changed[0])} -> {wanted.get(changed[0])}"
            raise DataError(
                f"--plan {path} was made from edits of another recipe ({quoted(shown, 200)}): undo the change, or make a pilot "
                "and a plan with this one"
            )


def read_plan_file(path: Path) -> PlanFile:
    """Read a plan file.

    Raises:
        DataError: it cannot be read, or its shares cannot be followed.
    """
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=PlanFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(
            f"--plan {path} cannot be used ({quoted(str(reason))}): give the file that `flyp-saflex plan RUN` wrote"
        ) from None
    if any(not 0 <= cell.share < 1e9 for cell in plan.cells) or not any(cell.share for cell in plan.cells):
        raise DataError(f"--plan {path}: expected shares of 0 or more, one of them above 0; make the plan again")
    return plan


def loop_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an entry that edits of a pilot, a plan file and all edits have in common."""
    return {name: value for name, value in settings.items() if name not in (*CHOICE, "places", "hard_run", "identity")}


def check_loop(settings: EditorConfig, samples: Sequence[Sample], pilot: int | None, plan_file: Path | None) -> bool:
    """Return whether a pilot or a plan file takes the place of `editor.plan`.

    Raises:
        ConfigError: both are given, `editor.plan` as well, or there are fewer edits than classes.
    """
    if pilot is None and plan_file is None:
        return False
    given = "--pilot" if plan_file is None else "--plan"
    if pilot is not None and plan_file is not None:
        raise ConfigError("--pilot and --plan each say which edits to make: give one of them")
    if settings.plan != "all":
        raise ConfigError(
            f"editor.plan = {settings.plan} and {given} each say which edits to make: set editor.plan=all, or leave {given} out"
        )
    if pilot is not None:
        check_number("--pilot", pilot, samples)
    else:
        check_number("editor.budget", settings.budget, samples)
    return True


def follow(plan: EditPlan, file: PlanFile, budget: int, *, seed: int) -> EditPlan:
    """Return the edits that a plan file chooses, in the order of the plan.

    Args:
        plan: every edit that could be made.
        file: shares per cell.
        budget: number of edits in all.
        seed: seed of the draws.
    """
    cells = plan.cells()
    numbers = split_budget({cell.cell: cell.share for cell in file.cells}, Counter(cells), budget, seed=seed)
    return take(plan, cells, numbers, seed)
