"""Terms that are added to a training loss: distances from a teacher, and losses of the classes beside FLYP's.

    features       mean_i |f_i - f'_i|^2 of the normalised embeddings, of images and of texts    arXiv 2307.12732 (FD)
    logits         mean_i KL(softmax(z'_i) || softmax(z_i)), of images and of captions           arXiv 1503.02531, 2311.01723
    cross-entropy  Eq. (7) over the class captions, which FLYP (arXiv 2212.00638) compares with
    supcon         mean_i -1/|P_i| sum_{p in P_i} log softmax_{a != i}(f_i . f_a / tau)_p        arXiv 2004.11362, L_out

' marks the teacher, P_i the other images of the class of image i. CLIP-KD's code averages the squared distance over the D
numbers of an embedding as well; here it is their sum. CaRot's code adds the two directions of `logits`,
CLIP-KD's takes their mean as here; both have cross entropies or divergences, whose gradients are equal. A new loss of the
classes is one function of (embeddings, class logits, class labels, weights) and one line in `tables.EXTRA_LOSSES`.

Shapes: N rows, D embedding, C columns, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flyp_saflex.saflex.losses import at_least_float32, soft_cross_entropy

SUPCON_TEMPERATURE = 0.1
"""tau of SupCon, that of the authors' commands for CIFAR and ImageNet (HobbitLong/SupContrast; the code's default is 0.07)."""


@dataclass(frozen=True, kw_only=True)
class ExtraLoss:
    """A value of `train.extra_loss`.

    Attributes:
        loss: images_ND, logits_NK over the class captions (None where `reads_classes` is false), labels_NK on the simplex,
            weights_N -> scalar.
        reads_classes: whether it needs the captions of all classes as columns.
    """

    loss: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
    reads_classes: bool = False


def feature_distance(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Return the mean squared distance of embeddings from a teacher's, both brought to length one; zero without rows."""
    if not len(student_ND):
        return student_ND.sum()
    student_ND, teacher_ND = (F.normalize(at_least_float32(part), dim=1) for part in (student_ND, teacher_ND))
    return (student_ND - teacher_ND).square().sum(dim=1).mean()


def divergence(student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
    """Return the mean over rows of KL(teacher || student) of two sets of logits, in nats."""
    student_NC, teacher_NC = at_least_float32(student_NC), at_least_float32(teacher_NC)
    return F.kl_div(student_NC.log_softmax(dim=1), teacher_NC.log_softmax(dim=1), log_target=True, reduction="batchmean")


def class_cross_entropy(images_ND: Tensor, logits_NK: Tensor | None, labels_NK: Tensor, weights_N: Tensor) -> Tensor:
    """Return the weighted cross entropy over the class captions."""
    assert logits_NK is not None, "the loss is marked as reading the class captions"
    return soft_cross_entropy(logits_NK, labels_NK, weights_N)


def supcon(images_ND: Tensor, logits_NK: Tensor | None, labels_NK: Tensor, weights_N: Tensor) -> Tensor:
    """Return the supervised contrastive loss of images (L_out of the paper), averaged over the anchors' weights.

    Rows of weight zero are no negatives; a row alone of its class adds nothing. Of soft labels y_i . y_p is how much a row counts
    as a positive.
    """
    images_ND = F.normalize(at_least_float32(images_ND), dim=1)
    weights_N = weights_N.to(images_ND.dtype)
    itself_NN = torch.eye(len(images_ND), dtype=torch.bool, device=images_ND.device)
    left_out_NN = itself_NN | (weights_N <= 0)[None, :]
    labels_NK = labels_NK.to(images_ND.dtype)
    positive_NN = (labels_NK @ labels_NK.T).masked_fill(left_out_NN, 0)
    logits_NN = (images_ND @ images_ND.T / SUPCON_TEMPERATURE).masked_fill(left_out_NN, torch.finfo(images_ND.dtype).min)
    number_N = positive_NN.sum(dim=1)
    losses_N = -(positive_NN * logits_NN.log_softmax(dim=1)).sum(dim=1) / number_N.clamp(min=torch.finfo(number_N.dtype).tiny)
    anchors_N = weights_N * (number_N > 0)
    total = anchors_N.sum()
    return (losses_N * anchors_N).sum() / torch.where(total > 0, total, torch.ones_like(total))


CROSS_ENTROPY = ExtraLoss(loss=class_cross_entropy, reads_classes=True)
SUPCON = ExtraLoss(loss=supcon)
