"""Static evidence on edits: kinds of it, their sum, and the decision on every edit that follows.

What decides should not be the model under training: it drops what it does not recognise yet, which is what an edit is for.
The kinds here ask the pretrained model once per edit: its zero-shot log-probabilities, and whether the edit still resembles
a training picture of the class (`source_evidence`). Each kind scores all K labels, so the null rule can calibrate the sum
against labels that edits did not come with.

Shapes: N edits, K labels, S sources, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flyp_saflex.presets import SaflexSettings
from flyp_saflex.saflex.null_rule import MIN_EDITS, Status, Verdict, null_rule, standardise

SHARPNESS = 2.0
"""Inverse temperature of similarities, in units of their deviation over sources; higher: the nearest source counts most."""
ROWS_AT_ONCE = 4096
"""Edits whose similarities to all sources are held at a time."""
RIDGE = 0.05
"""Added to the variance 1 of each kind, so that kinds which say the same share their weight."""


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The weighted sum of several kinds of evidence."""

    scores_NK: Tensor
    """Higher for a likelier label; NaN in rows on which no kind says anything."""
    weights: dict[str, float]
    """Weight of each kind; 0: its own labels do not exceed its null, or the other kinds say the same better."""
    separations: dict[str, float]
    """Mean score of own labels above the null, in standard deviations of the null."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Weights and labels of all edits, decided once."""

    weights_N: Tensor
    """0..1, not renormalised."""
    labels_NK: Tensor
    """Soft labels, rows on the simplex."""
    candidates_NK: Tensor
    """Plausible labels, at least one per edit: the feasible set of SAFLEX's restricted linear program."""
    rho: float
    """Estimated share of edits that do not show their label; NaN unless `status` is `calibrated`."""
    status: Status
    """Whether the evidence could be calibrated; if not, every edit is kept under its own label."""
    kept_fraction: float
    """Share of edits with a weight above 0."""
    relabelled_fraction: float
    """Share of edits with a weight above 0 whose likeliest label is not the one that they came with."""
    verdict: Verdict
    """The null rule's answer."""


def decide(
    evidence: Mapping[str, Tensor],
    own_N: Tensor,
    *,
    threshold: float = SaflexSettings.evidence_threshold,
    min_edits: int = MIN_EDITS,
) -> Decision:
    """Decide on all edits from several kinds of evidence.

    With too few edits, or evidence that says nothing about the labels, all edits with finite evidence are kept as they are:
    to drop good edits costs more than to keep bad ones.

    Args:
        evidence: scores_NK by kind, higher for a likelier label, in any unit; an entry that is not finite says nothing.
        own_N: the label that each edit came with.
        threshold: posterior, 0..1, below which a label does not count. 0.5: a dropped good edit costs as much as a kept bad
            one; 0.2: four times as much.
        min_edits: edits that are needed for an estimate.
    """
    combined = combine(evidence, own_N)
    verdict = null_rule(combined.scores_NK, own_N, min_edits=min_edits)
    num_labels = combined.scores_NK.shape[1]
    own_NK = F.one_hot(own_N, num_labels).to(verdict.weights_N.dtype)
    known_N = combined.scores_NK.isfinite().all(dim=1)
    if verdict.status == "calibrated":
        posterior_NK = verdict.posterior_NJ[:, :-1]
        best_N, labels_N = posterior_NK.max(dim=1)
        decided_N1 = (known_N & (best_N > threshold))[:, None]
        weights_N = torch.where(known_N, ((best_N - threshold) / (1 - threshold)).clamp(min=0), 0.0)
        total_N1 = posterior_NK.sum(dim=1, keepdim=True)
        labels_NK = torch.where(decided_N1, posterior_NK / torch.where(total_N1 > 0, total_N1, 1.0), own_NK)
        plausible_NK = (posterior_NK >= threshold) | F.one_hot(labels_N, num_labels).bool()
        candidates_NK = torch.where(decided_N1, plausible_NK, own_NK.bool())
    else:
        weights_N, labels_NK, candidates_NK = known_N.to(own_NK.dtype), own_NK, own_NK.bool()
    kept_N = weights_N > 0
    return Decision(
        weights_N=weights_N,
        labels_NK=labels_NK,
        candidates_NK=candidates_NK,
        rho=verdict.rho,
        status=verdict.status,
        kept_fraction=float(kept_N.float().mean()) if len(kept_N) else 0.0,
        relabelled_fraction=float((kept_N & (labels_NK.argmax(dim=1) != own_N)).float().mean()) if len(kept_N) else 0.0,
        verdict=verdict,
    )


def combine(evidence: Mapping[str, Tensor], own_N: Tensor) -> Combined:
    """Return the sum of the kinds of evidence, weighted by how well own labels stand out from the null.

    The weights are Fisher's linear discriminant between own labels and null, with kinds of negative weight left out. Wrong
    own labels lessen the distance between the two for all kinds alike, so the ratio of the weights stays right.
    """
    assert evidence, "at least one kind of evidence is needed"
    centred = {name: _centred(scores_NK, own_N) for name, scores_NK in evidence.items()}
    names = list(centred)
    known_N = torch.stack([known for _, known in centred.values()]).any(dim=0)
    scores_GNK = torch.stack([scores for scores, _ in centred.values()])
    own_NK = F.one_hot(own_N, scores_GNK.shape[2]).bool()
    null_GM = scores_GNK[:, known_N[:, None] & ~own_NK]
    own_GA = scores_GNK[:, known_N[:, None] & own_NK]
    if own_GA.shape[1] < 2 or null_GM.shape[1] < 2:
        distance_G, weights_G = null_GM.new_zeros(len(names)), null_GM.new_ones(len(names))
    else:
        distance_G = own_GA.mean(dim=1) - null_GM.mean(dim=1)
        weights_G = _discriminant(torch.cov(null_GM).reshape(len(names), len(names)), distance_G)
    total_NK = (weights_G[:, None, None] * scores_GNK).sum(dim=0)
    return Combined(
        scores_NK=torch.where(known_N[:, None], total_NK, torch.nan).float(),
        weights=dict(zip(names, weights_G.tolist(), strict=True)),
        separations=dict(zip(names, distance_G.tolist(), strict=True)),
    )


def source_evidence(edits_ND: Tensor, sources_SD: Tensor, source_labels_S: Tensor, groups_N: Tensor, num_labels: int) -> Tensor:
    """Return per label the log-likelihood, up to a factor, that the edit shows a source of that label.

    An edit resembles its own source more than others, once what its instruction does to all pictures is taken away. A source
    of label k is drawn at random (log-mean-exp over similarities), for the own label as for the others: comparing the own
    source alone with the best of many others would count against every edit.

    Args:
        edits_ND: features of the edits, from any layer.
        sources_SD: features of the pictures that edits were made from, every picture once.
        source_labels_S: their labels.
        groups_N: index of the instruction, whose mean is subtracted; edits of groups of one say nothing.
        num_labels: K.

    Returns:
        Float32; not finite for labels without source and for edits whose features are not finite.
    """
    edits_ND = _per_group_centred(edits_ND.float(), groups_N)
    sources_SD = sources_SD.float()
    finite_S = sources_SD.isfinite().all(dim=1)
    sources_SD, source_labels_S = sources_SD[finite_S], source_labels_S[finite_S]
    sources_SD = F.normalize(sources_SD - sources_SD.mean(dim=0), dim=1)
    scores_NK = torch.full((len(edits_ND), num_labels), -torch.inf, device=edits_ND.device)
    members = {label: source_labels_S == label for label in source_labels_S.unique().tolist()}
    for start in range(0, len(edits_ND), ROWS_AT_ONCE):
        similarity_CS = F.normalize(edits_ND[start : start + ROWS_AT_ONCE], dim=1) @ sources_SD.T
        unit_C1 = similarity_CS.std(dim=1, keepdim=True)
        scaled_CS = similarity_CS * (SHARPNESS / torch.where(unit_C1 > 0, unit_C1, 1.0))
        for label, is_member_S in members.items():
            likelihood_C = scaled_CS[:, is_member_S].logsumexp(dim=1) - math.log(int(is_member_S.sum()))
            scores_NK[start : start + ROWS_AT_ONCE, label] = likelihood_C
    return scores_NK


def own_source_evidence(
    edits_ND: Tensor, sources_SD: Tensor, source_labels_S: Tensor, source_N: Tensor, groups_N: Tensor, num_labels: int
) -> Tensor:
    """Return the similarity to the own source for the own label, and to the nearest source for every other label.

    The plain form of source consistency, for comparison: it tells a swapped edit by its source better than `source_evidence`
    where an edit keeps the layout, and fails where it does not.

    Args:
        edits_ND: as `source_evidence`, and so are the others.
        sources_SD: see there.
        source_labels_S: see there.
        source_N: row of each edit's own source.
        groups_N: see there.
        num_labels: see there.
    """
    edits_ND = F.normalize(_per_group_centred(edits_ND.float(), groups_N), dim=1)
    sources_SD = sources_SD.float()
    similarity_NS = edits_ND @ F.normalize(sources_SD - sources_SD.mean(dim=0), dim=1).T
    scores_NK = torch.full((len(edits_ND), num_labels), -torch.inf, device=edits_ND.device)
    for label in source_labels_S.unique().tolist():
        scores_NK[:, label] = similarity_NS[:, source_labels_S == label].amax(dim=1)
    rows_N = torch.arange(len(edits_ND), device=edits_ND.device)
    scores_NK[rows_N, source_labels_S[source_N]] = similarity_NS[rows_N, source_N]
    return scores_NK


def on_grid(hidden: Tensor, side: int = 4) -> Tensor:
    """Pool a layer's activations to a coarse grid and flatten it.

    Args:
        hidden: maps [N, C, H, W], or tokens [N, P + H * H, C], with P class and register tokens (or none) first.
        side: cells per side.

    Returns:
        [N, C * side * side].
    """
    if hidden.ndim == 3:
        height = math.isqrt(hidden.shape[1])
        hidden = hidden[:, hidden.shape[1] - height * height :].transpose(1, 2).unflatten(2, (height, height))
    return F.adaptive_avg_pool2d(hidden.float(), side).flatten(1)


def _centred(scores_NK: Tensor, own_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores minus the row's mean, in units of the label's null; 0 where nothing is said; and the rows with a say."""
    scores_NK = scores_NK.double()
    own_NK = F.one_hot(own_N, scores_NK.shape[1]).bool()
    finite_NK = scores_NK.isfinite()
    known_N = (finite_NK & own_NK).any(dim=1) & (finite_NK & ~own_NK).any(dim=1)
    usable_NK = finite_NK & known_N[:, None]
    scores_NK = torch.where(usable_NK, scores_NK, 0.0)
    mean_N1 = scores_NK.sum(dim=1, keepdim=True) / usable_NK.sum(dim=1, keepdim=True).clamp(min=1)
    return standardise(scores_NK - mean_N1, own_NK, usable_NK), known_N


def _discriminant(covariance_GG: Tensor, distance_G: Tensor) -> Tensor:
    """Return Fisher's weights, all at least 0: the kind of the most negative weight is left out until there is none."""
    weights_G = torch.zeros_like(distance_G)
    left = [number for number, distance in enumerate(distance_G.tolist()) if distance > 0]
    regular_GG = covariance_GG + RIDGE * torch.eye(len(distance_G), dtype=covariance_GG.dtype, device=covariance_GG.device)
    while left:
        solved = torch.linalg.solve(regular_GG[left][:, left], distance_G[left])
        if bool((solved >= 0).all()):
            weights_G[left] = solved
            return weights_G
        left.pop(int(solved.argmin()))
    return weights_G


def _per_group_centred(features_ND: Tensor, groups_N: Tensor) -> Tensor:
    """Subtract the group's mean over finite rows."""
    finite_N1 = features_ND.isfinite().all(dim=1, keepdim=True)
    _, group_N = groups_N.unique(return_inverse=True)
    num_groups = int(group_N.max()) + 1 if len(group_N) else 0
    sums_GD = features_ND.new_zeros(num_groups, features_ND.shape[1])
    sums_GD.index_add_(0, group_N, torch.where(finite_N1, features_ND, 0.0))
    count_G1 = features_ND.new_zeros(num_groups, 1).index_add_(0, group_N, finite_N1.to(features_ND.dtype))
    return features_ND - (sums_GD / count_G1.clamp(min=1))[group_N]
