"""Task of a finished run: check that its files are there, load it."""

from __future__ import annotations

from pathlib import Path

import torch

from flyp_saflex.config import Config
from flyp_saflex.errors import RunError
from flyp_saflex.records import Dataset
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tables import METHODS, TASKS
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
