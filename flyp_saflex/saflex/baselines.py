"""Baselines of SAFLEX: label smoothing by augmentation strength, Mixup, CutMix and in-batch filters.

The filters return weights_A in {0, 1}, in place of SAFLEX's weights. Mixup and CutMix return soft labels, so they can also be
an upstream of SAFLEX. Random functions take a `torch.Generator`.

Shapes: N or A rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flyp_saflex.errors import ConfigError


def smooth_by_strength(
    upstream_A: Tensor, strength_A: Tensor, num_classes: int, alpha: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Smooth upstream labels by the strength of the augmentation (as in Soft Augmentation, arXiv 2211.04625).

    The upstream class gets p = 1 - alpha(strength), every other class alpha(strength) / (K - 1).

    Args:
        upstream_A: class indices.
        strength_A: strength of the augmentation, from 0 (none) to 1 (strongest).
        num_classes: K, at least 2.
        alpha: smoothing as a function of the strength, clamped to 0 .. 1; None: `smoothing_curve`.

    Returns:
        Soft labels [A, K], rows on the simplex.

    Raises:
        ConfigError: fewer than two classes.
    """
    if num_classes < 2:
        raise ConfigError(f"label smoothing needs at least 2 classes, found {num_classes}: add a class or do not smooth")
    alpha_A1 = (alpha or smoothing_curve)(strength_A).clamp(0, 1)[:, None]
    onehot_AK = F.one_hot(upstream_A, num_classes).to(alpha_A1.dtype)
    return onehot_AK * (1 - alpha_A1) + (1 - onehot_AK) * alpha_A1 / (num_classes - 1)


def soft_confidence(visible: float, num_classes: int, power: float) -> float:
    """Return the own class's share of a cropped image's label: p = 1 - (1 - 1/K) (1 - v)^k.

    That is Soft-Augmentation's label (arXiv 2211.04625): 1 for the whole image, chance for none of it.

    Args:
        visible: v, the visible fraction of the image.
        num_classes: K.
        power: k.
    """
    return 1 - (1 - 1 / num_classes) * (1 - visible) ** power


def smoothing_curve(strength_A: Tensor, lowest_confidence: float = 0.5, power: float = 2.0) -> Tensor:
    """Return alpha = (1 - lowest_confidence) * strength ** power: weak augmentations hardly change the label (not tuned)."""
    return (1 - lowest_confidence) * strength_A.clamp(0, 1) ** power


def keep_where_argmax_agrees(logits_AK: Tensor, upstream_A: Tensor) -> Tensor:
    """Return weights_A: 1 where the model predicts the upstream label, else 0; rows with a NaN get 0."""
    agrees_A = (logits_AK.argmax(dim=1) == upstream_A) & ~logits_AK.isnan().any(dim=1)
    return agrees_A.to(torch.float32)


def keep_lowest_losses(losses_A: Tensor, fraction: float) -> Tensor:
    """Return weights_A: 1 for the `fraction` of rows with the lowest losses, else 0; a NaN counts as the highest.

    Raises:
        ConfigError: the fraction is not in 0 .. 1.
    """
    return _keep_first(losses_A.nan_to_num(nan=torch.inf).argsort(stable=True), fraction)


def keep_at_random(num_rows: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Return weights_A: 1 for a random `fraction` of rows, else 0, on the generator's device.

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
