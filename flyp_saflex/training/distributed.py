"""How a step meets the other processes: gathering, and averaging gradients once (floor 3, shared by stages)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flyp_saflex.step.step import Processes


def processes_of(accelerator: Accelerator) -> Processes:
    """Return how the tensors of a step meet: not at all in a single process."""
    if accelerator.num_processes == 1:
        return Processes()
    return Processes(
        gather=accelerator.gather,
        gather_features=lambda features: gather_features(features, accelerator),
        rank=accelerator.process_index,
    )


def gather_features(features_ND: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the features of all processes, with gradient to this one's rows.

    Every process computes the loss of the whole batch. Text features are encoded everywhere, so their gradient is whole on
    each process; image features reach it through their own process only. The local gradient is multiplied by the number
    of processes, so that averaging over processes gives the gradient of a single process for both.
    """
    count = accelerator.num_processes
    scaled_ND = features_ND + (count - 1) * (features_ND - features_ND.detach())
    parts = list(accelerator.gather(features_ND.detach()).chunk(count))
    parts[accelerator.process_index] = scaled_ND
    return torch.cat(parts)


@contextmanager
def synchronised(accelerator: Accelerator, model: Any, *, last: bool) -> Iterator[None]:
    """Average gradients over processes in the last backward pass of a step only."""
    if last:
        yield
    else:
        with accelerator.no_sync(model):
            yield
