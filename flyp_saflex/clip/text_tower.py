"""Text tower that computes every shared caption prefix once.

Attention is causal: the state of a token depends on the tokens up to it only. The first five tokens of "a photo of a cat." and
"a photo of a dog." therefore have equal states in every block, and the captions of a batch form a prefix tree:

    SOT - a - photo - of - a +- cat - . - EOT    M nodes, one per distinct prefix: norms, projections, MLPs
                             +- dog - . - EOT    U x L positions in distinct texts: attention, 1 % of the work

Tokens after the EOT token are not computed, and the last block is computed for the EOT token only. The 182 class captions of
iWildCam have 909 nodes, instead of 14,014 tokens in full contexts of 77. Loss and gradients equal those of the full
computation up to the rounding of sums.

Shapes: N texts, U distinct texts, L positions up to the last EOT token, M nodes, W width, H heads, V width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flyp_saflex.clip import blocks
from flyp_saflex.clip.image_tower import MAX_ERROR
from flyp_saflex.saflex.losses import at_least_float32


def encode_text(model: Any, tokens_NL: Tensor) -> Tensor:
    """Encode texts without repeated or unused computation.

    Towers without causal attention, or with another pooling than the EOT token, run open_clip's own full computation, as do those
    that `check_text` found to differ; causal towers with other blocks run all texts up to the last EOT token.

    Args:
        model: module of open_clip.
        tokens_NL: token ids of at least one text; repeated texts cost nothing.

    Returns:
        Embeddings [N, D], not normalised.
    """
    if getattr(model, "reads_whole_texts", False):
        return model.encode_text(tokens_NL)
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


def token_embedding_parameters(model: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters of the token embedding, open_clip's or that of a text tower of transformers."""
    tower = getattr(model, "text", model)
    embedding = getattr(tower, "token_embedding", None) or tower.transformer.get_input_embeddings()
    yield from embedding.parameters()


def recompute_texts(model: Any) -> None:
    """Let the text tower recompute its activations in the backward pass (gradient checkpointing)."""
    transformer = getattr(model, "text", model).transformer
    if hasattr(transformer, "grad_checkpointing"):
        transformer.grad_checkpointing = True
        return
    # Transformers: the name changed with version 5.20. Its hook on the embeddings serves adapters, and fails in a derivative.
    enable = getattr(transformer, "activation_checkpointing_enable", None) or transformer.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    transformer.disable_input_require_grads()


@torch.no_grad()
def check_text(model: Any, tokenizer: Callable[[list[str]], Tensor]) -> str:
    """Compare `encode_text` with open_clip's own on two texts, and use the latter where they differ.

    Args:
        model: module of open_clip, in evaluation mode; that its texts are read whole is noted on it.
        tokenizer: list of N texts -> long tensor [N, L].

    Returns:
        A note if texts are read whole although the tower's structure suggests otherwise, else the empty string.
    """
    tokens_2L = tokenizer(["a", "a photo of a cat."]).to(next(model.parameters()).device)
    whole_2D = model.encode_text(tokens_2L)
    try:
        error = float((encode_text(model, tokens_2L) - whole_2D).norm() / whole_2D.norm())
    except Exception as found:  # whatever a module raises that was meant to be called in another way
        reason = f"fails ({(str(found) or type(found).__name__).splitlines()[0][:80]})"
    else:
        if error < MAX_ERROR:
            return ""
        reason = f"gives another embedding (relative difference {error:.1g})"
    model.reads_whole_texts = True
    return f"text tower {type(getattr(model, 'text', model)).__name__}: without its padding it {reason}, so texts are read whole"


@dataclass(frozen=True)
class PrefixTree:
    """Prefix tree of a batch of texts; a node is a distinct prefix.

    Attributes:
        tokens_M: last token of every prefix.
        positions_M: position of that token in its text.
        nodes_UL: node at every position of every distinct text; after the EOT token any valid node, whose state is not used.
        places_M: one position of every node, as an index into the flattened U x L.
        lengths_U: number of tokens of every distinct text, including the EOT token.
        distinct_N: index of the distinct text that equals each text.
    """

    tokens_M: Tensor
    positions_M: Tensor
    nodes_UL: Tensor
    places_M: Tensor
    lengths_U: Tensor
    distinct_N: Tensor

    @property
    def ends(self) -> Tensor:
        """Node of the EOT token of every distinct text [U]."""
        return self.nodes_UL.gather(1, self.lengths_U[:, None] - 1)[:, 0]


def prefix_tree(tokens_NL: Tensor) -> PrefixTree:
    """Build the prefix tree of texts; the EOT token is the largest token id.

    Args:
        tokens_NL: token ids of at least one text; tokens after the EOT token are ignored.
    """
    ends_N = tokens_NL.argmax(dim=1)
    length = int(ends_N.max()) + 1
    places_L = torch.arange(length, device=tokens_NL.device)
    read_NL = torch.where(places_L <= ends_N[:, None], tokens_NL[:, :length], -1)
    texts_UL, distinct_N = torch.unique(read_NL, dim=0, return_inverse=True)
    # `unique` sorts the texts, so that common prefixes are adjacent: a node is new where a text differs from the one before.
    read_UL = texts_UL >= 0
    shared_UL = torch.zeros_like(read_UL)
    shared_UL[1:] = (texts_UL[1:] == texts_UL[:-1]).cumprod(dim=1).bool()
    places_M = (read_UL & ~shared_UL).flatten().nonzero()[:, 0]
    numbers = torch.full_like(texts_UL, 0).flatten()
    numbers[places_M] = torch.arange(len(places_M), device=tokens_NL.device)
    return PrefixTree(
        tokens_M=texts_UL.flatten()[places_M],
        positions_M=places_M % length,
        nodes_UL=numbers.view_as(texts_UL).cummax(dim=0).values,  # a shared position takes the newest node of its column
        places_M=places_M,
        lengths_U=read_UL.sum(dim=1),
        distinct_N=distinct_N,
    )


def _pooled_of_tree(tower: Any, tree: PrefixTree) -> Tensor:
    """Return the output of the last block at the EOT token of every text [N, W]."""
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
    """Return the output of a block at the EOT token of every distinct text [U, W]."""
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
    """Select rows of a table, possibly repeated.

    Gradients of repeated rows are summed in float32 or better: hundreds of texts share a prefix, and a bf16 sum of so many
    terms would lose the last ones.
    """
    return at_least_float32(table).index_select(0, index).to(table.dtype)
