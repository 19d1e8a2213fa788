"""Task of a finished run: check that its files are there, load it, with its data or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flyp_saflex import recipe as recipe_module
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError, RunError, UserError
from flyp_saflex.evaluation.weight_averaging import WeightAverage
from flyp_saflex.records import Dataset
from flyp_saflex.storage.data_record import other_data, read_record, record_of
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tables import METHODS, TASKS
from flyp_saflex.tasks.clip_task import ClipTask
from flyp_saflex.tasks.task import Task, TaskInputs


def load_run(run: Path, config: Config, dataset: Dataset, *, device: torch.device | str = "cpu") -> Task:
    """Load the model of a run.

    Raises:
        ModelError: weights that cannot be had.
        RunError: weights that do not fit the dataset or the method.
    """
    task = TASKS[METHODS[config.train.method].task].build(TaskInputs(config=config, dataset=dataset, run=run, device=device))
    task.network.to(device)
    return task


def check_model(folder: RunDir, config: Config) -> None:
    """Check that the run's model is there.

    Raises:
        RunError: it is not; says how to go on.
    """
    for name in TASKS[METHODS[config.train.method].task].files:
        if not (folder.path / name).is_file():
            raise RunError(
                f"run {folder.path} has no {name}: its training has not finished; go on with "
                f"`flyp-saflex train {folder.path / 'config.toml'} --run-dir {folder.path} --resume`"
            )


def check_folder(run: Path) -> None:
    """Check that a run's folder is there.

    Raises:
        RunError: it is not.
    """
    if not run.is_dir():
        raise RunError(f"run folder {run}: there is no such folder; give the folder that `flyp-saflex train` wrote")


def open_run(run: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the recipe of a finished run whose model is there.

    Args:
        run: folder that `train` wrote.
        overrides: `section.field=value`, applied to its recipe.

    Raises:
        RunError: no such folder, no run, or a run without a model.
        ConfigError: an override that no recipe takes.
    """
    check_folder(run)
    with RunDir(run, lock=False) as folder:
        config = folder.read_config()
        if overrides:
            config = recipe_module.load(str(run / "config.toml"), overrides)
        check_model(folder, config)
    return config


def own_data(run: Path, config: Config) -> tuple[Dataset | None, str]:
    """Return the run's own data where it is there, else None and the reason in words.

    Args:
        run: its folder.
        config: its recipe, perhaps with another `data.root`.

    Raises:
        RunError: its record of the data is damaged.
    """
    known = read_record(run)
    try:
        dataset = load_dataset(config.data, seed=config.seed)
    except UserError as error:
        return None, f"the run's data is not there: {error}"
    if known is not None and (changed := other_data(known, record_of(dataset), (), sizes=False)):
        return None, f"the data there is not the run's ({changed})"
    return dataset, ""


def classes_of(run: Path, dataset: Dataset | None, reason: str) -> Dataset:
    """Return the run's data, or where it is not there its classes and templates without any image.

    Args:
        run: its folder.
        dataset: its data; None: it is not there.
        reason: why it is not there.

    Raises:
        RunError: neither the data nor a record of it is there.
    """
    if dataset is not None:
        return dataset
    known = read_record(run)
    if known is None:
        raise RunError(
            f"run {run} has no data.json (a run of an older version), so its classes are only known from its data: {reason}"
        )
    return Dataset(
        name=known.name, root=Path(), class_names=known.class_names, splits={}, templates=known.templates, notes=(reason,)
    )


def load_clip_run(
    run: Path, config: Config, dataset: Dataset, *, alpha: float = 1.0, device: torch.device | str = "cpu"
) -> ClipTask:
    """Load the CLIP model of a run, with WiSE-FT's weights of an alpha in place.

    Args:
        run: its folder.
        config: its recipe.
        dataset: its classes and templates.
        alpha: 0 (pretrained) .. 1 (finetuned).
        device: where the model goes.

    Raises:
        RunError: the run's model takes no images, or does not fit.
        ConfigError: an alpha below 1 of a run that started from random weights.
        ModelError: weights that cannot be had.
    """
    kind = TASKS[METHODS[config.train.method].task]
    if not issubclass(kind, ClipTask):
        raise RunError(f"run {run}: train.method = {config.train.method} has no CLIP model, which this command needs")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"--wise-alpha {alpha:g}: expected a number from 0 to 1")
    task = load_run(run, config, dataset, device=device)
    assert isinstance(task, ClipTask)
    if alpha != 1:
        WeightAverage(task, task.initial_state()).variant(alpha)()
    return task
