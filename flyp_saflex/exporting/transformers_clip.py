"""CLIP of open_clip as `CLIPModel` of transformers, with tokenizer and image processor.

Only the architecture of OpenAI's CLIP has a class there: plain vision and text transformers, GELU or QuickGELU.

Shapes: W width, D embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flyp_saflex.clip.model import Clip
from flyp_saflex.errors import ModelError
from flyp_saflex.images.preprocessing import Preprocessing

MODEL = frozenset(("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_scale"))
VISION = frozenset(("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"))
TEXT = frozenset(("layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size", "pad_id", "eos_id"))
NEUTRAL = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
"""Values that say what CLIPModel does anyway; so do None and false."""
NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "transformer.resblocks": "text_model.encoder.layers",
}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
START, END = "<|startoftext|>", "<|endoftext|>"


def check_architecture(config: Mapping[str, Any]) -> None:
    """Check that transformers' `CLIPModel` can be this model.

    Args:
        config: open_clip's `model_cfg` and `preprocess_cfg`.

    Raises:
        ModelError: it cannot; names the option of the architecture.
    """
    model = config["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    strange = [*_strange(model, MODEL), *_strange(vision, VISION, "vision_cfg."), *_strange(text, TEXT, "text_cfg.")]
    if not isinstance(vision.get("layers"), int):
        strange.append(f"vision_cfg.layers = {vision.get('layers')} (a ResNet)")
    if Preprocessing.of(config["preprocess_cfg"]) is None:
        strange.append("preprocess_cfg")
    if strange:
        raise ModelError(
            f"--to transformers: transformers' CLIPModel has no such architecture ({', '.join(strange[:3])}); use --to open_clip "
            "or onnx"
        )


def _strange(section: Mapping[str, Any], known: frozenset[str], where: str = "") -> list[str]:
    return [
        f"{where}{name} = {value}"
        for name, value in section.items()
        if name not in known and value not in (None, False) and value not in NEUTRAL.get(name, ())
    ]


def save_transformers(clip: Clip, folder: Path) -> None:
    """Write a model with its processor as `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` take them.

    Args:
        clip: the model.
        folder: an empty folder.

    Raises:
        ModelError: transformers lacks the architecture.
    """
    from transformers import CLIPModel, CLIPProcessor

    check_architecture(clip.config)
    model = CLIPModel(_config(clip.config["model_cfg"])).eval()
    try:
        model.load_state_dict(renamed(clip.model.state_dict()))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"--to transformers: the weights do not fit CLIPModel ({reason}); use --to open_clip") from None
    model.save_pretrained(folder)
    tokenizer, images = _tokenizer(clip), _image_processor(clip.config["preprocess_cfg"])
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's weights under the names of transformers; query, key and value apart, projections transposed."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = tensor.detach().to("cpu", torch.float32)
        if name in ("visual.proj", "text_projection"):
            found["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T.contiguous()
            continue
        prefix = next((old for old in NAMES if name == old or name.startswith(f"{old}.")), None)
        new = name if prefix is None else NAMES[prefix] + name[len(prefix) :]
        for old, part in PARTS.items():
            new = re.sub(rf"(?<=\.){re.escape(old)}(?=\.)", part, new)
        if packed := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", new):
            for kind, third in zip("qkv", value.chunk(3), strict=True):
                found[f"{packed[1]}.self_attn.{kind}_proj.{packed[2]}"] = third.clone()
        else:
            found[new] = value
    return found


def _config(model: Mapping[str, Any]) -> Any:
    from transformers import CLIPConfig

    vision, text, width = model["vision_cfg"], model["text_cfg"], model["embed_dim"]
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return CLIPConfig(
        projection_dim=width,
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": width,
            "hidden_act": act,
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text["vocab_size"],
            "projection_dim": width,
            "hidden_act": act,
        },
    )


def _tokenizer(clip: Clip) -> Any:
    """Return transformers' tokenizer with the vocabulary of CLIP's own; its two special tokens have other names there."""
    from transformers import CLIPTokenizer

    own: Any = clip.tokenizer
    if not hasattr(own, "bpe_ranks"):
        raise ModelError("--to transformers: the model's tokenizer is not CLIP's own; use --to open_clip")
    vocab = dict(own.encoder)
    ordered = sorted(vocab, key=vocab.__getitem__)
    for old, new in zip(ordered[-2:], (START, END), strict=True):
        vocab[new] = vocab.pop(old)
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=own.context_length)


def _image_processor(preprocess: Mapping[str, Any]) -> Any:
    from transformers import CLIPImageProcessor

    known = Preprocessing.of(preprocess)
    assert known is not None, "checked with the architecture"
    square = {"height": known.size_px, "width": known.size_px}
    return CLIPImageProcessor(
        size=square if known.squash else {"shortest_edge": known.size_px},
        crop_size=square,
        resample=int(known.resample),
        image_mean=list(known.mean),
        image_std=list(known.std),
    )
