"""Transformer blocks of CLIP without unused computation.

Equal to open_clip's `ResidualAttentionBlock` up to the rounding of sums, at lower cost:

    run_block            query, key and value from one matrix product, without the transposed copies of
                         `nn.MultiheadAttention`
    run_block_for_first  the last block for the pooled token only. Keys and values are computed for every token; query,
                         output projection and MLP, five sixths of a block, for one. On CPUs this costs a third (width 192)
                         to a sixth (ViT-B/16) of the full block, so it is always used
    other functions      parts of a block, which `text_tower.py` combines

Only blocks that pass `is_plain_block` are run in this way; others are called unchanged. All functions support forward- and
reverse-mode differentiation and autocast. Shapes: N sequences, L tokens, W width, H heads, V width of a head.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from flyp_saflex.clip.lora import is_attention


def is_plain_block(block: Any) -> bool:
    """Return whether a block is open_clip's standard block, without attention extras, attention dropout or hooks."""
    attention: Any = getattr(block, "attn", None)
    return (
        type(block).__name__ == "ResidualAttentionBlock"
        and not hasattr(block, "ln_1_kv")
        and is_attention(attention)
        and attention.in_proj_weight is not None
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and attention.dropout == 0.0
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (block, attention))
    )


def run_block(block: Any, hidden_NLW: Tensor) -> Tensor:
    """Run a block with attention of every token to every token.

    Args:
        block: a plain block (see `is_plain_block`).
        hidden_NLW: its input.

    Returns:
        Its output [N, L, W].
    """
    attention = block.attn
    parts = F.linear(block.ln_1(hidden_NLW), attention.in_proj_weight, attention.in_proj_bias)
    query, keys, values = heads(parts, 3, attention.num_heads)
    return rest(block, hidden_NLW, merge(F.scaled_dot_product_attention(query, keys, values)))


def run_block_for_first(block: Any, hidden_NLW: Tensor) -> Tensor:
    """Run a block for the first token only, which attends to every token.

    Args:
        block: a plain block (see `is_plain_block`).
        hidden_NLW: its input; the first token is the one to be pooled.

    Returns:
        Output of the first token [N, 1, W].
    """
    attention, normed_NLW = block.attn, block.ln_1(hidden_NLW)
    (query,) = heads(project_query(attention, normed_NLW[:, :1]), 1, attention.num_heads)
    keys, values = heads(project_keys_values(attention, normed_NLW), 2, attention.num_heads)
    return rest(block, hidden_NLW[:, :1], merge(F.scaled_dot_product_attention(query, keys, values)))


def project_query(attention: nn.MultiheadAttention, normed: Tensor) -> Tensor:
    """Project normalised tokens [..., W] to queries [..., W]."""
    width = attention.embed_dim
    return F.linear(normed, attention.in_proj_weight[:width], attention.in_proj_bias[:width])


def project_keys_values(attention: nn.MultiheadAttention, normed: Tensor) -> Tensor:
    """Project normalised tokens [..., W] to concatenated keys and values [..., 2 W]."""
    width = attention.embed_dim
    return F.linear(normed, attention.in_proj_weight[width:], attention.in_proj_bias[width:])


def heads(projected: Tensor, count: int, num_heads: int) -> tuple[Tensor, ...]:
    """Split [N, L, count * W] into `count` views [N, H, L, V].

    They are views of one tensor, so that the backward pass writes their gradients with a single copy.
    """
    return tuple(part.transpose(1, 2) for part in projected.unflatten(2, (count, num_heads, -1)).unbind(2))


def merge(mixed_NHLV: Tensor) -> Tensor:
    """Concatenate the heads of every token: [N, H, L, V] -> [N, L, W]."""
    return mixed_NHLV.transpose(1, 2).flatten(2)


def rest(block: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    """Apply the rest of a block after attention: output projection, residual connections, MLP.

    Args:
        block: a plain block.
        hidden: input of the block [..., W].
        mixed: merged output of the attention heads [..., W].

    Returns:
        Output of the block [..., W].
    """
    hidden = hidden + block.ls_1(block.attn.out_proj(mixed))
    leaving: Tensor = hidden + block.ls_2(block.mlp(block.ln_2(hidden)))
    return leaving
