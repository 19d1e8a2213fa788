"""Optimisers by the names of `train.optimizer`."""

from __future__ import annotations

from typing import Any

import torch

from flyp_saflex.config import TrainConfig


def optimizer_of(groups: list[dict[str, Any]], options: TrainConfig) -> torch.optim.Optimizer:
    """Return the recipe's optimiser.

    Args:
        groups: parameter groups of the task.
        options: the recipe's `[train]` section.
    """
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=options.momentum, nesterov=options.momentum > 0, fused=True)
    # fused: on a CPU nine times as fast as one operation after another
    return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=True)
