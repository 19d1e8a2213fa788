"""Objectives: a loss with the gains of its rows, and the label space that it is taken over.

A new objective is one function of (logits, assignment, weights) and one line in `tables.OBJECTIVES`. The loss must be linear
in the mass `w_i y_ij` (Eq. 7, 14), or its gains are not those of Eq. (9).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flyp_saflex.saflex.closed_form import gains, sigmoid_gains
from flyp_saflex.saflex.losses import clip_loss, sigmoid_loss, sigmoid_losses, soft_cross_entropy, softmax_losses


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A training loss.

    Attributes:
        loss: logits_NC, assignment_NC (label mass over the columns, rows sum to one), weights_N -> scalar.
        over: the batch's captions or views (proxy classes), or the dataset's classes.
        gains: logits_AC and their derivative along the validation gradient -> gain of every column, Eq. (9).
        row_losses: logits_AK and labels on the simplex -> loss of every row, for the filter `lowest-loss`.
        is_softmax: whether logits enter through a softmax over the columns, which a bias on all of them does not change.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    over: Literal["captions", "views", "classes"]
    gains: Callable[[Tensor, Tensor], Tensor] = gains
    row_losses: Callable[[Tensor, Tensor], Tensor] = softmax_losses
    is_softmax: bool = True


CONTRASTIVE = Objective(loss=clip_loss, over="captions")
"""FLYP: both terms of Eq. (13), generalised as Eq. (14); gains of the image term."""
SIGMOID = Objective(loss=sigmoid_loss, over="captions", gains=sigmoid_gains, row_losses=sigmoid_losses, is_softmax=False)
"""SigLIP's loss, which it was pretrained with."""
NT_XENT = Objective(loss=soft_cross_entropy, over="views")
"""Eq. (12), with soft labels and weights as Eq. (14): every view is to find its partner among the other views of the batch."""
CROSS_ENTROPY = Objective(loss=soft_cross_entropy, over="classes")
"""Eq. (7)."""
