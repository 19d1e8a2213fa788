"""Logits of images under one model or many, every image decoded once.

A `Variant` puts its weights in place and returns a predictor, so that `predict` can run a whole WiSE-FT sweep, or the models of a
hundred runs, over the same decoded images.

Shapes: B images of a batch, N of a split, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from flyp_saflex.records import Split
from flyp_saflex.tasks.task import Loader, Predictor

Variant = Callable[[], Predictor]
Batches = Iterable[tuple[Any, Tensor]]


def predict(variants: Sequence[Variant], batches: Batches, *, rows_at_once: int = 1024) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of every variant, reading the batches once.

    Batches are collected until they hold `rows_at_once` images; then every variant in turn gets its weights in place
    and runs over them. With a single variant nothing is collected.

    Args:
        variants: at least one; called once per collection.
        batches: pairs of positions (integers) and images `[B, C, H, W]`.
        rows_at_once: decoded images held in memory (1024 images of 224 px are 600 MB).

    Returns:
        Positions `[N]` in the order of the batches, and one float32 `[N, K]` on the CPU per variant. Without any batch
        both are empty (K = 0).
    """
    assert variants, "nothing to predict with"
    positions: list[int] = []
    logits: list[list[Tensor]] = [[] for _ in variants]
    fixed = variants[0]() if len(variants) == 1 else None
    waiting: list[Tensor] = []

    def run() -> None:
        for parts, variant in zip(logits, variants, strict=True):
            predictor = fixed or variant()
            parts.extend(predictor(images_BCHW).float().cpu() for images_BCHW in waiting)
        waiting.clear()

    for batch_positions, images_BCHW in batches:
        positions.extend(int(position) for position in batch_positions)
        waiting.append(images_BCHW)
        if fixed or sum(len(images) for images in waiting) >= rows_at_once:
            run()
    if waiting:
        run()
    return torch.tensor(positions, dtype=torch.long), [torch.cat(parts) if parts else torch.empty(0, 0) for parts in logits]


def predict_split(
    variants: Sequence[Variant], split: Split, loader: Loader, *, state: PartialState | None = None
) -> tuple[NDArray[np.int64], list[NDArray[np.float32]]]:
    """Return the logits of every variant on a split whose batches are shared among processes.

    A batch holds the same images for every number of processes, so that no digit depends on it.

    Args:
        variants: at least one.
        split: the images.
        loader: reads them.
        state: accelerate's state; None: this process reads all of them.

    Returns:
        Positions `[N]` in the split, ascending, and one float32 `[N, K]` per variant; the same on every process.

    Raises:
        DataError: too many unreadable images in the whole split.
    """
    rank, world = (state.process_index, state.num_processes) if state is not None else (0, 1)
    share = [position for position in range(len(split)) if position // loader.batch_size % world == rank]
    batches = loader.batches([split.samples[position] for position in share], num_in_all=len(split))
    positions, logits = predict(variants, batches)
    positions_N = np.array(share, dtype=np.int64)[positions.numpy()]
    arrays = [part.numpy() for part in logits]
    if world > 1:
        gathered = gather_object([(positions_N, arrays)])
        parts = [part for part in gathered if len(part[0])] or gathered[:1]
        positions_N = np.concatenate([part[0] for part in parts])
        arrays = [np.concatenate([part[1][v] for part in parts]) for v in range(len(variants))]
        loader.check_unreadable(len(split) - len(positions_N), len(split))
    order_N = np.argsort(positions_N)
    return positions_N[order_N], [array[order_N] for array in arrays]
