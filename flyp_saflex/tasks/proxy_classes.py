"""What a step's rows are told apart by: captions or classes as columns, over all processes (floor 2: tensors only).

FLYP's columns are the captions of the whole batch, each distinct one encoded once; cross entropy's are the classes. Rows
that are dropped later keep their columns: which rows are dropped is decided after the columns are.

Shapes: N rows of all processes, C columns, K label choices (distinct captions, or classes), U texts to encode (U = K),
M captions that can occur, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flyp_saflex.saflex import losses

Proxies = Literal["captions", "batch"]


@dataclass
class Rows:
    """One process's rows of a part of a step; N and A are local here. Training rows come first.

    Attributes:
        inputs: what the learner's image tower takes.
        captions_N: caption id of every row.
        labels_N: class index of every row.
        ids_N: identity of an augmented row (index of the edit or sample), for states kept between visits.
        num_train: T.
        partners_N, partner_labels_N, share_N: Mixup and CutMix: the other caption and class, and the part of the row's
            label that stays its own; None without mixing.
    """

    inputs: Tensor
    captions_N: Tensor
    labels_N: Tensor
    ids_N: Tensor
    num_train: int
    partners_N: Tensor | None = None
    partner_labels_N: Tensor | None = None
    share_N: Tensor | None = None


@dataclass
class Columns:
    """Columns of a step, over all processes.

    Attributes:
        choices_K: what a label can be: distinct caption ids, or classes.
        columns_C: the choice that every column of the loss stands for.
        inverse_C: row of `tokens_UL` of every column.
        tokens_UL: tokens to encode, each distinct caption once (U = K).
        upstream_NK: labels that the rows came with.
        augmented_N: which rows are augmented.
    """

    choices_K: Tensor
    columns_C: Tensor
    inverse_C: Tensor
    tokens_UL: Tensor
    upstream_NK: Tensor
    augmented_N: Tensor

    def upstream_assignment(self) -> Tensor:
        """Return the mass of every row's own label over the columns [N, C]."""
        return losses.spread_over_columns(self.upstream_NK, self.choices_K, self.columns_C)


def caption_columns(
    rows: Rows, caption_tokens_ML: Tensor, same_M: Tensor, proxies: Proxies, gather: Callable[[Tensor], Tensor]
) -> Columns:
    """Return the columns of the contrastive loss: the captions of the whole batch.

    Args:
        rows: this process's rows.
        caption_tokens_ML: tokens of every caption that can occur.
        same_M: `first_with_equal_tokens` of them.
        proxies: `captions`: every distinct caption once; `batch`: one column per row (of unmixed rows).
        gather: concatenation over processes.
    """
    own_N = gather(same_M[rows.captions_N])
    partner_N = None if rows.partners_N is None else gather(same_M[rows.partners_N])
    choices_K = torch.unique(own_N if partner_N is None else torch.cat([own_N, partner_N]))
    columns_C = own_N if proxies == "batch" and partner_N is None else choices_K
    inverse_C = torch.searchsorted(choices_K, columns_C)
    upstream_NK = _upstream(rows, own_N, partner_N, choices_K, gather)
    return Columns(choices_K, columns_C, inverse_C, caption_tokens_ML[choices_K], upstream_NK, _augmented(rows, gather))


def class_columns(rows: Rows, tokens_KL: Tensor, gather: Callable[[Tensor], Tensor]) -> Columns:
    """Return the columns of cross entropy: the classes, by their captions' tokens."""
    classes_K = torch.arange(len(tokens_KL), device=rows.labels_N.device)
    partner_N = None if rows.partner_labels_N is None else gather(rows.partner_labels_N)
    upstream_NK = _upstream(rows, gather(rows.labels_N), partner_N, classes_K, gather)
    return Columns(classes_K, classes_K, classes_K, tokens_KL, upstream_NK, _augmented(rows, gather))


def first_with_equal_tokens(tokens_ML: Tensor) -> Tensor:
    """Return, for every caption, the first one that reads the same to the text tower.

    Captions that differ in case only (iWildCam has "Lowland paca" and "lowland paca") are one proxy class: as two, their
    logits would tie and push against each other for nothing.
    """
    _, inverse_M = torch.unique(tokens_ML, dim=0, return_inverse=True)
    ids_M = torch.arange(len(tokens_ML), device=tokens_ML.device)
    first_U = torch.full_like(ids_M, len(ids_M)).scatter_reduce(0, inverse_M, ids_M, "amin")
    return first_U[inverse_M]


def _augmented(rows: Rows, gather: Callable[[Tensor], Tensor]) -> Tensor:
    own_N = torch.arange(len(rows.labels_N), device=rows.labels_N.device) >= rows.num_train
    return gather(own_N.long()).bool()


def _upstream(
    rows: Rows, own_N: Tensor, partner_N: Tensor | None, choices_K: Tensor, gather: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the labels that rows came with [N, K]: one-hot, or two shares where rows were mixed."""
    upstream_NK = losses.assignment(own_N, choices_K)
    if partner_N is None:
        return upstream_NK
    assert rows.share_N is not None, "mixed rows say how much of their label is their own"
    share_N1 = gather(rows.share_N)[:, None]
    return share_N1 * upstream_NK + (1 - share_N1) * losses.assignment(partner_N, choices_K)
