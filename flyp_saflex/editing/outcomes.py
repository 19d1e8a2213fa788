"""Outcomes of edits in a finished run: kept or dropped, with their gains.

Decisions that evidence made before training (decisions.safetensors, presets such as `posterior`) count as they are. Without
them the log of augmented rows (augmented.jsonl, `train.log_augmented`) gives the share of an edit's steps in which it was kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from flyp_saflex.config import Config
from flyp_saflex.editing.plan import Cell
from flyp_saflex.editing.settings import LEVELS
from flyp_saflex.errors import DataError, RunError
from flyp_saflex.evaluation.load_run import check_folder
from flyp_saflex.evaluation.statistics import summarise
from flyp_saflex.records import Edit
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.augment_cache_files import SETTINGS
from flyp_saflex.storage.data_record import DataRecord, read_record
from flyp_saflex.storage.edit_times import seconds_of_edits
from flyp_saflex.storage.files import read_mapping
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.decisions import recorded_decisions
from flyp_saflex.training.sampling import derived_seed
from flyp_saflex.user_text import quoted


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one edit in a run.

    Attributes:
        cell: class, text and level of the edit.
        kept: whether its weight was above 0, in any step.
        useful: weight under its own class, 0..1; 0 if it was dropped or relabelled.
        gain: mean gain over its steps; None if none was logged.
        seconds: wall time of making it; None if it was not logged.
    """

    cell: Cell
    kept: bool
    useful: float
    gain: float | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RunOutcomes:
    """Outcomes of a run's edits.

    Attributes:
        outcomes: of every edit that the run decided on.
        record: data that the run was trained on.
        settings: of the cache entry (settings.json): the texts, and how the edits were made.
        notes: lines for a person.
    """

    outcomes: tuple[Outcome, ...]
    record: DataRecord
    settings: Mapping[str, Any]
    notes: tuple[str, ...]


def read_outcomes(run: Path) -> RunOutcomes:
    """Read the outcomes of a run's cached edits.

    Raises:
        RunError: no run folder, or a run without a record of augmented rows or of its data.
        DataError: the cache entry is gone, or its edits were not made by `generate`.
    """
    check_folder(run)
    folder = RunDir(run, lock=False)
    config, record = folder.read_config(), read_record(run)
    if "cache" not in config.augment.upstream:
        raise RunError(
            f"run {run} has no augmented rows from a cache (augment.upstream = {list(config.augment.upstream)}): train with "
            "augment.upstream=cache and saflex.enabled=true"
        )
    decided, logged = recorded_decisions(run), _logged(folder)
    if decided is None and not logged:
        raise RunError(
            f"run {run} has no record of its augmented rows: train with saflex.enabled=true, and with train.log_augmented=true "
            "for gains"
        )
    if record is None:
        raise RunError(f"run {run} has no data.json (a run of an older version): train again")
    entry = _entry(config, record)
    settings = read_mapping(entry.folder / SETTINGS)
    if not isinstance(settings.get("texts"), list):
        raise DataError(f"augment cache {entry.folder} has no {SETTINGS}: its edits were not made by `flyp-saflex generate`")
    texts = {
        (label, str(text["text"]).replace("{}", name)): number
        for number, text in reversed(list(enumerate(settings["texts"])))  # of texts alike for a class the first counts
        for label, name in enumerate(record.class_names)
    }
    level_name = next((single for name, single in LEVELS.items() if settings.get(name)), "")
    times = seconds_of_edits(entry.folder)
    outcomes = []
    for edit in entry.edits:
        name, rows = derived_seed(edit.aug_id), logged.get(edit.aug_id, ())
        if (name not in decided.by_name) if decided is not None else not rows:
            continue  # made after the run, filtered, or never drawn
        cell = _cell(edit, texts, level_name, entry.folder)
        gains = [row["gain"] for row in rows if isinstance(row.get("gain"), (int, float))]
        gain = math.fsum(gains) / len(gains) if gains else None
        seconds = times.get(edit.aug_id)
        if decided is not None:
            weight, label = decided.by_name[name]
            outcomes.append(Outcome(cell, weight > 0, weight if label == edit.label else 0.0, gain, seconds))
        else:
            own = [row["weight"] > 0 and row.get("learned_label", edit.label) == edit.label for row in rows]
            outcomes.append(Outcome(cell, any(row["weight"] > 0 for row in rows), sum(own) / len(own), gain, seconds))
    if not outcomes:
        raise DataError(f"augment cache {entry.folder} holds none of the edits that run {run} decided on: restore the entry")
    notes = []
    if decided is not None and not decided.is_calibrated:
        notes.append(
            f"the evidence told nothing about the {len(decided.by_name)} edits of {run}, so all were kept: make a larger pilot"
        )
    return RunOutcomes(outcomes=tuple(outcomes), record=record, settings=settings, notes=tuple(notes))


def mean_interval(values: Iterable[float]) -> tuple[float, float] | None:
    """Return the mean and half the width of its 95 % t-interval (NaN for a single value); None without values."""
    values = list(values)
    if not values:
        return None
    found = summarise(values)
    return found.mean, math.nan if found.error is None else float(stdtrit(found.n - 1, 0.975)) * found.error


def _logged(folder: RunDir) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Return the logged rows of every edit that was weighed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in folder.read_rows("augmented.jsonl"):
        if isinstance(row.get("id"), str) and isinstance(row.get("weight"), (int, float)) and "learned_label" in row:
            found.setdefault(row["id"], []).append(row)
    return dict(found)


def _entry(config: Config, record: DataRecord) -> AugmentCache:
    return AugmentCache.open(Path(config.cache.root), record.name, config.cache.key, record.class_names)


def _cell(edit: Edit, texts: Mapping[tuple[int, str], int], level_name: str, folder: Path) -> Cell:
    """Return class, text and level of an edit.

    Raises:
        DataError: its instruction is none of the entry's texts.
    """
    number = texts.get((edit.label, edit.instruction))
    if number is None:
        raise DataError(
            f"augment cache {folder}: '{edit.aug_id}' has the instruction '{quoted(edit.instruction)}', which is none of "
            f"the texts of {SETTINGS} with the class names of the run: use the data.prompts that the edits were made with"
        )
    level = edit.provenance.get(level_name)
    return edit.label, number, float(level) if isinstance(level, (int, float)) else None
