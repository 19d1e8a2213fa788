"""Estimate of a comparison before it starts: steps, hours, disk.

Times come from finished runs of the same study, else from a few timed steps in a temporary folder.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list

from flyp_saflex.comparison.conditions import Condition, splits_of
from flyp_saflex.comparison.runs import PlannedRun, evaluation_seconds, step_seconds
from flyp_saflex.config import Config
from flyp_saflex.errors import RunError
from flyp_saflex.storage.results import align
from flyp_saflex.tables import METHODS
from flyp_saflex.training.setup import prepare
from flyp_saflex.training.train import train

TIMED_STEPS = 4
BYTES_PER_WEIGHT = 4
STATE_COPIES = 3
"""Weights and AdamW's two moments in a checkpoint."""
SMALL_BYTES = 2 * 2**20
"""Logs, tables and predictions of a run, roughly."""


@dataclass(frozen=True)
class Load:
    """Work of one run.

    Attributes:
        steps: optimiser steps.
        rows: image rows of a step, augmented ones included.
        images: images that are evaluated.
    """

    steps: int
    rows: int
    images: int


def load_of(config: Config, limit: int | None = None) -> Load:
    """Return the work of a run."""
    train_options, data = config.train, splits_of(config)
    sizes = {name: min(len(split), limit or len(split)) for name, split in data.splits.items()}
    steps = train_options.steps or round(train_options.epochs * sizes["train"] / train_options.batch_size)
    steps += sum(train_options.probe_steps for phase in METHODS[train_options.method].phases if phase.steps == "probe_steps")
    augmented = round(config.augment.per_train * train_options.batch_size) if config.augment.upstream else 0
    return Load(steps, train_options.batch_size + augmented, sum(n for name, n in sizes.items() if name != "train"))


def table(
    base: Config,
    conditions: Sequence[Condition],
    everything: Sequence[PlannedRun],
    finished: Sequence[PlannedRun],
    limit: int | None,
) -> str:
    """Return the conditions with role, runs, finished runs, steps and rows per step as text."""
    lines = [("condition", "role", "runs", "finished", "steps", "rows per step")]
    for condition in conditions:
        runs = [run for run in everything if run.condition == condition]
        load = load_of(runs[0].config(base), limit)
        done = sum(run in finished for run in runs)
        lines.append((condition.name, condition.role or "-", str(len(runs)), str(done), str(load.steps), str(load.rows)))
    return align(lines, left=2)


def hours(base: Config, pending: Sequence[PlannedRun], finished: Sequence[PlannedRun], limit: int | None) -> tuple[float, str]:
    """Return the hours of the pending runs one after another, and what the estimate comes from."""
    if not pending:
        return 0.0, "everything is finished"
    known = [
        (seconds / load_of(run.config(base), limit).rows) for run in finished if (seconds := step_seconds(run.path)) is not None
    ]
    source = f"{len(known)} finished runs" if known else f"{TIMED_STEPS} timed steps"
    if not known and base.train.frozen_cache:
        source += " without train.frozen_cache, so at most"
    row_seconds = statistics.median(known) if known else _timed(base, pending, limit)
    evaluated = evaluation_seconds([run.path for run in finished])
    total = 0.0
    for run in pending:
        load = load_of(run.config(base), limit)
        total += load.steps * load.rows * row_seconds
        total += load.images * row_seconds / 3 if evaluated is None else evaluated  # a forward pass is a third of a step
    return total / 3600, source


def disk_bytes(base: Config, pending: Sequence[PlannedRun], limit: int | None) -> int:
    """Return the bytes that the pending runs will take, the checkpoints of the one in progress included."""
    if not pending:
        return 0
    run = pending[0].config(base)
    with redirect_stdout(StringIO()):
        setup = prepare(run, limit=limit)
    weights = BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in setup.task.network.parameters())
    checkpoints = STATE_COPIES * weights * (run.train.keep_checkpoints + 1)  # one more while a new one is written
    kept = {"results": 0, "models": weights, "all": weights + checkpoints}[base.compare.keep]
    return len(pending) * (kept + SMALL_BYTES) + weights + checkpoints


def check_disk(out: Path, needed: int) -> None:
    """Check that the disk has room for the pending runs.

    Raises:
        RunError: it has not.
    """
    free = free_bytes(out)
    if free < needed:
        raise RunError(
            f"--run-dir {out}: the pending runs need about {size_text(needed)}, but {size_text(free)} are free: choose another "
            "disk, or keep less (compare.keep=results)"
        )


def free_bytes(out: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be."""
    folder = out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_text(size: int) -> str:
    """Return bytes in words."""
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"


def _timed(base: Config, pending: Sequence[PlannedRun], limit: int | None) -> float:
    """Return the seconds of one image row of a step: of SAFLEX where it is compared, the dearest."""
    trained = [run for run in pending if load_of(run.config(base), limit).steps]
    if not trained:
        return 0.0
    run = next((run for run in trained if run.condition.role == "saflex"), trained[0])
    config = run.config(base)
    options = replace(
        config.train, steps=TIMED_STEPS, probe_steps=0, evaluate_every=0, select_split="", patience=0, log_every=1,
        checkpoint_every=0, frozen_cache="", tracker="none",
    )  # fmt: skip
    state = PartialState()
    with tempfile.TemporaryDirectory() as made:
        shared = [made]
        if state.num_processes > 1:
            broadcast_object_list(shared)
        folder = Path(shared[0]) / "timed"
        with redirect_stdout(StringIO()):
            train(replace(config, train=options), folder, limit=limit)
        seconds = step_seconds(folder)
        state.wait_for_everyone()
    assert seconds is not None, "timed steps are logged"
    return seconds / load_of(config, limit).rows
