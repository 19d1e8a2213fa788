"""Logits of images under one model or many, every image decoded once (floor 2).

A `Predictor` turns a batch of images into logits. A `Variant` puts its weights in place and returns a predictor, so that
`predict` can run a whole WiSE-FT sweep, or the models of a hundred runs, over the same decoded images.

Shapes: B images of a batch, N of a split, K classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from flyp_saflex.clip.model import ImageTower

Predictor = Callable[[Tensor], Tensor]
Variant = Callable[[], Predictor]
Batches = Iterable[tuple[Any, Tensor]]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Head:
    """What turns image embeddings into logits.

    Attributes:
        weight_KD: one row per class: text embeddings (zero-shot) or a linear head.
        bias_K: bias of a linear head.
        scale: factor of the cosine; the model's `logit_scale`, exponentiated, for a zero-shot head.
    """

    weight_KD: Tensor
    bias_K: Tensor | None = None
    scale: float = 1.0


def logits_over(features_ND: Tensor, head: Head) -> Tensor:
    """Return float32 logits `[N, K]` = scale * features . weight + bias of normalised embeddings."""
    logits_NK = head.scale * features_ND.float() @ head.weight_KD.float().T
    return logits_NK if head.bias_K is None else logits_NK + head.bias_K.float()


def clip_predictor(model: nn.Module, head: Head, *, precision: str = "no", tower: ImageTower | None = None) -> Predictor:
    """Return the predictor of an open_clip model as it is, with a head on the model's device.

    Args:
        model: open_clip model in eval mode.
        head: zero-shot or linear head.
        precision: `no`, `bf16` or `fp16`, of the image tower; logits are always float32.
        tower: the model's image tower, cut; the predictor then takes activations behind the frozen blocks for images.
    """
    device = next(model.parameters()).device
    image_tower = tower or ImageTower(model.visual)  # type: ignore[arg-type]

    @torch.no_grad()
    def predict_batch(images_BCHW: Tensor) -> Tensor:
        with autocast(device, precision):
            features_BD = image_tower(images_BCHW.to(device, non_blocking=True))
        features_BD = normalize(features_BD.float(), dim=-1)
        return logits_over(features_BD, head)

    return predict_batch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision; float32 for `no`, and for `fp16` on a CPU, where it only loses digits."""
    if precision == "no" or (precision == "fp16" and device.type == "cpu"):
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


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
