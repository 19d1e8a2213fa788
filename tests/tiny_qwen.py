"""Tiny Qwen2.5-VL: the configuration and the tokenizer of one token per byte, of which editors and captioners are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer


def byte_tokenizer(special: Sequence[str], **more: Any) -> Qwen2Tokenizer:
    """Return a tokenizer without merges.

    Args:
        special: tokens that are never split.
        more: further special tokens by name, such as `pad_token`.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={piece: number for number, piece in enumerate(letters)}, merges=[], unk_token=None)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special), **more})
    return tokenizer


def qwen_vl_config(tokenizer: Qwen2Tokenizer, **text: Any) -> Qwen2_5_VLConfig:
    """Return the configuration of a model of width 16: two layers of text, one of vision.

    Args:
        tokenizer: with the vision tokens.
        text: further options of the text model.
    """
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            **text,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        **ids,
    )
