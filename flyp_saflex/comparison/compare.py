"""`flyp-saflex compare`: every condition with every seed, a report, and a verdict on edits and on SAFLEX.

    OUT/compare.toml      the recipe            OUT/report.html, report.md    tables, plots, gallery
    OUT/runs/             ordinary run folders  OUT/verdict.txt               the answers, printed as well
    OUT/logs/             messages of the runs

What is finished is skipped and what was interrupted goes on, so the same command continues after any stop. Jobs of an array
take shares of the runs; the one that finds all of them finished writes the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from accelerate.state import PartialState

from flyp_saflex import recipe
from flyp_saflex.comparison import estimate
from flyp_saflex.comparison.conditions import (
    Condition,
    baseline_of,
    conditions_of,
    differing_by_seed,
    forget_datasets,
    notes,
    splits_of,
)
from flyp_saflex.comparison.runs import PlannedRun, check_splits, check_study, is_done, is_finished, outcome, plan
from flyp_saflex.comparison.verdict import verdict
from flyp_saflex.config import Config
from flyp_saflex.data.registry import split_for
from flyp_saflex.errors import DataError, RunError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.reporting.report import report
from flyp_saflex.reporting.runs import Preface
from flyp_saflex.runtime import process_state
from flyp_saflex.storage.files import atomic_write
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.train import train


def compare(
    config: Config,
    out: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    limit: int | None = None,
    dry_run: bool = False,
    conclude: bool = True,
) -> list[str]:
    """Run what is left of a comparison, and once all of it is finished write the report and the verdict.

    Args:
        config: the recipe; `[compare]` holds conditions and seeds.
        out: folder of the comparison.
        shard: (i, n): take every n-th unit of runs, from the i-th.
        limit: at most this many images of each split, in all runs: a quick look.
        dry_run: check everything, print runs, steps, hours and disk, write nothing.
        conclude: False: leave report and verdict to a later call with more conditions.

    Returns:
        The verdict's paragraphs; empty after a dry run, and while other jobs have runs to finish.

    Raises:
        UserError: bad input, before anything is run; or a run that had to stop.
        KeyboardInterrupt: after Ctrl-C, once the state of the run is saved.
    """
    state = process_state(config.train.process_timeout_s)
    forget_datasets()
    conditions = conditions_of(config)
    units = plan(config, conditions, out)
    everything = [run for unit in units for run in unit]
    for run in everything:
        check_study(run, config, limit)
    for condition in conditions:
        check_splits(splits_of(condition.config(config, config.compare.seeds[0])), config.compare)
    finished = [run for run in everything if is_finished(run, config)]
    ours = [run for unit in units[shard[0] :: shard[1]] for run in unit]
    pending = [run for run in ours if run not in finished]
    state.wait_for_everyone()  # before one of them writes what the others check
    for note in notes(conditions, config) if state.is_main_process else ():
        print(f"note: {note}")
    needed = estimate.disk_bytes(config, pending, limit)
    if dry_run:
        _tell_plan(config, conditions, everything, ours, pending, finished, limit, needed, out, state)
        return []
    estimate.check_disk(out, needed)
    if state.is_main_process:
        _write(out / "compare.toml", recipe.dumps(config))
    for number, run in enumerate(pending, start=1):
        if state.is_main_process:
            print(f"run {number} of {len(pending)}: {run.label}", flush=True)
        _run(run, config, out, limit, state)
    left = [run for run in everything if not is_finished(run, config)]
    state.wait_for_everyone()
    if not state.is_main_process or not conclude:
        return []
    if left:
        print(f"{len(everything) - len(left)} of {len(everything)} runs are finished: the job that finishes the last one reports")
        return []
    return _conclude(config, conditions, everything, out)


def _run(run: PlannedRun, base: Config, out: Path, limit: int | None, state: PartialState) -> None:
    """Train and evaluate one run, from where it stands."""
    check_study(run, base, limit)  # again: by now the kept share is known
    config = run.config(base)
    trained, started = is_done(run.path), (run.path / "config.toml").is_file()
    state.wait_for_everyone()
    with _printing_to(out / "logs" / f"{run.path.name}.log", state):
        if not trained:
            train(config, run.path, resume=started, limit=limit)
        untrained = estimate.load_of(config, limit).steps == 0
        evaluate(run.path, wise_alphas=(1.0,) if untrained else None, limit=limit)
    state.wait_for_everyone()
    if state.is_main_process:
        _remove_large(run.path, base.compare.keep)
    state.wait_for_everyone()


def _remove_large(run: Path, keep: str) -> None:
    """Remove what a finished, evaluated run no longer needs."""
    for name in {"results": ("checkpoints", "model"), "models": ("checkpoints",), "all": ()}[keep]:
        shutil.rmtree(run / name, ignore_errors=True)


def _conclude(config: Config, conditions: Sequence[Condition], runs: Sequence[PlannedRun], out: Path) -> list[str]:
    """Write the verdict and the reports, print the verdict, and return its paragraphs."""
    options = config.compare
    first = next((one for one in conditions if one.role != "validation-trained"), conditions[0])
    run = first.config(config, options.seeds[0])
    data = splits_of(run)
    select = _select_split(run)
    by_name = {condition.name: [run for run in runs if run.condition == condition] for condition in conditions}
    outcomes = [outcome(condition, by_name[condition.name], options, select) for condition in conditions]
    judged = [split for split in data.splits.values() if split.role == "test"]
    judged = [split for split in judged if split.shift == "ood"] or judged
    where = options.split or f"{'mean of ' if len(judged) > 1 else ''}{', '.join(split.name for split in judged)}"
    paragraphs = verdict(outcomes, measure=where, select=select or "the select splits")
    _write(out / "verdict.txt", "\n".join(paragraphs) + "\n")
    ordered = [run.path for same in by_name.values() for run in same]
    preface = Preface(tuple(paragraphs), differing_by_seed(conditions))
    for name in ("report.md", "report.html"):
        report(ordered, out=out / name, baseline=baseline_of(conditions, options), preface=preface)
    print("\n" + "\n".join(paragraphs))
    return paragraphs


def _select_split(config: Config) -> str:
    """Return the name of the split that picks conditions, or nothing: then all select splits do."""
    try:
        return split_for(splits_of(config), config.train.select_split, "select").name if config.train.select_split else ""
    except DataError:
        return ""


def _tell_plan(
    config: Config,
    conditions: Sequence[Condition],
    everything: Sequence[PlannedRun],
    ours: Sequence[PlannedRun],
    pending: Sequence[PlannedRun],
    finished: Sequence[PlannedRun],
    limit: int | None,
    needed: int,
    out: Path,
    state: PartialState,
) -> None:
    """Print the table of runs and the estimates."""
    expected, source = estimate.hours(config, pending, finished, limit)
    if not state.is_main_process:
        return
    print(estimate.table(config, conditions, everything, finished, limit))
    total = len(everything)
    share = f", {len(ours)} of them in this shard" if len(ours) < total else ""
    print(f"{total} runs{share}; {len(pending)} to do, about {_duration(expected)} one after another (from {source})")
    free = estimate.free_bytes(out)
    print(f"disk: about {estimate.size_text(needed)} needed, {estimate.size_text(free)} free in {out}")
    if free < needed:
        print("note: that is not enough: choose another --run-dir, or keep less (compare.keep=results)")
    print("dry run: all checks passed")


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(60 * hours, 0.1):.1f} minutes"


def _write(path: Path, text: str) -> None:
    with RunDir(path.parent, lock=False), atomic_write(path) as file:
        file.write(text)


@contextmanager
def _printing_to(log: Path, state: PartialState) -> Iterator[None]:
    """Append what the main process prints to a file; progress bars stay on the terminal."""
    if not state.is_main_process:
        yield
        return
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = open(log, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise RunError(f"{log} cannot be written: {error.strerror}; free disk space or choose another --run-dir") from error
    with file, redirect_stdout(file):
        yield
