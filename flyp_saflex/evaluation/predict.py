"""Logits of images under one model or many, every image decoded once.

A `Variant` puts its weights in place and returns a predictor, so that `predict` can run a whole WiSE-FT sweep, or the models of a
hundred runs, over the same decoded images.

Shapes: B images of a batch, N of a split, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flyp_saflex.tasks.task import Predictor

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
