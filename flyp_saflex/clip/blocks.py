"""CLIP's transformer blocks without what nobody reads (floor 2: tensors only).

The same mathematics as open_clip's `ResidualAttentionBlock`, to the rounding of its sums, for less:

    run_block            attention straight from one matrix product; `nn.MultiheadAttention` moves the batch to the back and
                         copies
    run_block_for_first  of the last block only the pooled token leaves. Keys and values are needed of every token; the
                         query, its projection and the MLP, five sixths of a block, of one. On CPUs the block then costs a
                         third (width 192) to a sixth (ViT-B/16) of itself, so there is nothing to choose
    the others           parts of which `text.py` makes the blocks of a text tower

Only blocks that `is_plain_block` knows are run in this way; others run as they are. All of it can be differentiated forwards and
backwards, and under autocast. Shapes: N sequences, L tokens, W width, H heads, V width of a head.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def is_plain_block(block: Any) -> bool:
    """Return whether a block is open_clip's usual one, without extras in its attention and without hooks to be called."""
    attention = getattr(block, "attn", None)
    return (
        type(block).__name__ == "ResidualAttentionBlock"
        and not hasattr(block, "ln_1_kv")
        and type(attention) is nn.MultiheadAttention
        and attention.in_proj_weight is not None
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and attention.dropout == 0.0
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (block, attention))
    )


def run_block(block: Any, hidden_NLW: Tensor) -> Tensor:
    """Run a block: every token attends to every token."""
    attention = block.attn
    parts = F.linear(block.ln_1(hidden_NLW), attention.in_proj_weight, attention.in_proj_bias)
    query, keys, values = heads(parts, 3, attention.num_heads)
    return rest(block, hidden_NLW, merge(F.scaled_dot_product_attention(query, keys, values)))


def run_block_for_first(block: Any, hidden_NLW: Tensor) -> Tensor:
    """Run a block for its first token alone, which attends to every token; return [N, 1, W]."""
    attention, normed_NLW = block.attn, block.ln_1(hidden_NLW)
    (query,) = heads(project_query(attention, normed_NLW[:, :1]), 1, attention.num_heads)
    keys, values = heads(project_keys_values(attention, normed_NLW), 2, attention.num_heads)
    return rest(block, hidden_NLW[:, :1], merge(F.scaled_dot_product_attention(query, keys, values)))


def project_query(attention: nn.MultiheadAttention, normed: Tensor) -> Tensor:
    """Return the query of normalised tokens, both [..., W]."""
    width = attention.embed_dim
    return F.linear(normed, attention.in_proj_weight[:width], attention.in_proj_bias[:width])


def project_keys_values(attention: nn.MultiheadAttention, normed: Tensor) -> Tensor:
    """Return keys and values side by side [..., 2 W] of normalised tokens [..., W]."""
    width = attention.embed_dim
    return F.linear(normed, attention.in_proj_weight[width:], attention.in_proj_bias[width:])


def heads(projected: Tensor, count: int, num_heads: int) -> tuple[Tensor, ...]:
    """Cut [N, L, count * W] into views [N, H, L, V], so that their gradients come back in a single copy."""
    return tuple(part.transpose(1, 2) for part in projected.unflatten(2, (count, num_heads, -1)).unbind(2))


def merge(mixed_NHLV: Tensor) -> Tensor:
    """Put the heads of every token side by side again: [N, L, W]."""
    return mixed_NHLV.transpose(1, 2).flatten(2)


def rest(block: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    """Return what leaves a block, given what entered it and what its heads put together, both [..., W]."""
    hidden = hidden + block.ls_1(block.attn.out_proj(mixed))
    leaving: Tensor = hidden + block.ls_2(block.mlp(block.ln_2(hidden)))
    return leaving
