"""MLP as a task: rows of numbers, such as encoded tables, to classes (`train.method = "mlp"`).

Blocks of linear layer, ReLU and dropout with a linear head: the MLP of "Revisiting deep learning models for tabular data"
(arXiv 2106.11959).

Shapes: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.network_options import NetworkConfig
from flyp_saflex.records import Dataset
from flyp_saflex.tasks.clip_options import notes_without_clip
from flyp_saflex.tasks.network import Network
from flyp_saflex.tasks.task import Task, TaskInputs, read_tensors

ENCODING = "encoding.safetensors"
"""Mean and standard deviation of every feature over the training rows: evidence that other data is encoded alike."""


class MlpTask(Task):
    """MLP on rows of numbers."""

    files = (*Task.files, f"model/{ENCODING}")

    @classmethod
    def build(cls, inputs: TaskInputs) -> MlpTask:
        """Return a new MLP, or that of a run.

        Raises:
            ConfigError: the dataset's samples are no rows of numbers.
            RunError: the run's features were encoded otherwise.
        """
        rows, options = inputs.dataset.rows, inputs.config.network
        width = _num_features(rows, inputs.config.data.name)
        task = cls(Network(trunk_of(width, options), head=_head(width, options, inputs.dataset)), inputs.dataset)
        if inputs.run is not None:
            task._check_encoding(inputs.run / "model" / ENCODING)
            task.load_weights(inputs.run)
        task.notes += notes_without_clip(inputs.config.train)
        task.network.to(inputs.device)
        return task

    def save(self, model: Path, run: Path) -> None:
        """Write the weights, and how the training rows were encoded."""
        from safetensors.torch import save_file

        super().save(model, run)
        save_file(self._encoding(), model / ENCODING)

    def _encoding(self) -> dict[str, Tensor]:
        whole = (self.dataset.whole or self.dataset.splits)["train"]
        rows_NF = np.stack([np.asarray(self.dataset.rows[sample.item]) for sample in whole.samples])
        return {"mean": torch.from_numpy(rows_NF.mean(axis=0)), "std": torch.from_numpy(rows_NF.std(axis=0))}

    def _check_encoding(self, path: Path) -> None:
        stored, found = read_tensors(path, "train again"), self._encoding()
        same = all(
            name in stored and stored[name].shape == value.shape and torch.allclose(stored[name], value, atol=1e-4)
            for name, value in found.items()
        )
        if not same:
            raise RunError(
                f"{path} is of other training rows: {len(stored.get('mean', ()))} features, here {len(found['mean'])}, which are "
                "imputed, scaled and encoded by the training rows: evaluate on the data, card and data.split_seed of the run"
            )


def trunk_of(width: int, options: NetworkConfig) -> nn.Sequential:
    """Return the hidden layers.

    Args:
        width: F.
        options: `hidden` and `dropout`.
    """
    blocks: list[nn.Module] = []
    for wide in options.hidden:
        blocks += [nn.Linear(width, wide), nn.ReLU(), *([nn.Dropout(options.dropout)] if options.dropout else [])]
        width = wide
    return nn.Sequential(*blocks)


def _head(width: int, options: NetworkConfig, dataset: Dataset) -> nn.Linear:
    return nn.Linear(options.hidden[-1] if options.hidden else width, dataset.num_classes)


def _num_features(rows: Sequence[Any] | None, name: str) -> int:
    if rows is None or not len(rows) or np.ndim(rows[0]) != 1:
        raise ConfigError(
            f"train.method = mlp takes rows of numbers, but data.name = {name} has images: use image-classifier or a CLIP method"
        )
    return len(rows[0])
