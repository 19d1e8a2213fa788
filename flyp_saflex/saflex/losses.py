"""Weighted soft-label losses: cross entropy, contrastive CLIP/FLYP loss, SigLIP's sigmoid loss and NT-Xent.

All are linear in the label mass `M_ij = w_i y_ij` (SAFLEX, Eq. 7 and 14); therefore the choice of weights and labels is a
linear program (Theorem 1). With weights one and one-hot labels each loss equals its standard form, bit for bit where the
reference is PyTorch's or open_clip's. Half-precision logits are converted to float32.

Shapes: N rows (images), K classes, C proxy classes (caption columns), A augmented rows, B pairs, V validation rows,
D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flyp_saflex.saflex.class_labels import class_labels, class_logits


def soft_cross_entropy(logits_NK: Tensor, labels_NK: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Return the weighted cross entropy with soft labels, Eq. (7), divided by the sum of the weights.

    Equals `F.cross_entropy(logits, indices)` to the last bit for one-hot labels and weights one.

    Args:
        logits_NK: scores before the softmax; -inf is allowed where the label is zero.
        labels_NK: rows on the simplex.
        weights_N: non-negative; None: ones.

    Returns:
        A scalar, in float32 or float64. Zero, with zero gradient, if every weight is zero or there are no rows.
    """
    weights_N = _ones(logits_NK) if weights_N is None else weights_N
    losses_N = softmax_losses(at_least_float32(logits_NK), labels_NK)
    return _weighted_mean(losses_N, weights_N)


def joint_loss(
    logits_train_TK: Tensor, y_train: Tensor, logits_aug_AK: Tensor, labels_aug_AK: Tensor, weights_aug_A: Tensor
) -> Tensor:
    """Return the cross entropy over train and augmented rows; a kept row counts as much as a train row.

    Their losses are added over both and divided by T + the sum of the weights. (The sum of two separate means would give one
    kept row the weight of all train rows together.) With weights one and hard labels it equals `F.cross_entropy` of the
    concatenation to the last bit.

    Args:
        logits_train_TK: logits of the train rows; [T] or [T, 1]: one logit of a binary classifier, for the second class.
        y_train: labels of the train rows: indices of any integer kind, [T] or [T, 1], or rows on the simplex [T, K].
        logits_aug_AK: logits of the augmented rows, as those of the train rows.
        labels_aug_AK: SAFLEX's labels, rows on the simplex.
        weights_aug_A: SAFLEX's weights, >= 0.

    Returns:
        A scalar, in float32 or float64; the plain loss of the train rows if every weight is zero.

    Raises:
        ConfigError: labels that are not those of one class per row, or out of range.
    """
    logits_train_TK, logits_aug_AK = class_logits(logits_train_TK), class_logits(logits_aug_AK)
    num_rows, num_classes = logits_train_TK.shape
    device = logits_train_TK.device
    labels_T = class_labels(y_train, num_classes, name="y_train", num_rows=num_rows, device=device, soft=True)
    labels_TK = F.one_hot(labels_T, num_classes) if labels_T.ndim == 1 else labels_T
    return soft_cross_entropy(
        torch.cat([logits_train_TK, logits_aug_AK]),
        torch.cat([labels_TK.to(labels_aug_AK.dtype), labels_aug_AK]),
        torch.cat([weights_aug_A.new_ones(num_rows), weights_aug_A]),
    )


def clip_loss(logits_NC: Tensor, assignment_NC: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Return the symmetric contrastive loss of images and captions: both terms of Eq. (13), generalised as Eq. (14).

    With `M = w_i y_ij`:  L = 1/2 [ - sum M log softmax_j(Z) - sum M log softmax_i(Z) ] / sum M.

    A proxy class may have several positives (images that share the caption): its term is then the sum of their log
    probabilities. Rows of weight zero are not negatives of the second term either; a proxy class without mass adds zero.
    Weights one and the identity as assignment give open_clip's `ClipLoss`, bit for bit for the same logits.

    Args:
        logits_NC: `logit_scale * image_i . caption_j`.
        assignment_NC: label mass of every row over the proxy classes, rows sum to one; see `proxy_columns`.
        weights_N: non-negative; None: ones.

    Returns:
        A scalar, in float32 or float64. Zero, with zero gradient, if every weight is zero or there are no rows.
    """
    logits_NC = at_least_float32(logits_NC)
    weights_N = _ones(logits_NC) if weights_N is None else weights_N.to(logits_NC.dtype)
    mass_NC = weights_N[:, None] * assignment_NC.to(logits_NC.dtype)
    # Step 1, first term of Eq. (13) as Eq. (14): which caption belongs to the image?
    image_losses_N = softmax_losses(logits_NC, mass_NC)
    # Step 2, second term: which image belongs to the caption? Dropped rows leave the softmax, unless all are dropped
    # (a softmax over nothing is NaN; the mass is zero then and so is the loss). Transposed, because a softmax over the
    # first dimension rounds differently from ClipLoss'.
    dropped_N = (weights_N <= 0) & (weights_N > 0).any()
    caption_logits_CN = logits_NC.T.masked_fill(dropped_N, -torch.inf)
    caption_losses_C = softmax_losses(caption_logits_CN, mass_NC.T)
    # Step 3: one normaliser for both, the mass in the loss.
    total = mass_NC.sum()
    total = torch.where(total > 0, total, torch.ones_like(total))
    return (_ordered_sum(image_losses_N) / total + _ordered_sum(caption_losses_C) / total) / 2


def sigmoid_loss(logits_NC: Tensor, assignment_NC: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Return the pairwise sigmoid loss of images and captions (SigLIP, arXiv 2303.15343), divided by the sum of the weights.

    Every pair is a yes-or-no question: L = sum_i w_i [ sum_j log(1 + exp(z_ij)) - sum_j y_ij z_ij ] / sum_i w_i. Weights one and
    the identity as assignment give open_clip's `SigLipLoss`. A dropped row is no negative: no term compares rows.

    Args:
        logits_NC: `logit_scale * image_i . caption_j + logit_bias`.
        assignment_NC: label mass of every row over the proxy classes, rows sum to one; see `proxy_columns`.
        weights_N: non-negative; None: ones.

    Returns:
        A scalar, in float32 or float64. Zero, with zero gradient, if every weight is zero or there are no rows.
    """
    weights_N = _ones(logits_NC) if weights_N is None else weights_N
    return _weighted_mean(sigmoid_losses(at_least_float32(logits_NC), assignment_NC), weights_N)


def nt_xent(
    first_BD: Tensor,
    second_BD: Tensor,
    temperature: float = 0.5,
    labels_NC: Tensor | None = None,
    weights_N: Tensor | None = None,
) -> Tensor:
    """Return the contrastive loss of two views of each image, Eq. (12), averaged over the N = 2B views.

    Args:
        first_BD: embeddings of the first views, of any norm (they are normalised here).
        second_BD: embeddings of the second views of the same images.
        temperature: tau of Eq. (12).
        labels_NC: soft labels over the proxy classes of `nt_xent_logits`; None: the partner of every view.
        weights_N: weight of each view as an anchor; None: ones. A view of weight zero stays a proxy class of the others,
            because their learned labels may put mass on it.

    Returns:
        A scalar, in float32 or float64; zero if every weight is zero.
    """
    logits_NC = nt_xent_logits(first_BD, second_BD, temperature)
    if labels_NC is None:
        labels_NC = F.one_hot(nt_xent_partners(len(first_BD), logits_NC.device), logits_NC.shape[1])
    return soft_cross_entropy(logits_NC, labels_NC, weights_N)


def nt_xent_logits(first_BD: Tensor, second_BD: Tensor, temperature: float = 0.5) -> Tensor:
    """Return `cosine / temperature` of every view with all others, the proxy classes of Eq. (12).

    There are C = 2B - 1 others. Views are numbered 0 .. B-1 (first) and B .. 2B-1 (second). Column j of row i is view j for
    j < i, else view j + 1: a view is not a proxy class of itself, so that no column needs a mask.

    Returns:
        Logits [2B, 2B - 1], float32 or float64.
    """
    return view_logits(torch.cat([first_BD, second_BD]), temperature)


def view_logits(views_ND: Tensor, temperature: float) -> Tensor:
    """Return `nt_xent_logits` of views in any order.

    Returns:
        [N, N - 1]; column j of row i is view j, or view j + 1 from j = i on.
    """
    views_ND = F.normalize(at_least_float32(views_ND), dim=1)
    num_views = len(views_ND)
    logits_NN = views_ND @ views_ND.T / temperature
    # Without its last entry the flat matrix has one diagonal entry at the head of every N + 1 entries.
    return logits_NN.flatten()[:-1].view(num_views - 1, num_views + 1)[:, 1:].reshape(num_views, num_views - 1)


def nt_xent_partners(num_pairs: int, device: torch.device | None = None) -> Tensor:
    """Return the column of every view's partner (the other view of its image) in `nt_xent_logits`, [2B]."""
    pairs_B = torch.arange(num_pairs, device=device)
    return torch.cat([pairs_B + num_pairs - 1, pairs_B])


def cross_entropy(logits_VK: Tensor, labels_V: Tensor) -> Tensor:
    """Return the mean cross entropy of the validation rows over the class captions (`saflex.validation_loss = "ce"`)."""
    return F.cross_entropy(at_least_float32(logits_VK), labels_V)


def margin(logits_VK: Tensor, labels_V: Tensor) -> Tensor:
    """Return the mean over rows of `mean_k z_k - z_y` (`saflex.validation_loss = "margin"`).

    It is the cross entropy at infinite temperature: lim T (CE(z / T) - log K). Its gradient does not vanish when the rows
    are already classified correctly.
    """
    logits_VK = at_least_float32(logits_VK)
    return (logits_VK.mean(dim=1) - logits_VK.gather(1, labels_V[:, None])[:, 0]).mean()


VALIDATION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin}
"""Validation losses by name; the third choice, `train`, is the training loss, which the caller has."""


def softmax_losses(logits_NK: Tensor, mass_NK: Tensor) -> Tensor:
    """Return `- sum_k M_ik log softmax_k(Z)_ik` per row, with 0 log 0 = 0 (also in the backward pass)."""
    log_probs_NK = logits_NK.log_softmax(dim=1)
    impossible_NK = (log_probs_NK == -torch.inf) & (mass_NK == 0)
    return -(mass_NK * log_probs_NK.masked_fill(impossible_NK, 0)).sum(dim=1)


def sigmoid_losses(logits_NK: Tensor, labels_NK: Tensor) -> Tensor:
    """Return `sum_k softplus(z_ik) - sum_k y_ik z_ik` per row, for labels from 0 to 1.

    Written with both log sigmoids: the difference as printed loses the small losses of large logits in float32.
    """
    return -(labels_NK * F.logsigmoid(logits_NK) + (1 - labels_NK) * F.logsigmoid(-logits_NK)).sum(dim=1)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half-precision values to float32; return others unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _ones(logits_NK: Tensor) -> Tensor:
    return torch.ones(len(logits_NK), dtype=at_least_float32(logits_NK[:0]).dtype, device=logits_NK.device)


def _weighted_mean(losses_N: Tensor, weights_N: Tensor) -> Tensor:
    weights_N = weights_N.to(losses_N.dtype)
    total = weights_N.sum()
    return _ordered_sum(losses_N * weights_N) / torch.where(total > 0, total, torch.ones_like(total))


def _ordered_sum(losses_N: Tensor) -> Tensor:
    """Sum in the order of PyTorch's cross entropy; `Tensor.sum` differs in the last bit."""
    if not len(losses_N):
        return losses_N.sum()
    only_class_N = torch.zeros(len(losses_N), dtype=torch.long, device=losses_N.device)
    return F.nll_loss(-losses_N[:, None], only_class_N, reduction="sum")
