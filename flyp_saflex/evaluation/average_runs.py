"""`flyp-saflex evaluate RUN RUN ... --average NAME --out DIR`: the average of runs as a run of its own, evaluated.

DIR is a run folder as `train` leaves one (model, config.toml, data.json, env.json, DONE), so that `predict`, `export` and
`report` take it. What was averaged is in its env.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch import Tensor

from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.evaluation.averages import GRID, Average, Finetuned, Lazy, State
from flyp_saflex.evaluation.evaluate import check_start, evaluate, select_split
from flyp_saflex.evaluation.load_run import load_run, open_run
from flyp_saflex.evaluation.metrics import metric_row
from flyp_saflex.evaluation.predict import Variant, predict_split
from flyp_saflex.evaluation.scoring import split_scores
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.records import Dataset
from flyp_saflex.runtime import process_state
from flyp_saflex.storage.data_record import difference, read_record, record_of
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tables import AVERAGES, METHODS, METRICS
from flyp_saflex.tasks.task import Predictor, Task


def evaluate_average(
    runs: Sequence[Path],
    name: str,
    out: Path,
    *,
    splits: Sequence[str] = (),
    wise_alphas: Sequence[float] | None = None,
    overrides: Iterable[str] = (),
    limit: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Average runs, write the average as a run folder, evaluate it, and return what its results.json holds.

    Args:
        runs: run folders that `train` wrote.
        name: of the average, in `tables.AVERAGES`.
        out: new folder.
        splits: names of splits to evaluate; empty: every split that was not trained on.
        wise_alphas: alphas that `wise` and `lines` choose among (None: 0, 0.1, ..., 1); for the others as in `evaluate`.
        overrides: `section.field=value`, applied to the first run's recipe.
        limit: use at most this many images of each split.
        dry_run: run all checks, write nothing.

    Raises:
        ConfigError: an unknown average, or no pretrained weights or select split where it needs them.
        RunError: too few runs, runs of different models, methods or data, or an `out` that holds something.
    """
    average, overrides = AVERAGES[name], tuple(overrides)
    if len(runs) < average.fewest or len({run.resolve() for run in runs}) < len(runs):
        raise RunError(f"--average {name}: found {len(runs)} runs, expected {average.fewest} or more, each once; give others")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"--out {out}: it is not empty, and an average is a run of its own: choose a new folder")
    config = open_run(runs[0], overrides)
    for run in runs[1:]:
        _check_alike(runs[0], config, run, open_run(run))
    if average.needs_start:
        check_start(config, (0.0,))
    dataset = load_dataset(config.data, seed=config.seed, limit=limit)
    chosen_on = select_split(config, dataset, choose=True) if average.chooses else ""
    if average.chooses and not chosen_on:
        raise ConfigError(f"--average {name} chooses on a select split: set evaluate.select_split")
    grid = tuple(sorted(set(wise_alphas or GRID))) if average.has_grid else ()
    state = process_state(config.train.process_timeout_s)
    if dry_run:
        print(f"would average {len(runs)} runs ({name}) into {out}" + (f", chosen on {chosen_on}" if chosen_on else ""))
        return {}
    task, told = _average(runs, config, dataset, average, chosen_on, grid, state)
    if state.is_main_process:
        told = {"average": name, "runs": [str(run) for run in runs]} | ({"split": chosen_on} if chosen_on else {}) | told
        _write(task, out, replace(config, recipe=f"{config.recipe}-{name}"), read_record(runs[0]), dataset, told)
        print(f"{out}: " + ", ".join(f"{key} {value}" for key, value in told.items() if key != "runs"))
    state.wait_for_everyone()
    return evaluate(out, splits=splits, wise_alphas=(1.0,) if average.has_grid else wise_alphas, overrides=overrides, limit=limit)


def _check_alike(first: Path, config: Config, run: Path, other: Config) -> None:
    """Check that two runs have the same architecture, start and data."""
    own, its = METHODS[config.train.method].task, METHODS[other.train.method].task
    pairs = {
        "model.name": (config.model.name, other.model.name),
        "model.pretrained": (config.model.pretrained, other.model.pretrained),
        "the task of train.method": (own, its),
    }
    for what, (one, another) in pairs.items():
        if one != another:
            raise RunError(f"runs to average differ in {what}: {first} has {one}, {run} has {another}; average runs of one start")
    known, found = read_record(first), read_record(run)
    if known is not None and found is not None and (changed := difference(known, found, sizes=False)):
        raise RunError(
            f"runs to average were trained on different data ({changed}, from {first} to {run}): average runs of one dataset"
        )


def _average(
    runs: Sequence[Path],
    config: Config,
    dataset: Dataset,
    average: Average,
    chosen_on: str,
    grid: Sequence[float],
    state: PartialState,
) -> tuple[Task, dict[str, Any]]:
    """Return the task with the average's weights in place, and what is to be told about it."""
    task = load_run(runs[0], config, dataset, device=state.device)
    states = [_state_of(task)]
    for run in runs[1:]:
        states.append(_state_of(load_run(run, config, dataset)))
        _check_shapes(runs[0], states[0], run, states[-1])
    start = task.initial_state() if average.needs_start else None
    if average.needs_start and start is None:
        raise ConfigError(f"train.method = {config.train.method} keeps no weights of its start: use --average soup or greedy")

    def score(candidates: Sequence[Lazy]) -> list[float]:
        split, metric = split_for(dataset, chosen_on, "select"), METRICS[config.train.select_metric]
        images = ImageLoader(
            task.source(config.data, split.samples),
            batch_size=config.evaluate.batch_size,
            workers=config.data.workers,
            max_unreadable=config.data.max_unreadable,
            box_crop=config.data.box_crop,
            progress=state.is_main_process,
        )
        variants = [_variant(task, candidate, config.train.precision) for candidate in candidates]
        positions_N, arrays = predict_split(variants, split, images, state=state)
        rows = [metric_row(split_scores(split, positions_N, logits_NK)) for logits_NK in arrays]
        values = [value for row in rows if (value := row[config.train.select_metric]) is not None]
        if len(values) < len(rows):
            raise ConfigError(f"train.select_metric = {config.train.select_metric} has no value on {chosen_on}: choose another")
        return [value if metric.larger_is_better else -value for value in values]

    found, told = average.combine(Finetuned(states=states, start=start, score=score, grid=grid))
    _put(task, found)
    return task, told


def _variant(task: Task, candidate: Lazy, precision: str) -> Variant:
    computed: list[Any] = []

    def enter() -> Predictor:
        _put(task, candidate(), *computed)
        predictor = task.predictor(precision=precision)
        computed[:] = [task.computed()]  # the zero-shot head depends on the weights, not on the images
        return predictor

    return enter


@torch.no_grad()
def _put(task: Task, state: State, computed: Any = None) -> None:
    """Put weights into the network."""
    for name, tensor in task.network.state_dict().items():
        tensor.copy_(state[name])
    task.weights_changed(computed)


def _state_of(task: Task) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in task.network.state_dict().items()}


def _check_shapes(first: Path, state: State, run: Path, other: State) -> None:
    for name in dict.fromkeys([*state, *other]):
        shapes = [tuple(part[name].shape) if name in part else None for part in (state, other)]
        if shapes[0] != shapes[1]:
            raise RunError(
                f"runs to average have different networks: '{name}' is {shapes[0]} in {first} and {shapes[1]} in {run}"
            )


def _write(task: Task, out: Path, config: Config, record: Any, dataset: Dataset, told: dict[str, Any]) -> None:
    with RunDir(out) as folder:
        task.save(folder.model, out)
        (record or record_of(dataset)).write(out)
        folder.write_environment(averaged=told)
        folder.write_config(config)
        folder.mark_done()
