"""Label space of one batch: the classes that its rows are told apart by, over all processes.

Shapes: N rows of all processes (in `Rows`: of this one), C logit columns, K labels (distinct captions, or classes), U texts to
encode (U = K, or none), L tokens, V validation rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]


@dataclass
class Rows:
    """One process's rows of a part of a step. Training rows come first.

    Attributes:
        inputs: what the network takes.
        captions_N: caption id of every row (its class where a task has no captions).
        labels_N: class index of every row.
        ids_N: identity of an augmented row (index of the edit or sample), for states kept between visits.
        num_train: training rows.
        partners_N, partner_labels_N, share_N: Mixup and CutMix: the other caption and class, and the part of the row's
            label that stays its own; None where every label is one-hot.
        prior_N: weight of every row that evidence or the upstream decided beforehand; None: ones.
        confidence_N: part of a row's label that stays, the rest being spread over the other labels; None: all of it.
    """

    inputs: Tensor
    captions_N: Tensor
    labels_N: Tensor
    ids_N: Tensor
    num_train: int
    partners_N: Tensor | None = None
    partner_labels_N: Tensor | None = None
    share_N: Tensor | None = None
    prior_N: Tensor | None = None
    confidence_N: Tensor | None = None


@dataclass
class LabelSpace:
    """Labels of a batch and the logit columns that stand for them.

    Attributes:
        labels_K: distinct caption ids (proxy classes), or classes.
        columns_C: the label that every logit column stands for; a label may have several columns (FLYP as published).
        inverse_C: row of `tokens_UL` of every column.
        tokens_UL: tokens to encode, each distinct caption once; without rows where columns are parameters.
        upstream_NK: labels that the rows came with, rows on the simplex.
        augmented_N: which rows are augmented.
        has_row_columns: whether column i is row i's own (FLYP as published), even where captions repeat.
    """

    labels_K: Tensor
    columns_C: Tensor
    inverse_C: Tensor
    tokens_UL: Tensor
    upstream_NK: Tensor
    augmented_N: Tensor
    has_row_columns: bool = False

    def upstream_mass(self) -> Tensor:
        """Return the mass of every row's own label over the columns [N, C]."""
        if self.has_row_columns:
            return torch.eye(len(self.augmented_N), device=self.augmented_N.device)
        return self.spread(self.upstream_NK)

    def spread(self, labels_AK: Tensor) -> Tensor:
        """Return soft labels as mass over the columns [A, C]; the columns of one label share its mass."""
        with torch.autocast(labels_AK.device.type, enabled=False):  # a share is no rounding matter
            return labels_AK @ assignment(self.labels_K, self.columns_C).to(labels_AK.dtype)

    def average(self, gains_AC: Tensor) -> Tensor:
        """Return the gain of every label [A, K]: the mean over the columns that share its mass.

        The adjoint of `spread`: <gains, spread(labels)> = <average(gains), labels>.
        """
        with torch.autocast(gains_AC.device.type, enabled=False):
            return gains_AC @ assignment(self.labels_K, self.columns_C).to(gains_AC.dtype).T

    def first_columns(self) -> Tensor:
        """Return one column of every label [K]."""
        return (self.columns_C[None, :] == self.labels_K[:, None]).long().argmax(dim=1)


@dataclass
class ValidationSpace:
    """Label space of validation rows under the training objective.

    Attributes:
        tokens_UL: texts to encode.
        inverse_C: row of `tokens_UL` of every logit column.
        assignment_VC: label mass of every row over the columns.
    """

    tokens_UL: Tensor
    inverse_C: Tensor
    assignment_VC: Tensor


def class_space(rows: Rows, num_classes: int, tokens_KL: Tensor, gather: Gather) -> LabelSpace:
    """Return the dataset's classes as label space.

    Args:
        rows: this process's rows.
        num_classes: K.
        tokens_KL: tokens of the classes' captions; without rows where columns are parameters.
        gather: concatenation over processes.
    """
    classes_K = torch.arange(num_classes, device=rows.labels_N.device)
    partner_N = None if rows.partner_labels_N is None else gather(rows.partner_labels_N)
    upstream_NK = upstream_labels(rows, gather(rows.labels_N), partner_N, classes_K, gather)
    return LabelSpace(classes_K, classes_K, classes_K, tokens_KL, upstream_NK, augmented_rows(rows, gather))


def assignment(labels_N: Tensor, columns_C: Tensor) -> Tensor:
    """Return the mass of every label over the columns that carry it: one-hot, or equal shares where it repeats.

    Returns:
        assignment_NC, float32, rows sum to one. A label without a column is a mistake of the caller.
    """
    carries_NC = (labels_N[:, None] == columns_C[None, :]).to(torch.float32)
    copies_N1 = carries_NC.sum(dim=1, keepdim=True)
    assert bool((copies_N1 > 0).all()), "a row's label is in no column"
    return carries_NC / copies_N1


def augmented_rows(rows: Rows, gather: Gather) -> Tensor:
    """Return which rows of all processes are augmented."""
    own_N = torch.arange(len(rows.labels_N), device=rows.labels_N.device) >= rows.num_train
    return gather(own_N.long()).bool()


def upstream_labels(rows: Rows, own_N: Tensor, partner_N: Tensor | None, labels_K: Tensor, gather: Gather) -> Tensor:
    """Return the labels that rows came with [N, K]: one-hot, shared where rows were mixed, softened where unsure."""
    upstream_NK = assignment(own_N, labels_K)
    if partner_N is not None:
        assert rows.share_N is not None, "mixed rows say how much of their label is their own"
        share_N1 = gather(rows.share_N)[:, None]
        upstream_NK = share_N1 * upstream_NK + (1 - share_N1) * assignment(partner_N, labels_K)
    if rows.confidence_N is not None and len(labels_K) > 1:
        stays_N1 = gather(rows.confidence_N)[:, None]
        upstream_NK = stays_N1 * upstream_NK + (1 - stays_N1) * (1 - upstream_NK) / (len(labels_K) - 1)
    return upstream_NK
