"""The text tower, every prefix that captions share computed once (floor 2: tensors only).

Attention is causal, so the state of a token depends on the tokens before it alone: the first five tokens of "a photo of a
cat." and "a photo of a dog." have the same states in every block. The captions of a batch are a tree of prefixes:

    start - a - photo - of - a +- cat - . - end    M nodes, one per distinct prefix: norms, projections, MLPs
                               +- dog - . - end    U x L places in distinct texts: attention, which is 1 % of the work

Behind its end token nothing of a text is read, and in the last block only the end token is. iWildCam's 182 class captions
have 909 nodes, in contexts of 77 tokens 14,014. Loss and gradients are those of the whole, to the rounding of sums.

Shapes: N texts, U distinct ones, L places up to the longest end, M nodes, W width, H heads, V width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flyp_saflex.clip import blocks
from flyp_saflex.saflex.losses import at_least_float32


def encode_text(model: Any, tokens_NL: Tensor) -> Tensor:
    """Encode texts, computing nothing twice and nothing that is not read.

    Towers whose attention is not causal, or that pool another token than the end, take the whole context; towers with
    blocks of another kind read all texts up to the longest end.

    Args:
        model: open_clip's module.
        tokens_NL: at least one text; repeats cost nothing.

    Returns:
        Embeddings [N, D], not normalised.
    """
    tower = getattr(model, "text", model)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
    mask = getattr(tower, "attn_mask", None)
    if pool != "argmax" or not plain or mask is None or not hasattr(tower, "token_embedding"):
        return model.encode_text(tokens_NL)
    if all(blocks.is_plain_block(block) for block in tower.transformer.resblocks):
        pooled_NW = tower.ln_final(_pooled_of_tree(tower, prefix_tree(tokens_NL)))
    else:
        ends_N = tokens_NL.argmax(dim=-1)
        length = int(ends_N.max()) + 1
        hidden_NLW = tower.token_embedding(tokens_NL[:, :length]) + tower.positional_embedding[:length]
        hidden_NLW = tower.ln_final(tower.transformer(hidden_NLW, attn_mask=mask[:length, :length]))
        pooled_NW = hidden_NLW[torch.arange(len(ends_N), device=ends_N.device), ends_N]
    projection = tower.text_projection
    if projection is None:
        return pooled_NW
    return projection(pooled_NW) if isinstance(projection, nn.Module) else pooled_NW @ projection


@dataclass(frozen=True)
class PrefixTree:
    """The distinct prefixes of texts.

    Attributes:
        tokens_M, positions_M: last token of every prefix, and its place in its text.
        nodes_UL: prefix at every place of every distinct text; behind a text's end any node, which no one may read.
        places_M: a place (index into U x L) where the prefix stands.
        lengths_U: tokens of every distinct text, its end included.
        distinct_N: which distinct text a text is.
    """

    tokens_M: Tensor
    positions_M: Tensor
    nodes_UL: Tensor
    places_M: Tensor
    lengths_U: Tensor
    distinct_N: Tensor

    @property
    def ends(self) -> Tensor:
        """Node of every distinct text's end [U]."""
        return self.nodes_UL.gather(1, self.lengths_U[:, None] - 1)[:, 0]


def prefix_tree(tokens_NL: Tensor) -> PrefixTree:
    """Find the prefixes of texts that end at their largest token."""
    ends_N = tokens_NL.argmax(dim=1)
    length = int(ends_N.max()) + 1
    places_L = torch.arange(length, device=tokens_NL.device)
    read_NL = torch.where(places_L <= ends_N[:, None], tokens_NL[:, :length], -1)
    texts_UL, distinct_N = torch.unique(read_NL, dim=0, return_inverse=True)
    # Sorted, texts with a common prefix stand together: a node is new where a text differs from the one before it.
    read_UL = texts_UL >= 0
    shared_UL = torch.zeros_like(read_UL)
    shared_UL[1:] = (texts_UL[1:] == texts_UL[:-1]).cumprod(dim=1).bool()
    places_M = (read_UL & ~shared_UL).flatten().nonzero()[:, 0]
    numbers = torch.full_like(texts_UL, 0).flatten()
    numbers[places_M] = torch.arange(len(places_M), device=tokens_NL.device)
    return PrefixTree(
        tokens_M=texts_UL.flatten()[places_M],
        positions_M=places_M % length,
        nodes_UL=numbers.view_as(texts_UL).cummax(dim=0).values,  # the newest node of the column is the one that is shared
        places_M=places_M,
        lengths_U=read_UL.sum(dim=1),
        distinct_N=distinct_N,
    )


def _pooled_of_tree(tower: Any, tree: PrefixTree) -> Tensor:
    """Return what leaves the last block at the end of every text [N, W]."""
    *before, last = tower.transformer.resblocks
    hidden_MW = tower.token_embedding(tree.tokens_M) + tower.positional_embedding[tree.positions_M]
    for block in before:
        if tower.transformer.grad_checkpointing and hidden_MW.requires_grad:
            hidden_MW = checkpoint(_block_of_tree, block, hidden_MW, tree, use_reentrant=False)
        else:
            hidden_MW = _block_of_tree(block, hidden_MW, tree)
    return _last_block_of_tree(last, hidden_MW, tree).index_select(0, tree.distinct_N)


def _block_of_tree(block: Any, hidden_MW: Tensor, tree: PrefixTree) -> Tensor:
    attention, (num_texts, length) = block.attn, tree.nodes_UL.shape
    projected_MX = F.linear(block.ln_1(hidden_MW), attention.in_proj_weight, attention.in_proj_bias)
    projected_ULX = _rows(projected_MX, tree.nodes_UL.flatten()).view(num_texts, length, -1)
    query, keys, values = blocks.heads(projected_ULX, 3, attention.num_heads)
    mixed_ULW = blocks.merge(F.scaled_dot_product_attention(query, keys, values, is_causal=True))
    return blocks.rest(block, hidden_MW, mixed_ULW.flatten(0, 1).index_select(0, tree.places_M))


def _last_block_of_tree(block: Any, hidden_MW: Tensor, tree: PrefixTree) -> Tensor:
    """Return what leaves a block at the end of every distinct text [U, W]."""
    attention, (num_texts, length) = block.attn, tree.nodes_UL.shape
    normed_MW, ends_U = block.ln_1(hidden_MW), tree.ends
    (query,) = blocks.heads(blocks.project_query(attention, normed_MW.index_select(0, ends_U)[:, None]), 1, attention.num_heads)
    projected_MX = blocks.project_keys_values(attention, normed_MW)
    projected_ULX = _rows(projected_MX, tree.nodes_UL.flatten()).view(num_texts, length, -1)
    keys, values = blocks.heads(projected_ULX, 2, attention.num_heads)
    read_U11L = (torch.arange(length, device=ends_U.device) < tree.lengths_U[:, None])[:, None, None]
    mixed_U1W = blocks.merge(F.scaled_dot_product_attention(query, keys, values, attn_mask=read_U11L))
    return blocks.rest(block, hidden_MW.index_select(0, ends_U), mixed_U1W[:, 0])


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Return rows of a table, repeats allowed.

    Their gradients are summed in float32 at least: hundreds of texts share a prefix, and in bf16 the last of so many terms
    would be lost.
    """
    return at_least_float32(table).index_select(0, index).to(table.dtype)
