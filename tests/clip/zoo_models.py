"""open_clip's families as models of a second: their own configurations, shrunk, with random weights and small tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models import vitamin

WIDTH = 32
WORDS = ["a", "photo", "of", "circle", "square", "stripes", ".", "the"]
LETTERS = sorted(set("".join(WORDS)))
PREPROCESS = {"mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
CLASSIFIER = {"timm_pool": "avg", "timm_proj": ""}
VITAMIN = vitamin.VitCfg(
    embed_dim=(8, 16, 32),
    depths=(1, 1, 1),
    stem_width=8,
    conv_cfg=vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    head_type="1d",
)
FASTVIT_5 = {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 16, 32, 32, 32)}
FASTVIT = {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: open_clip's model whose configuration is shrunk.
        image_size: side of its images, pixels.
        timm: arguments that shrink its image tower of timm.
        timm_name: another model of timm as image tower; empty: the configuration's.
        vision: other changes of the configuration of the image tower.
        blocks: blocks (stages) that the image tower is cut into; 0: it runs as a whole.
        tokenizer: function that makes its tokenizer; None: open_clip's own.
        text: configuration of its text tower of transformers; None: open_clip's.
    """

    name: str
    image_size: int = 32
    timm: dict[str, Any] = field(default_factory=dict)
    timm_name: str = ""
    vision: dict[str, Any] = field(default_factory=dict)
    blocks: int = 2
    tokenizer: Callable[[], Any] | None = None
    text: Callable[[], Any] | None = None


def _words(specials: list[str]) -> list[str]:
    return (
        specials
        + [f"\N{LOWER ONE EIGHTH BLOCK}{word}" for word in WORDS]
        + ["\N{LOWER ONE EIGHTH BLOCK}"]
        + sorted(set("".join(WORDS)))
    )


def _unigram(specials: list[str]) -> list[tuple[str, float]]:
    return [(word, 0.0 if place < len(specials) else -float(place)) for place, word in enumerate(_words(specials))]


def _ids(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def roberta() -> Any:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"]
    return transformers.RobertaTokenizer(vocab=_ids(words + LETTERS), merges=[])


def xlm_roberta() -> Any:
    return transformers.XLMRobertaTokenizer(vocab=_unigram(["<s>", "<pad>", "</s>", "<unk>"]))


def t5() -> Any:
    return transformers.T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=0)


def nllb() -> Any:
    return transformers.NllbTokenizer(
        vocab=_ids(_words(["<s>", "<pad>", "</s>", "<unk>", "eng_Latn", "fra_Latn"])), merges=[], src_lang="eng_Latn"
    )


def gemma() -> Any:
    return transformers.GemmaTokenizer(vocab=_ids(_words(["<pad>", "<eos>", "<bos>", "<unk>"])), merges=[])


def bert() -> Any:
    return transformers.BertTokenizer(vocab=_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))


SMALL = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}


def roberta_tower() -> Any:
    return transformers.RobertaConfig(vocab_size=64, max_position_embeddings=40, pad_token_id=1, **SMALL)


def xlm_roberta_tower() -> Any:
    return transformers.XLMRobertaConfig(vocab_size=64, max_position_embeddings=40, pad_token_id=1, **SMALL)


def mt5_tower() -> Any:
    return transformers.MT5Config(vocab_size=64, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2)


def nllb_tower() -> Any:
    return transformers.M2M100Config(
        vocab_size=64, d_model=WIDTH, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip


FAMILIES = {
    "ViT": Family("ViT-B-16"),
    "ViT, QuickGELU": Family("ViT-B-16-quickgelu"),
    "ViT, layer scale": Family("ViT-M-16-alt"),
    "CLIPA": Family("ViT-H-14-CLIPA", tokenizer=bert),
    "MetaCLIP 2 (XLM-V)": Family("ViT-H-14-worldwide", tokenizer=xlm_roberta),
    "MetaCLIP 2 (mT5)": Family("ViT-L-14-worldwide", tokenizer=t5),
    "ResNet": Family("RN50", blocks=4),
    "ResNet, QuickGELU": Family("RN50-quickgelu", blocks=4),
    "RoBERTa": Family("roberta-ViT-B-32", tokenizer=roberta, text=roberta_tower),
    "XLM-R": Family("xlm-roberta-base-ViT-B-32", tokenizer=xlm_roberta, text=xlm_roberta_tower),
    "mT5": Family("mt5-base-ViT-B-32", tokenizer=t5, text=mt5_tower),
    "NLLB": Family("nllb-clip-base", tokenizer=nllb, text=nllb_tower),
    "NLLB, SigLIP": Family("nllb-clip-base-siglip", timm=VIT, tokenizer=nllb, text=nllb_tower),
    "SigLIP": Family("ViT-B-16-SigLIP", timm=VIT, tokenizer=t5),
    "SigLIP, i18n": Family("ViT-SO400M-16-SigLIP-i18n-256", timm=VIT, tokenizer=t5),
    "SigLIP 2": Family("ViT-B-16-SigLIP2", timm=VIT, tokenizer=gemma),
    "SigLIP 2, giant": Family("ViT-gopt-16-SigLIP2-256", timm=VIT, tokenizer=gemma),
    "EVA01": Family("EVA01-g-14", timm=VIT),
    "EVA02": Family("EVA02-B-16", timm=VIT),
    "EVA02, enormous": Family("EVA02-E-14", timm=VIT),
    "PE-Core": Family("PE-Core-B-16", timm=VIT | {"ref_feat_shape": (4, 4), "attn_pool_num_heads": 2}),
    "PE-Core, class token": Family("PE-Core-bigG-14-448", timm=VIT | {"ref_feat_shape": (4, 4), "attn_pool_num_heads": 2}),
    "MobileCLIP, ViT": Family("MobileCLIP-B", timm={"depth": 2, "img_size": 32}),
    "MobileCLIP2, ViT": Family("MobileCLIP2-L-14", timm=VIT),
    "MobileCLIP, FastViT": Family("MobileCLIP-S1", image_size=64, timm=FASTVIT, blocks=0),
    "MobileCLIP2, FastViT": Family(
        "MobileCLIP2-S3", image_size=64, timm={"layers": (1,) * 5, "embed_dims": (16, 16, 32, 32, 32)}, blocks=0
    ),
    "ConvNeXt": Family("convnext_base", image_size=64, timm=STAGES, blocks=4),
    "ConvNeXt, mlp": Family("convnext_large_d", image_size=64, timm=STAGES, blocks=4),
    "ConvNeXt, xxlarge": Family("convnext_xxlarge", image_size=64, timm=STAGES, blocks=4),
    "Swin": Family(
        "swin_base_patch4_window7_224",
        timm={"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
        blocks=0,
    ),
    "ViT, average of tokens (timm)": Family("vit_medium_patch16_gap_256", timm=VIT),
    "ViT, relative positions (timm)": Family("vit_relpos_medium_patch16_cls_224", timm=VIT, blocks=0),
    "ViTamin": Family("ViTamin-S", timm=VIT | {"patch_size": 1, "embed_cfg": VITAMIN}),
    "EfficientNet": Family("convnext_base", image_size=64, timm_name="test_efficientnet", blocks=5),
    "MobileNetV3": Family("convnext_base", image_size=64, timm_name="mobilenetv3_small_050", vision=CLASSIFIER, blocks=0),
    "Hiera": Family(
        "convnext_base",
        vision=CLASSIFIER,
        blocks=0,
        timm_name="hiera_tiny_224",
        image_size=64,
        timm={"img_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)},
    ),
}


def register(family: Family) -> str:
    """Return the name under which timm makes the family's image tower small."""
    wanted = family.timm_name or open_clip.get_model_config(family.name)["vision_cfg"]["timm_model_name"]
    name = (
        "zoo_"
        + "".join(letter if letter.isalnum() else "_" for letter in next(k for k, v in FAMILIES.items() if v is family)).lower()
    )

    def make(pretrained: bool = False, **options: Any) -> Any:
        return timm.create_model(wanted, pretrained=False, **{**family.timm, **options})

    make.__name__, make.__module__ = name, __name__
    if not timm.is_model(name):
        timm.models.register_model(make)
    return name


def model_config(family: Family, towers: Path) -> dict[str, Any]:
    """Return open_clip's configuration of the family with everything small.

    Args:
        family: one of `FAMILIES`.
        towers: folder for the configuration of a text tower of transformers.
    """
    config = deepcopy(open_clip.get_model_config(family.name))
    config["embed_dim"] = WIDTH
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision |= {"image_size": family.image_size} | family.vision
    if "timm_model_name" in vision:
        vision["timm_model_name"] = register(family)
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    else:
        vision |= {"patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
        if "attn_pooler_heads" in vision:
            vision["attn_pooler_heads"] = 2
    if family.text is not None:
        family.text().save_pretrained(towers)
        text["hf_model_name"] = str(towers)
    else:
        text |= {"context_length": 32, "width": WIDTH, "heads": 2, "layers": 2}
    if family.tokenizer is not None:
        text |= {"hf_tokenizer_name": "somebody/tokenizer"} | ({} if family.text else {"vocab_size": 64})
    text["context_length"] = 32
    return config


def build(family: Family, folder: Path) -> Path:
    """Write a model of the family with random weights into a folder of open_clip's layout, and return it."""
    folder.mkdir(parents=True)
    config = model_config(family, folder / "towers")
    preprocess = PREPROCESS | {"size": family.image_size}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    if family.tokenizer is not None:
        family.tokenizer().save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
        for parameter in model.parameters():  # scales of layers and heads start so small that every image is the same
            if parameter.ndim and parameter.abs().max() < 0.1:
                torch.nn.init.normal_(parameter, std=0.2)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder
