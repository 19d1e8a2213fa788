"""Closed form of SAFLEX, Eq. (10) and (11): weights and soft labels from gains, with weight rules by name.

The linear program of Theorem 1 separates over rows. With `u` the upstream label, `s` the scale of the gains, `tau` the
temperature and `beta` the penalty, its softened solution is

    y_i = softmax((Pi_i / s + beta u_i) / tau)                 Eq. (10); tau -> 0 is the hard solution
    w_i = 1 if the named rule keeps the row, else 0            Eq. (11) is the rule `sum`

Shapes: A augmented rows, K labels (classes, or the distinct captions of the batch).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flyp_saflex.saflex.losses import at_least_float32

ROUNDING = 1e-6
"""Of float32 sums, relative to the sum of magnitudes."""


def keep_all(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """Keep every row, so that only the labels are learned."""
    return torch.ones_like(gains_AK[:, 0])


def keep_upstream(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """Keep rows whose upstream label has a gain >= 0: the linear program with fixed labels (beta -> infinity)."""
    return ((gains_AK * upstream_AK).sum(dim=1) >= 0).to(gains_AK.dtype)


def keep_sum(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """Keep rows for which the uniform label helps, Eq. (11) as printed.

    A sum that is zero up to rounding counts as zero: with f read as probabilities every sum is.
    """
    rounding_A = ROUNDING * gains_AK.abs().sum(dim=1)
    return (gains_AK.sum(dim=1) >= -rounding_A).to(gains_AK.dtype)


def keep_label(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """Keep rows whose learned label helps, as in the paper's main text; with a small tau every row is kept."""
    pull_A = penalty * (labels_AK * upstream_AK).sum(dim=1)
    return ((gains_AK * labels_AK).sum(dim=1) + pull_A >= 0).to(gains_AK.dtype)


def weigh_soft(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """Weigh rows by the gain of their upstream label: w proportional to max(0, Pi_upstream)."""
    return (gains_AK * upstream_AK).sum(dim=1).clamp(min=0)


def soft_labels(
    gains_AK: Tensor, upstream_AK: Tensor, temperature: float, penalty: float, candidates_AK: Tensor | None = None
) -> Tensor:
    """Return softmax((Pi + beta * onehot(upstream)) / tau) per row, Eq. (10) softened.

    For a soft upstream label (Mixup, CutMix) the result is the mean over its classes, weighted by the label, so that
    beta -> infinity returns the upstream label, soft or one-hot.

    Args:
        gains_AK: finite gains, already divided by their scale s.
        upstream_AK: rows on the simplex.
        temperature: tau > 0.
        penalty: beta >= 0, infinity included.
        candidates_AK: labels that a row may take, the restricted linear program; the others get exactly 0. None: all labels.
            Upstream mass on other labels pulls nowhere; a row without any candidate keeps its upstream label.

    Returns:
        Soft labels [A, K], rows on the simplex.
    """
    all_lost_A1 = torch.zeros_like(gains_AK[:, :1], dtype=torch.bool)
    if candidates_AK is not None:
        candidates_AK = candidates_AK | (~candidates_AK.any(dim=1, keepdim=True) & (upstream_AK > 0))
        gains_AK = gains_AK.masked_fill(~candidates_AK, -torch.inf)
        feasible_AK = upstream_AK * candidates_AK
        lost_A1 = (upstream_AK - feasible_AK).sum(dim=1, keepdim=True)
        all_lost_A1 = ~feasible_AK.any(dim=1, keepdim=True)
        upstream_AK = feasible_AK / torch.where(all_lost_A1, torch.ones_like(lost_A1), 1 - lost_A1)
    # With p = softmax(Pi / tau) and b = beta / tau, pulling towards class k moves the share
    # r_k = p_k (e^b - 1) / (1 + p_k (e^b - 1)) = sigmoid(log p_k + log(e^b - 1)) of the mass to it and leaves the rest
    # distributed as p: one softmax serves every k, and no exponential overflows.
    log_probs_AK = (gains_AK / temperature).log_softmax(dim=1)
    b = penalty / temperature
    log_odds_AK = log_probs_AK + (b + math.log(-math.expm1(-b)) if b > 0 else -math.inf)
    if candidates_AK is not None:
        log_odds_AK = log_odds_AK.masked_fill(~candidates_AK, -torch.inf)  # -inf + inf is NaN
    left_A1 = (upstream_AK * torch.sigmoid(-log_odds_AK)).sum(dim=1, keepdim=True)
    left_A1 = torch.where(all_lost_A1, torch.ones_like(left_A1), left_A1)
    return log_probs_AK.exp() * left_A1 + upstream_AK * torch.sigmoid(log_odds_AK)


def renormalise(weights_A: Tensor) -> Tensor:
    """Scale weights to a mean of one over the kept rows (weight > 0); all-zero weights stay zero."""
    total = weights_A.sum()
    scale = (weights_A > 0).sum() / torch.where(total > 0, total, torch.ones_like(total))
    return weights_A * scale


def spread(gains_AK: Tensor, valid_A: Tensor) -> Tensor:
    """Return the standard deviation of the gains of valid rows, as a scalar tensor; one if it is zero."""
    weights_A1 = valid_A.to(gains_AK.dtype)[:, None]
    count = (weights_A1.sum() * gains_AK.shape[1]).clamp(min=1)
    mean = (gains_AK * weights_A1).sum() / count
    deviation = (((gains_AK - mean).square() * weights_A1).sum() / count).sqrt()
    return torch.where(deviation > 0, deviation, torch.ones_like(deviation))


class KeptRates:
    """Running fraction of kept rows per class, which corrects the class bias of dropping rows (not in the paper).

    The rows of some classes are dropped more often than those of others, so dropping shifts the class prior of the training
    data; out of distribution the model then predicts the least dropped class too often. Kept rows of class c are weighted by
    (r / r_c) ** strength, with r_c the kept fraction of the class and r that of all rows: with strength 1 every class has the
    total weight that it would have without dropping.

    Args:
        decay: decay of the counts per step.
        prior: pseudo-count: rows with the overall kept fraction added to every class, so that few rows correct little.
    """

    def __init__(self, decay: float = 0.95, prior: float = 8.0) -> None:
        self.decay, self.prior = decay, prior
        self.counts: dict[int, tuple[float, float]] = {}

    def update(self, classes_A: Tensor, kept_A: Tensor) -> None:
        """Add the rows of a step to the counts.

        Args:
            classes_A: class indices.
            kept_A: boolean, whether a row is kept.
        """
        self.counts = {k: (kept * self.decay, seen * self.decay) for k, (kept, seen) in self.counts.items()}
        for label, kept in torch.stack([classes_A, kept_A.to(classes_A.dtype)], dim=1).tolist():  # once from the device
            before = self.counts.get(label, (0.0, 0.0))
            self.counts[label] = before[0] + kept, before[1] + 1

    def factors(self, classes_A: Tensor, strength: float) -> Tensor:
        """Return the factor (r / r_c) ** strength of every row; ones as long as no row was kept."""
        kept, seen = (sum(part) for part in zip(*self.counts.values(), strict=True)) if self.counts else (0.0, 0.0)
        if kept == 0:
            return torch.ones(len(classes_A), device=classes_A.device)
        overall = kept / seen
        rates = {k: (hits + self.prior * overall) / (rows + self.prior) for k, (hits, rows) in self.counts.items()}
        values = [(overall / rates.get(label, overall)) ** strength for label in classes_A.tolist()]
        return torch.tensor(values, device=classes_A.device)


def gains(logits_AK: Tensor, tangent_AK: Tensor) -> Tensor:
    """Return gains_AK, the first-order decrease of the validation loss per row and label, Eq. (9).

    Exact for cross entropy, NT-Xent and the first term (image to caption) of the CLIP loss. A row with a NaN in logits or
    tangent is NaN in all gains.
    """
    logits_AK, tangent_AK = at_least_float32(logits_AK), at_least_float32(tangent_AK)
    return (logits_AK.softmax(dim=1) * tangent_AK).sum(dim=1, keepdim=True) - tangent_AK


def sigmoid_gains(logits_AK: Tensor, tangent_AK: Tensor) -> Tensor:
    """Return gains_AK of the sigmoid loss: Eq. (9) with a sigmoid per label in place of the softmax.

    A row with a NaN in logits or tangent is NaN in all gains.
    """
    logits_AK, tangent_AK = at_least_float32(logits_AK), at_least_float32(tangent_AK)
    return (logits_AK.sigmoid() * tangent_AK).sum(dim=1, keepdim=True) - tangent_AK


def probability_gains(logits_AK: Tensor, gains_AK: Tensor) -> Tensor:
    """Return p_k Pi_k, the gains with f of Eq. (9) read as probabilities.

    They sum to zero over the labels of a row.
    """
    probs_AK = at_least_float32(logits_AK).softmax(dim=1)
    centred_AK = gains_AK - (probs_AK * gains_AK).sum(dim=1, keepdim=True)  # zero but for rounding, see `gains`
    return probs_AK * centred_AK


def symmetric_gains(
    logits_AC: Tensor, tangent_AC: Tensor, train_logits_TC: Tensor | None = None, train_tangent_TC: Tensor | None = None
) -> Tensor:
    """Return gains_AC for both terms of the CLIP loss: the mean of the row and the column term.

    Eq. (14) generalises the first term only, whose gains `gains` returns. `clip_loss` has both terms: mass on (i, j) also adds
    `-log softmax_i(Z)_ij` to the second one. Its negatives are all augmented rows and, if given, all train rows of the step,
    because the dropped rows are not known before the gains. Divide by the number of rows of the step for the decrease per
    unit of the averaged loss.

    Args:
        logits_AC: logits of the augmented rows.
        tangent_AC: their derivative along the validation gradient.
        train_logits_TC: logits of the train rows; None: no train rows.
        train_tangent_TC: their derivative, required with train logits.
    """
    logits_AC, tangent_AC = at_least_float32(logits_AC), at_least_float32(tangent_AC)
    logits_NC, tangent_NC = logits_AC, tangent_AC
    if train_logits_TC is not None:
        assert train_tangent_TC is not None, "train logits need their tangent"
        logits_NC = torch.cat([logits_AC, train_logits_TC.to(logits_AC)])
        tangent_NC = torch.cat([tangent_AC, train_tangent_TC.to(tangent_AC)])
    column_gains_AC = (logits_NC.softmax(dim=0) * tangent_NC).sum(dim=0, keepdim=True) - tangent_AC
    return (gains(logits_AC, tangent_AC) + column_gains_AC) / 2
