"""Null rule: keep, relabel or drop each edit, calibrated on the labels that edits did not come with.

An edit of a dog says nothing about the label "house", so the scores of the labels that edits did not come with show the
scores of a wrong label: the *null*. Compared with it, the scores of the labels that edits came with give the share of
wrong ones (rho, as in Storey's estimate of the false discovery rate), the likelihood ratio of a right against a wrong
label at every score, and with them a posterior over {own label, each other label, none of them}. No truth is needed, and a
shift or stretch of the scores that all labels share changes nothing.

Shapes: N edits, K labels, B bins of null scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MIN_EDITS = 96
"""Fewer edits than this estimate no noise rate (not tuned: twenty bins of five edits)."""
NUM_BINS = 20
SHRINKAGE = 10.0
"""Scores of all labels together that every label's mean and variance starts with; matters where a label has few."""
SWAPPED = 0.5
"""Share of the edits with a wrong label that show another of the K labels; the rest show none of them."""
MAX_SHARPENING = 100.0
"""Bound of the factor by which right labels among the null may raise a likelihood ratio."""
MIN_SEPARATION = 4.0
"""Standard errors by which own labels must exceed the null; otherwise the scores say nothing about the labels."""

Status = Literal["calibrated", "too few", "uninformative"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The null rule's answer for N edits."""

    status: Status
    """`calibrated`; `too few` edits (all weights 0); `uninformative` scores (all own labels kept, weights 1)."""
    rho: float
    """Estimated share of wrong own labels, 0..1; NaN unless calibrated."""
    ratio_NK: Tensor
    """Likelihood ratio, right against wrong, of every label; 1 unless calibrated."""
    posterior_NJ: Tensor
    """Probabilities of the K labels and, last, of none of them; rows sum to one, J = K + 1."""
    weights_N: Tensor
    """0..1: 2 P - 1 of the likeliest label, none below P = 1/2; 0 where the own label has no finite score."""
    labels_N: Tensor
    """The likeliest of the K labels."""
    num_invalid: int
    """Edits whose own label has no finite score."""


def null_rule(scores_NK: Tensor, own_N: Tensor, *, min_edits: int = MIN_EDITS, num_bins: int = NUM_BINS) -> Verdict:
    """Decide on N edits at once: all edits before training, or those of the last steps.

    Args:
        scores_NK: higher for a likelier label, in any unit. An entry that is not finite says nothing about its label; an
            edit without a finite score of its own label, or of another label to compare it with, gets weight 0.
        own_N: the label that each edit came with.
        min_edits: finite edits that are needed for an estimate.
        num_bins: bins of equal null mass; the highest is cut further where there are many scores.
    """
    num_edits, num_labels = scores_NK.shape
    assert own_N.shape == (num_edits,), f"scores {tuple(scores_NK.shape)}, labels {tuple(own_N.shape)}"
    own_NK = torch.nn.functional.one_hot(own_N, num_labels).bool()
    finite_NK = scores_NK.isfinite()
    valid_N = (finite_NK & own_NK).any(dim=1) & (finite_NK & ~own_NK).any(dim=1)
    usable_NK = finite_NK & valid_N[:, None]
    num_valid = int(valid_N.sum())
    if num_valid < min_edits:
        return _undecided("too few", own_NK, valid_N, torch.zeros_like(valid_N))
    # Step 1: every label in units of its own null, then against its strongest rival.
    margins_NK = margins(standardise(scores_NK.double(), own_NK, usable_NK), usable_NK)
    own_A, null_M = margins_NK[own_NK & usable_NK], margins_NK[~own_NK & usable_NK]
    if separation(own_A, null_M) < MIN_SEPARATION:
        return _undecided("uninformative", own_NK, valid_N, valid_N)
    # Step 2: share of own labels in bins of null scores; among low scores it is the noise rate.
    sorted_M = null_M.sort().values  # torch.quantile takes 16 million values at most
    edges = sorted_M[_bin_starts(len(null_M), num_bins).to(null_M.device)].unique()
    edges = edges[edges > sorted_M[0]]
    null_B, own_B = (_histogram(values, edges) for values in (null_M, own_A))
    lower_B = null_B.cumsum(0) <= max(0.5 + 1e-9, float(null_B[0]))
    lowest = float(own_B[lower_B].sum() / null_B[lower_B].sum())
    # Step 3: likelihood ratio of a right label, rising with the score. The null is itself (1 - e) wrong + e right labels, and
    # own labels are rho wrong + (1 - rho) right ones: their ratio r gives rho where no label is right, and the ratio elsewhere.
    others = max(num_labels - 1, 1)
    rho = min(lowest / (1 + lowest * SWAPPED / others), 1 - 1e-6)
    right_among_null = rho * SWAPPED / others
    rising_B = pool_adjacent_violators(own_B / null_B, null_B)
    for_B = (rising_B * (1 - right_among_null) - rho).clamp(min=0)
    against_B = (1 - rho - rising_B * right_among_null).clamp(min=(1 - rho) / MAX_SHARPENING)
    ratio_NK = torch.where(usable_NK, (for_B / against_B)[torch.bucketize(margins_NK, edges, right=True)], 0.0)
    # Step 4: posterior; "none" has likelihood ratio 1.
    prior_NK = torch.where(own_NK, 1 - rho, right_among_null)
    none_N1 = torch.full_like(ratio_NK[:, :1], max(rho, 1e-9) * (1 - SWAPPED))
    joint_NJ = torch.cat([prior_NK * ratio_NK, none_N1], dim=1)
    posterior_NJ = (joint_NJ / joint_NJ.sum(dim=1, keepdim=True)).to(_dtype(scores_NK))
    best_N, labels_N = posterior_NJ[:, :-1].max(dim=1)
    weights_N = torch.where(valid_N, (2 * best_N - 1).clamp(min=0), 0.0)
    return Verdict(
        status="calibrated",
        rho=rho,
        ratio_NK=ratio_NK.to(posterior_NJ.dtype),
        posterior_NJ=posterior_NJ,
        weights_N=weights_N,
        labels_N=torch.where(valid_N, labels_N, own_N),
        num_invalid=num_edits - num_valid,
    )


def standardise(scores_NK: Tensor, own_NK: Tensor, usable_NK: Tensor) -> Tensor:
    """Shift and scale every label's scores to mean 0 and variance 1 over the edits that did not come with it.

    Mean and variance of a label are shrunk towards those of all labels together (`SHRINKAGE`). Scores that are not usable
    become 0.
    """
    null_NK = (usable_NK & ~own_NK).to(scores_NK.dtype)
    scores_NK = torch.where(usable_NK, scores_NK, 0.0)
    count_K, total = null_NK.sum(dim=0), null_NK.sum().clamp(min=1)
    sums_K = (scores_NK * null_NK).sum(dim=0)
    mean_K = (sums_K + SHRINKAGE * sums_K.sum() / total) / (count_K + SHRINKAGE)
    squares_K = ((scores_NK - mean_K).square() * null_NK).sum(dim=0)
    variance_K = (squares_K + SHRINKAGE * squares_K.sum() / total) / (count_K + SHRINKAGE)
    scale_K = torch.where(variance_K > 0, variance_K, 1.0).sqrt()
    return torch.where(usable_NK, (scores_NK - mean_K) / scale_K, 0.0)


def margins(scores_NK: Tensor, usable_NK: Tensor) -> Tensor:
    """Return every label's score minus the highest score of another label of the edit; -infinity where there is none."""
    masked_NK = scores_NK.masked_fill(~usable_NK, -torch.inf)
    top_N2, best_N2 = masked_NK.topk(2, dim=1)
    labels_K = torch.arange(scores_NK.shape[1], device=scores_NK.device)
    rival_NK = torch.where(labels_K == best_N2[:, :1], top_N2[:, 1:], top_N2[:, :1])
    return torch.where(usable_NK & rival_NK.isfinite(), scores_NK - rival_NK, -torch.inf)


def separation(own_A: Tensor, null_M: Tensor) -> float:
    """Return by how many standard errors own labels score above the null; 0 where nothing varies."""
    variance = null_M.var() / len(null_M) + own_A.var() / len(own_A)
    return float((own_A.mean() - null_M.mean()) / variance.sqrt()) if variance > 0 else 0.0


def pool_adjacent_violators(values_B: Tensor, weights_B: Tensor) -> Tensor:
    """Return the closest rising sequence in weighted least squares (isotonic regression)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values_B.tolist(), weights_B.tolist(), strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (low, light, short), (high, heavy, long) = blocks.pop(), blocks.pop()
            blocks.append(((low * light + high * heavy) / (light + heavy), light + heavy, short + long))
    return torch.cat([values_B.new_full((length,), mean) for mean, _, length in blocks])


def _bin_starts(num_scores: int, num_bins: int) -> Tensor:
    """Return the ranks at which bins start: equal bins, and the highest halved while the rest keeps `num_bins` scores.

    With many labels only a likelihood ratio of the order of their number can speak for one of them, and a bin's ratio is at
    most one over its null mass.
    """
    starts = [num_scores * number // num_bins for number in range(1, num_bins)]
    while (rest := (num_scores - starts[-1]) // 2) >= num_bins:
        starts.append(num_scores - rest)
    return torch.tensor(starts)


def _histogram(values: Tensor, edges: Tensor) -> Tensor:
    """Return the share of values in each of the bins (.., e_1), [e_1, e_2) .. [e_n, ..)."""
    counts_B = torch.bincount(torch.bucketize(values, edges, right=True), minlength=len(edges) + 1)
    return counts_B.to(values.dtype) / len(values)


def _undecided(status: Status, own_NK: Tensor, valid_N: Tensor, keep_N: Tensor) -> Verdict:
    """Return the verdict without an estimate: own labels, and weight 1 for the edits to keep."""
    own_NK = own_NK.float()
    return Verdict(
        status=status,
        rho=float("nan"),
        ratio_NK=torch.ones_like(own_NK),
        posterior_NJ=torch.cat([own_NK, torch.zeros_like(own_NK[:, :1])], dim=1),
        weights_N=keep_N.float(),
        labels_N=own_NK.argmax(dim=1),
        num_invalid=int((~valid_N).sum()),
    )


def _dtype(scores_NK: Tensor) -> torch.dtype:
    return torch.promote_types(scores_NK.dtype, torch.float32)
