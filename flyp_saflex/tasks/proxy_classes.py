"""Proxy classes: the captions of a batch as its label space (FLYP, arXiv 2212.00638; SAFLEX, Eq. 13-14).

Each distinct caption is encoded once. Rows that are dropped later keep their columns: which rows are dropped is decided
after the columns are.

Shapes: N rows of all processes, C columns, K distinct captions, M captions that can occur, L tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flyp_saflex.tasks.label_space import Gather, LabelSpace, Rows, assignment, augmented_rows, upstream_labels

Proxies = Literal["captions", "batch"]


def proxy_space(rows: Rows, caption_tokens_ML: Tensor, same_M: Tensor, proxies: Proxies, gather: Gather) -> LabelSpace:
    """Return the captions of the whole batch as label space.

    Args:
        rows: this process's rows.
        caption_tokens_ML: tokens of every caption that can occur.
        same_M: `first_with_equal_tokens` of them.
        proxies: `captions`: every distinct caption is one column; `batch`: one column per row (of unmixed rows).
        gather: concatenation over processes.
    """
    own_N = gather(same_M[rows.captions_N])
    partner_N = None if rows.partners_N is None else gather(same_M[rows.partners_N])
    labels_K = torch.unique(own_N if partner_N is None else torch.cat([own_N, partner_N]))
    has_row_columns = proxies == "batch" and partner_N is None
    columns_C = own_N if has_row_columns else labels_K
    inverse_C = torch.searchsorted(labels_K, columns_C)
    upstream_NK = upstream_labels(rows, own_N, partner_N, labels_K, gather)
    tokens_KL, augmented_N = caption_tokens_ML[labels_K], augmented_rows(rows, gather)
    return LabelSpace(labels_K, columns_C, inverse_C, tokens_KL, upstream_NK, augmented_N, has_row_columns)


def proxy_columns(caption_ids_N: Tensor, proxies: Proxies = "captions") -> tuple[Tensor, Tensor]:
    """Return the proxy classes of a batch, as the caption id of every column, and plain FLYP's assignment of its rows.

    Args:
        caption_ids_N: an integer per row; equal captions have equal ids.
        proxies: `captions`: every distinct caption is one column, in the order of the ids, and each row is assigned to its
            own; `batch`: one column per row, as FLYP was published: the assignment is the identity, even where captions
            repeat.

    Returns:
        columns_C and assignment_NC (float32).
    """
    if proxies == "batch":
        return caption_ids_N, torch.eye(len(caption_ids_N), device=caption_ids_N.device)
    columns_C = torch.unique(caption_ids_N, sorted=True)
    return columns_C, assignment(caption_ids_N, columns_C)


def first_with_equal_tokens(tokens_ML: Tensor) -> Tensor:
    """Return, for every caption, the first one that reads the same to the text tower.

    Captions that differ in case only (iWildCam has "Lowland paca" and "lowland paca") are one proxy class: as two, their
    logits would tie and push against each other for nothing.
    """
    _, inverse_M = torch.unique(tokens_ML, dim=0, return_inverse=True)
    ids_M = torch.arange(len(tokens_ML), device=tokens_ML.device)
    first_U = torch.full_like(ids_M, len(ids_M)).scatter_reduce(0, inverse_M, ids_M, "amin")
    return first_U[inverse_M]
