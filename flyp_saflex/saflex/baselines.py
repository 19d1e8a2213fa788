"""What SAFLEX is compared with: smoothing by strength, Mixup, CutMix and plain in-batch filters (floor 2: tensors only).

The filters return weights_A in {0, 1} and so take the place of SAFLEX's weights; mixing returns soft labels and so can be
an upstream of SAFLEX as well. Whatever is random takes a `torch.Generator`.

Shapes: N or A rows, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flyp_saflex.errors import ConfigError


def smooth_by_strength(
    upstream_A: Tensor, strength_A: Tensor, num_classes: int, alpha: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return labels smoothed by how strongly the row was augmented (Soft-Augmentation's idea).

    The upstream class gets p = 1 - alpha(strength), every other class alpha / (K - 1).

    Args:
        upstream_A: class indices.
        strength_A: 0 (untouched) .. 1 (strongest).
        num_classes: K, at least 2.
        alpha: smoothing per strength, clamped to 0 .. 1; None: `smoothing_curve`.

    Raises:
        ConfigError: fewer than two classes, which leaves no other class to smooth towards.
    """
    if num_classes < 2:
        raise ConfigError(f"label smoothing needs at least 2 classes, found {num_classes}: add a class or do not smooth")
    alpha_A1 = (alpha or smoothing_curve)(strength_A).clamp(0, 1)[:, None]
    onehot_AK = F.one_hot(upstream_A, num_classes).to(alpha_A1.dtype)
    return onehot_AK * (1 - alpha_A1) + (1 - onehot_AK) * alpha_A1 / (num_classes - 1)


def smoothing_curve(strength_A: Tensor, lowest_confidence: float = 0.5, power: float = 2.0) -> Tensor:
    """Return alpha = (1 - lowest_confidence) * strength ** power: weak augmentations leave the label alone (not tuned)."""
    return (1 - lowest_confidence) * strength_A.clamp(0, 1) ** power


def draw_mix(num_rows: int, alpha: float, generator: torch.Generator) -> tuple[float, Tensor]:
    """Return a lambda from Beta(alpha, alpha) and a random partner for every row.

    Raises:
        ConfigError: alpha is not above 0.
    """
    if not alpha > 0:
        raise ConfigError(f"mixing needs alpha above 0, found {alpha}: use 0.2 (Mixup) or 1 (CutMix), or leave mixing out")
    # torch draws no Beta with a generator; numpy does, seeded from it.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    partner_N = torch.randperm(num_rows, generator=generator, device=generator.device)
    return float(np.random.default_rng(seed).beta(alpha, alpha)), partner_N


def mixup(images_NCHW: Tensor, labels_NK: Tensor, lam: float, partner_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return lam * row + (1 - lam) * partner, of images and of labels."""
    return (
        lam * images_NCHW + (1 - lam) * images_NCHW[partner_N],
        lam * labels_NK + (1 - lam) * labels_NK[partner_N],
    )


def cutmix(
    images_NCHW: Tensor, labels_NK: Tensor, lam: float, partner_N: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return images with one box of area about 1 - lam taken from the partner, labels mixed by the exact area.

    The box has the image's proportions and a uniform centre and is cut off at the border, so its area can be smaller than
    1 - lam; the labels use what was really pasted.
    """
    height, width = images_NCHW.shape[-2:]
    box_height, box_width = round(height * math.sqrt(1 - lam)), round(width * math.sqrt(1 - lam))
    y, x = (int(torch.randint(size, (), generator=generator, device=generator.device)) for size in (height, width))
    top, left = max(y - box_height // 2, 0), max(x - box_width // 2, 0)
    bottom, right = min(y - box_height // 2 + box_height, height), min(x - box_width // 2 + box_width, width)
    mixed_NCHW = images_NCHW.clone()
    mixed_NCHW[..., top:bottom, left:right] = images_NCHW[partner_N][..., top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed_NCHW, kept * labels_NK + (1 - kept) * labels_NK[partner_N]


def keep_where_argmax_agrees(logits_AK: Tensor, upstream_A: Tensor) -> Tensor:
    """Return weight 1 where the model's own class is the label that the row came with, else 0 (NaN rows: 0)."""
    agrees_A = (logits_AK.argmax(dim=1) == upstream_A) & ~logits_AK.isnan().any(dim=1)
    return agrees_A.to(torch.float32)


def keep_lowest_losses(losses_A: Tensor, fraction: float) -> Tensor:
    """Return weight 1 for the `fraction` of rows with the lowest losses; NaN losses count as the highest.

    Raises:
        ConfigError: the fraction is not in 0 .. 1.
    """
    return _keep_first(losses_A.nan_to_num(nan=torch.inf).argsort(stable=True), fraction)


def keep_at_random(num_rows: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Return weight 1 for a random `fraction` of rows, on the generator's device.

    Raises:
        ConfigError: the fraction is not in 0 .. 1.
    """
    return _keep_first(torch.randperm(num_rows, generator=generator, device=generator.device), fraction)


def permuted_gains(gains_AK: Tensor, upstream_AK: Tensor, ids_A: Tensor) -> Tensor:
    """Return gains in which every row has those of another row, its own label's place included: a control.

    The gains of the rows' own labels are the same numbers as before, on other rows; only what they say about a row is gone.
    The permutation is drawn from the identities, so it does not depend on how rows are shared among processes.

    Args:
        gains_AK: of every row of the step.
        upstream_AK: labels that the rows came with, on the simplex.
        ids_A: identity of every row, whole numbers.
    """
    generator = torch.Generator().manual_seed(int(ids_A.sum()))
    drawn_A = torch.randperm(len(ids_A), generator=generator).to(ids_A.device)
    order_A = ids_A.argsort(stable=True)
    source_A = torch.empty_like(order_A).index_copy(0, order_A[drawn_A], order_A[drawn_A.roll(1)])  # a cycle: no row is its own
    own_A1, theirs_A1 = upstream_AK.argmax(dim=1)[:, None], upstream_AK.argmax(dim=1)[source_A][:, None]
    moved_AK = gains_AK[source_A]
    own_gain_A1, their_gain_A1 = moved_AK.gather(1, own_A1), moved_AK.gather(1, theirs_A1)
    return moved_AK.scatter(1, theirs_A1, own_gain_A1).scatter(1, own_A1, their_gain_A1)


def _keep_first(order_A: Tensor, fraction: float) -> Tensor:
    if not 0 <= fraction <= 1:
        raise ConfigError(f"augment.keep_fraction = {fraction}: expected a fraction from 0 to 1")
    weights_A = torch.zeros(len(order_A), device=order_A.device)
    weights_A[order_A[: round(fraction * len(order_A))]] = 1.0
    return weights_A
