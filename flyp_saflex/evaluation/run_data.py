"""Comparison of the data to evaluate with the data that a run was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flyp_saflex.config import Config
from flyp_saflex.errors import RunError
from flyp_saflex.records import Dataset
from flyp_saflex.storage.data_record import class_difference, other_data, read_record, record_of
from flyp_saflex.storage.results import free_name
from flyp_saflex.tables import METHODS, TASKS

PLACES = ("data.name=", "data.root=", "data.table=")
"""Overrides that name another place: a run without a record cannot tell whether the same data lies there."""


def compare_data(
    run: Path, config: Config, dataset: Dataset, evaluated: Sequence[str], overrides: Sequence[str] = (), name: str = ""
) -> tuple[list[str], dict[str, Any] | None]:
    """Compare the data to evaluate with the run's own.

    Args:
        run: folder of the run.
        config: its recipe with the overrides.
        dataset: the data to evaluate.
        evaluated: names of the splits to evaluate.
        overrides: `section.field=value`.
        name: of the other data; empty: its folder's.

    Returns:
        Notes for the user, and None for the run's own data, else what `Results` wants to know about other data.

    Raises:
        RunError: other classes than those that the run's linear head stands for.
    """
    own, found = read_record(run), record_of(dataset)
    is_moved = any(override.startswith(PLACES) for override in overrides)
    notes = []
    if own is None:
        notes.append(f"{run} has no data.json (a run of an older version): its classes and data cannot be compared")
        reason = "the run has no record of its own data" if is_moved else ""
    else:
        changed = class_difference(own.class_names, found.class_names)
        if changed and TASKS[METHODS[config.train.method].task].has_fixed_classes:
            raise RunError(
                f"run {run}: its linear head stands for the classes of its training data, and the data here has others "
                f"({changed}): give the classes their former names and order, or evaluate a run of train.method=flyp or ce-text"
            )
        reason = other_data(own, found, evaluated, sizes=is_moved)
        if not reason and (resized := other_data(own, found, evaluated, sizes=True)):
            notes.append(f"{resized} than when the run was started")
        if not reason and own.templates != found.templates:
            notes.append("the caption templates are not those that the run was trained with")
    if not reason:
        return notes, None
    root = Path(config.data.root).resolve().name
    name = free_name(run, name or (root if is_moved and root else found.name), found.fingerprint)
    notes.append(f"other data than the run was trained on ({reason}): results go to results-on-{name}.json beside the run's own")
    return notes, {"on": name, "fingerprint": found.fingerprint, "difference": reason, "overrides": list(overrides)}
