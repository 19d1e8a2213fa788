"""Runs of one condition: whether they are seeds of one experiment, on the same data and with the same options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flyp_saflex import recipe as recipe_module
from flyp_saflex.config import Config
from flyp_saflex.errors import RunError, UserError
from flyp_saflex.storage.data_record import DataRecord, difference, read_record
from flyp_saflex.storage.results import results_on_other_data

PATHS = ("data.root", "data.prompts", "data.table", "data.materialised", "cache.root", "train.frozen_cache")
"""Options that are paths: they may differ between seeds of one experiment."""


def seed_notes(results: dict[Path, dict[str, Any]], baseline: str, by_seed: Sequence[str] = ()) -> list[str]:
    """Return remarks on runs that are no seeds of one experiment, or not on the data of the baseline.

    Args:
        results: results.json by run folder.
        baseline: recipe that the other ones are compared with.
        by_seed: options that are meant to differ between the seeds of a condition.

    Raises:
        RunError: two runs of one recipe are on different images or classes: no mean of them is told.
    """
    groups: dict[str, list[Path]] = {}
    for run, result in results.items():
        groups.setdefault(str(result["recipe"]), []).append(run)
    records = {run: read_record(run) for run in results}
    lines = [
        f"{run}: results on other data are not shown ({', '.join(found)})"
        for run in results
        if (found := results_on_other_data(run))
    ]
    for recipe, runs in groups.items():
        if not any(option.startswith("data.") for option in by_seed):
            lines += _same_data(recipe, runs, records)
        lines += _same_options(runs, by_seed)
    reference = _known(groups[baseline], records)
    for runs in (runs for recipe, runs in groups.items() if recipe != baseline):
        other = _known(runs, records)
        if reference is None or other is None:
            continue
        old, new = reference[1], other[1]
        tests = [name for name, split in new.splits.items() if name in old.splits and split.role != "train"]
        if changed := difference(old, new, tests):
            lines.append(
                f"{other[0]} and {reference[0]} are on other data ({changed}): their difference is not one of methods alone"
            )
    return lines


def _known(runs: Iterable[Path], records: dict[Path, DataRecord | None]) -> tuple[Path, DataRecord] | None:
    """Return the first run that has a record of its data."""
    return next(((run, record) for run in runs if (record := records[run]) is not None), None)


def _same_data(recipe: str, runs: Sequence[Path], records: dict[Path, DataRecord | None]) -> list[str]:
    lines = []
    first = _known(runs, records)
    for run in runs:
        record = records[run]
        if first is None or record is None or not (changed := difference(first[1], record)):
            continue
        if (record.class_names, record.images) != (first[1].class_names, first[1].images):
            raise RunError(
                f"{first[0]} and {run} are both recipe '{recipe}' but on other data ({changed}), so they are no seeds of one "
                f"condition: report them apart, or tell them apart by name when training (--set recipe={recipe}-variant)"
            )
        lines.append(f"{run} is not on the data of {first[0]}: {changed}")
    unknown = [run for run in runs if records[run] is None]
    if unknown and len(runs) > 1:
        lines.append(
            f"{unknown[0]}{' and others have' if len(unknown) > 1 else ' has'} no data.json: whether the seeds of {recipe} "
            "are on the same data is not known"
        )
    return lines


def _same_options(runs: Sequence[Path], by_seed: Sequence[str]) -> list[str]:
    """Return a remark per run that differs in options from the first of its recipe."""
    if len(runs) < 2:
        return []
    lines = []
    configs = {run: _config(run) for run in runs}
    first = runs[0]
    for run in runs[1:]:
        old, new = configs[first], configs[run]
        if old is not None and new is not None and (changed := differing(old, new, by_seed)):
            lines.append(f"{run} is not another seed of {first}, its options differ: {'; '.join(changed)}")
    return lines


def differing(old: Config, new: Config, by_seed: Sequence[str] = ()) -> list[str]:
    """Return the options in which two runs differ, apart from name, seed, paths and `by_seed`."""
    silent = ("recipe:", "seed:", *(f"{name}:" for name in (*PATHS, *by_seed)))
    return [line for line in recipe_module.differences(old, new) if not line.startswith(silent)]


def _config(run: Path) -> Config | None:
    """Return a run's recipe; None where it is missing or of another version, which the page tells."""
    try:
        return recipe_module.load(str(run / "config.toml")) if (run / "config.toml").is_file() else None
    except (UserError, OSError, ValueError):
        return None
