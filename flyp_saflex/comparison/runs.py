"""Runs of a comparison: folders, shares of job arrays, states, and numbers read back.

A run is an ordinary run folder, OUT/runs/<condition>-seed<N>.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flyp_saflex import recipe
from flyp_saflex.comparing import CompareConfig
from flyp_saflex.comparison.conditions import Condition, data_of, saflex_for, splits_of
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, RunError, nearest
from flyp_saflex.records import Dataset
from flyp_saflex.storage.data_record import difference, read_record
from flyp_saflex.storage.files import read_mapping
from flyp_saflex.storage.results import read_results
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.checkpoint import MAY_CHANGE, limit_of

NO_MATTER = (*MAY_CHANGE, "evaluate.batch_size", "evaluate.save_predictions")
"""Options in which a finished run may differ: they change no result."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of the plan.

    Attributes:
        condition, seed: the run's line and pair.
        path: its folder.
        source: the SAFLEX run whose kept share it is trained at; None for most.
    """

    condition: Condition
    seed: int
    path: Path
    source: Path | None

    @property
    def label(self) -> str:
        """Condition and seed in words."""
        return f"{self.condition.name}, seed {self.seed}"

    def config(self, base: Config) -> Config:
        """Return the recipe of the run; its kept share is read from the SAFLEX run that it follows.

        Raises:
            RunError: that run has logged none.
        """
        kept = kept_share(self.source) if self.source is not None and is_done(self.source) else None
        return self.condition.config(base, self.seed, kept)


def plan(config: Config, conditions: Sequence[Condition], out: Path) -> list[list[PlannedRun]]:
    """Return units of runs, seed by seed.

    A SAFLEX run and those that need its kept share are one unit; every other run is a unit of its own.
    """
    units = []
    for seed in dict.fromkeys(config.compare.seeds):
        by_name: dict[str, list[PlannedRun]] = {}
        for condition in sorted(conditions, key=lambda condition: condition.needs_kept):
            path = run_path(out, condition, seed)
            if condition.needs_kept:
                leader = saflex_for(condition, conditions)
                by_name[leader.name].append(PlannedRun(condition, seed, path, run_path(out, leader, seed)))
            else:
                by_name[condition.name] = [PlannedRun(condition, seed, path, None)]
        units += list(by_name.values())
    return units


def run_path(out: Path, condition: Condition, seed: int) -> Path:
    """Return the folder of a run."""
    return out / "runs" / f"{condition.slug}-seed{seed}"


def kept_share(run: Path) -> float:
    """Return the mean part of the augmented rows that a run kept, over its logged steps.

    Raises:
        RunError: none was logged.
    """
    share = RunDir(run, lock=False).kept_share()
    if share is None:
        raise RunError(f"run {run} logged no kept_fraction, which other conditions need: give it steps and augmented rows")
    return share


def check_study(run: PlannedRun, base: Config, limit: int | None) -> None:
    """Check that a run's folder is empty, or holds this very run, finished or not.

    Raises:
        RunError: it holds another one.
    """
    if not (run.path / "config.toml").is_file():
        return
    found = RunDir(run.path, lock=False).read_config()
    changed = [line for line in recipe.differences(found, run.config(base)) if not line.startswith(NO_MATTER)]
    if run.source is not None and not is_done(run.source):
        changed = [line for line in changed if not line.startswith("augment.keep_fraction")]
    if (before := limit_of(run.path)) != limit:
        changed.append(f"--limit: {before} -> {limit}")
    own = read_record(run.path)
    if own is not None and (other := difference(own, data_of(run.config(base)), sizes=False)):
        changed.append(f"data: {other}")
    if changed:
        listed = "; ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
        raise RunError(
            f"run folder {run.path} belongs to another comparison ({listed}): undo the change, or choose another --run-dir"
        )


def is_done(run: Path) -> bool:
    """Return whether a run was trained to its end; makes no folder."""
    return (run / "DONE").is_file()


def is_finished(run: PlannedRun, base: Config) -> bool:
    """Return whether a run is trained, and evaluated on every split that it was not trained on."""
    if not is_done(run.path):
        return False
    try:
        rows = read_results(run.path)["results"]
    except RunError:
        return False
    wanted = {split.name for split in splits_of(run.config(base)).splits.values() if split.role != "train"}
    return wanted <= {row["split"] for row in rows if row["wise_alpha"] == 1}


def check_splits(data: Dataset, options: CompareConfig) -> None:
    """Check that the verdict has a test split to stand on.

    Raises:
        ConfigError: there is none, or the named one is not for tests.
    """
    tests = [split.name for split in data.splits.values() if split.role == "test"]
    if options.split and options.split not in tests:
        raise ConfigError(
            f"compare.split = {options.split} is no test split of '{data.name}'{nearest(options.split, tests)} "
            f"(it has: {', '.join(tests) or 'none'})"
        )
    if not tests:
        raise ConfigError(
            f"'{data.name}' has no test split, so nothing can be compared: set data.test_domains or data.test_fraction"
        )


@dataclass(frozen=True)
class Outcome:
    """Numbers of one condition by seed.

    Attributes:
        condition: the line.
        metric: of the verdict, a name in `METRICS`.
        test: its value on the judged splits.
        select: the same metric on the split that may choose.
        step_seconds: seconds of a training step.
        evidence_seconds: seconds that deciding about edits before training took; only of runs that do so.
        machines: what it was trained on; times of different machines are not compared.
    """

    condition: Condition
    metric: str
    test: dict[int, float]
    select: dict[int, float]
    step_seconds: dict[int, float]
    evidence_seconds: dict[int, float]
    machines: dict[int, str]


def outcome(condition: Condition, runs: Sequence[PlannedRun], options: CompareConfig, select_split: str) -> Outcome:
    """Read the numbers of a condition's finished runs.

    Raises:
        RunError: a run without the metric.
    """
    found = Outcome(condition, options.metric, {}, {}, {}, {}, {})
    for run in runs:
        rows = [row for row in read_results(run.path)["results"] if row["wise_alpha"] == 1]
        found.test[run.seed] = _mean(run, _judged(rows, options.split), options.metric)
        selecting = [row for row in rows if row["role"] == "select"]
        if selecting := [row for row in selecting if row["split"] == select_split] or selecting:
            found.select[run.seed] = _mean(run, selecting, options.metric)
        if (seconds := step_seconds(run.path)) is not None:
            found.step_seconds[run.seed] = seconds
        environment = environment_of(run.path)
        if "evidence_seconds" in environment:
            found.evidence_seconds[run.seed] = float(environment["evidence_seconds"])
        found.machines[run.seed] = f"{environment.get('device')}, {environment.get('processor')}, {environment.get('processes')}"
    return found


def step_seconds(run: Path) -> float | None:
    """Return the mean seconds of a step; None without steps.

    The first logged step is left out: it pays for what is done once.
    """
    logged = [(row["step"], row["seconds"]) for row in RunDir(run, lock=False).read_rows() if row.get("seconds") is not None]
    if not logged:
        return None
    (first, start), (last, end) = logged[0], logged[-1]
    return float((end - start) / (last - first)) if last > first else float(end / last)


def evaluation_seconds(runs: Sequence[Path]) -> float | None:
    """Return the median seconds that evaluation took in finished runs; None without one."""
    totals = [sum(environment_of(run).get("stage_seconds", {}).get("evaluation", {}).values()) for run in runs]
    return statistics.median(totals) if totals else None


def environment_of(run: Path) -> dict[str, Any]:
    """Return a run's env.json, or nothing where it cannot be read."""
    return read_mapping(run / "env.json")


def _judged(rows: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    tests = [row for row in rows if row["role"] == "test"]
    if split:
        return [row for row in tests if row["split"] == split]
    return [row for row in tests if row["shift"] == "ood"] or tests


def _mean(run: PlannedRun, rows: Sequence[dict[str, Any]], metric: str) -> float:
    values = [row.get(metric) for row in rows]
    if not values or None in values:
        raise RunError(f"run {run.path}: its results.json has no {metric} of every split: evaluate it again")
    return math.fsum(map(float, values)) / len(values)  # type: ignore[arg-type]
