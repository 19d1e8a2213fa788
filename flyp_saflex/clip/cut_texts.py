"""Texts longer than a text tower's context, whose end it does not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def cut_texts(tokenizer: Callable[..., Any], texts: Sequence[str], tokens_ML: Tensor) -> list[int]:
    """Return the positions of the texts that the context length cuts.

    A text that fits gives the same tokens and padding with one place more. Only texts that fill the context are tokenized again.

    Args:
        tokenizer: open_clip's: (texts, context_length) -> long tensor [M, context_length].
        texts: M texts.
        tokens_ML: their tokens at the model's context length L.
    """
    if not len(texts):
        return []
    longer = tokens_ML.shape[1] + 1
    padding = tokenizer(["a"], context_length=longer)[0, -1].to(tokens_ML.device)
    # Where the end token is the padding, too, a full row ends in one of them and a padded one in several.
    is_full_M = (tokens_ML[:, -1] != padding) | (tokens_ML[:, -1] != tokens_ML[:, -2])
    full = torch.nonzero(is_full_M).flatten().tolist()
    if not full:
        return []
    more_FL = tokenizer([texts[position] for position in full], context_length=longer).to(tokens_ML.device)
    is_cut_F = (more_FL[:, :-1] != tokens_ML[full]).any(dim=1) | (more_FL[:, -1] != padding)
    return [position for position, is_cut in zip(full, is_cut_F.tolist(), strict=True) if is_cut]


def note_on_cut_texts(tokenizer: Callable[..., Any], texts: Sequence[str], tokens_ML: Tensor) -> str:
    """Return a sentence on captions whose end the model does not read; empty if there is none.

    Args:
        tokenizer: as for `cut_texts`.
        texts: M distinct captions.
        tokens_ML: their tokens.
    """
    cut = cut_texts(tokenizer, texts, tokens_ML)
    if not cut:
        return ""
    merged = len(cut) - len(torch.unique(tokens_ML[cut], dim=0))
    alike = f"; {merged} of them begin like another one and are the same to the model" if merged else ""
    return (
        f"{len(cut)} of {len(texts)} captions are longer than the model's {tokens_ML.shape[1]} tokens, what is behind is not read"
        f"{alike}; first: '{texts[cut[0]][:60]}...': put the class at the beginning, or shorten them"
    )
