"""From gains to weights and soft labels: the closed form of Eq. (10) and (11), its variants by name (floor 2).

The linear program of Theorem 1 separates over rows. With `u` the label that a row came with ("upstream"), `s` the gains'
scale, `tau` the temperature and `beta` the penalty, its softened solution is

    y_i = softmax((Pi_i / s + beta u_i) / tau)                 Eq. (10); tau -> 0 is the hard solution
    w_i = 1 if the named rule keeps the row, else 0            Eq. (11) is the rule `sum`

Shapes: A augmented rows, K labels (classes, or the distinct captions of the batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

WeightRule = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _keep_all(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """Keep every row: only the labels are learned."""
    return torch.ones_like(gains_AK[:, 0])


def _keep_upstream(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """Keep rows whose own label helps: the linear program's solution when labels are retained (beta -> infinity)."""
    return ((gains_AK * upstream_AK).sum(dim=1) >= 0).to(gains_AK.dtype)


def _keep_sum(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """Eq. (11) as printed: keep rows for which the uniform label helps."""
    return (gains_AK.sum(dim=1) >= 0).to(gains_AK.dtype)


def _keep_label(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """The main text's rule: keep rows whose learned label helps; with a small tau that is every row."""
    pull_A = penalty * (labels_AK * upstream_AK).sum(dim=1)
    return ((gains_AK * labels_AK).sum(dim=1) + pull_A >= 0).to(gains_AK.dtype)


def _weigh_soft(gains_AK: Tensor, labels_AK: Tensor, upstream_AK: Tensor, penalty: float) -> Tensor:
    """Weigh rows by how much their own label helps, w proportional to max(0, Pi_upstream)."""
    return (gains_AK * upstream_AK).sum(dim=1).clamp(min=0)


WEIGHT_RULES: dict[str, WeightRule] = {
    "upstream": _keep_upstream,
    "sum": _keep_sum,
    "label": _keep_label,
    "soft": _weigh_soft,
    "all": _keep_all,
}
"""Rules by name: (gains_AK in units of s, labels_AK, upstream_AK, penalty) -> weights_A >= 0. A new rule is one function."""


def soft_labels(
    gains_AK: Tensor, upstream_AK: Tensor, temperature: float, penalty: float, candidates_AK: Tensor | None = None
) -> Tensor:
    """Return softmax((Pi + beta * onehot(upstream)) / tau) per row, Eq. (10) softened.

    If the label that the row came with is itself soft (Mixup, CutMix), the result is its mean over the classes that it
    names, so that beta -> infinity gives back the upstream label, soft or not.

    Args:
        gains_AK: already divided by their scale; finite.
        upstream_AK: rows on the simplex.
        temperature: tau > 0.
        penalty: beta >= 0, infinity included.
        candidates_AK: labels that a row may take, the restricted linear program; the others get exactly 0. None: all labels.
            Upstream mass on other labels pulls nowhere; a row without any candidate keeps its upstream label.
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
    """Scale weights to sum to the number of rows kept, so that kept rows weigh one on average; all zero stays zero."""
    total = weights_A.sum()
    scale = (weights_A > 0).sum() / torch.where(total > 0, total, torch.ones_like(total))
    return weights_A * scale


def spread(gains_AK: Tensor, valid_A: Tensor) -> Tensor:
    """Return the standard deviation of the valid rows' gains; one where there is none to divide by."""
    weights_A1 = valid_A.to(gains_AK.dtype)[:, None]
    count = (weights_A1.sum() * gains_AK.shape[1]).clamp(min=1)
    mean = (gains_AK * weights_A1).sum() / count
    deviation = (((gains_AK - mean).square() * weights_A1).sum() / count).sqrt()
    return torch.where(deviation > 0, deviation, torch.ones_like(deviation))


class KeptRates:
    """Running share of kept rows per class, to undo the class bias of dropping (ours).

    A gradient finds some classes' edits helpful more often than others', so dropping rows shifts the class prior of what is
    trained on; out of distribution the class that loses fewest rows then takes over. Kept rows of class c are weighed by
    (r / r_c) ** strength, where r_c is the class's kept share and r that of all classes: with strength 1 every class weighs
    what it would weigh if nothing were dropped.

    Args:
        decay: of the counts, per call.
        prior: rows of the overall rate that every class starts with: few rows seen, little correction.
    """

    def __init__(self, decay: float = 0.95, prior: float = 8.0) -> None:
        self.decay, self.prior = decay, prior
        self.counts: dict[int, tuple[float, float]] = {}

    def update(self, classes_A: Tensor, kept_A: Tensor) -> None:
        """Count the rows of a step."""
        self.counts = {k: (kept * self.decay, seen * self.decay) for k, (kept, seen) in self.counts.items()}
        for label, kept in torch.stack([classes_A, kept_A.to(classes_A.dtype)], dim=1).tolist():  # once from the device
            before = self.counts.get(label, (0.0, 0.0))
            self.counts[label] = before[0] + kept, before[1] + 1

    def factors(self, classes_A: Tensor, strength: float) -> Tensor:
        """Return (r / r_c) ** strength for every row; ones before anything was kept."""
        kept, seen = (sum(part) for part in zip(*self.counts.values(), strict=True)) if self.counts else (0.0, 0.0)
        if kept == 0:
            return torch.ones(len(classes_A), device=classes_A.device)
        overall = kept / seen
        rates = {k: (hits + self.prior * overall) / (rows + self.prior) for k, (hits, rows) in self.counts.items()}
        values = [(overall / rates.get(label, overall)) ** strength for label in classes_A.tolist()]
        return torch.tensor(values, device=classes_A.device)
