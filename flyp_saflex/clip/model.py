"""CLIP models of open_clip: loading, saving, tokeniser. With `weights_files.py` the only user of open_clip.

Shapes: S side of the square images in pixels, N texts, L tokens.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from flyp_saflex.clip.foreign_code import check_config, no_remote_code
from flyp_saflex.clip.image_tower import check_cut
from flyp_saflex.clip.lora import plain_state
from flyp_saflex.clip.text_tower import check_text
from flyp_saflex.clip.weights_files import foreign_form, notes_on_file, published_preprocessing
from flyp_saflex.errors import ModelError, nearest

RANDOM = "random"
"""Value of `model.pretrained` for untrained weights, which must be requested explicitly."""
TEXT_TOWER = "text_tower"
"""Folder in a saved model with the configuration of a text tower of transformers."""


@dataclass
class Clip:
    """CLIP model with its preprocessing, tokeniser and configuration.

    Attributes:
        model: open_clip's module, float32, in evaluation mode.
        preprocess: evaluation transform, image -> float tensor [3, S, S].
        tokenizer: list of N texts -> long tensor [N, L].
        config: open_clip's `model_cfg` and `preprocess_cfg`, as written to open_clip_config.json.
        notes: what was taken for weights of a file, which do not say it; towers that run whole.
        fixed: names of parameters that are never trained, as they were built: position embeddings by a formula.
    """

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()

    @property
    def image_size_px(self) -> int:
        """Side of the square input images, in pixels."""
        size = self.config["preprocess_cfg"]["size"]
        return int(size if isinstance(size, int) else size[0])


def load_clip(name: str, pretrained: str = "", *, device: str | torch.device = "cpu") -> Clip:
    """Load an open_clip model with its weights.

    Args:
        name: built-in name, `hf-hub:org/name` or `local-dir:folder`.
        pretrained: tag or checkpoint file of a built-in model; ignored for the other two kinds, which include their
            weights; `random` for untrained weights (drawn from torch's generator).
        device: device of the model.

    Returns:
        The model, float32, in evaluation mode.

    Raises:
        ModelError: unknown name or tag (with the nearest known one), weights that cannot be loaded, or a configuration that
            could run code (see `foreign_code.check_config`).
    """
    known = open_clip.list_models()
    local = name.startswith(("hf-hub:", "local-dir:"))
    if not local and name not in known:
        raise ModelError(
            f"model.name = {name}: open_clip has no such model{nearest(name, known)}, or use hf-hub:... or local-dir:..."
        )
    options: dict[str, Any] = {"device": device, "precision": "fp32"}
    if pretrained == RANDOM:
        options |= {"load_weights": False, "pretrained_text": False}
    elif not local:
        _check_tag(name, pretrained)
        options["pretrained"] = pretrained
        # OpenAI's weights were trained with QuickGELU; open_clip only warns when the named architecture has GELU.
        tag = open_clip.get_pretrained_cfg(name, pretrained) or {}
        if tag.get("quick_gelu"):
            options["force_quick_gelu"] = True
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip and the hub log every attempt; the error below states the reason
    try:
        model_cfg = _model_config(name)
        if "multimodal_cfg" in model_cfg:
            raise ModelError(
                f"model.name = {name}: CoCa's captioning loss has no place in FLYP; use the CLIP model of the same size"
            )
        if text_tower := _saved_text_tower(name, model_cfg):
            options["text_cfg"] = model_cfg["text_cfg"] | {"hf_model_name": text_tower, "hf_model_pretrained": False}
        # A tokeniser of transformers takes the argument; open_clip's own tokeniser runs no code and knows no such argument.
        trust = {"trust_remote_code": False} if model_cfg["text_cfg"].get("hf_tokenizer_name") else {}
        with warnings.catch_warnings(), no_remote_code():
            warnings.simplefilter("ignore", UserWarning)
            model = open_clip.create_model(name, require_pretrained=pretrained != RANDOM, **options)
            tokenizer = open_clip.get_tokenizer(name, **trust)
    except ModelError:
        raise
    except Exception as error:  # open_clip raises a dozen types here, hub clients a dozen more
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        if foreign := foreign_form(name, pretrained):
            raise ModelError(f"model.name = {name}, model.pretrained = {pretrained or '(none)'}: {foreign}") from error
        raise ModelError(
            f"model.name = {name}, model.pretrained = {pretrained or '(none)'}: the weights cannot be loaded ({reason}); "
            "without a network, give model.name=local-dir:FOLDER or the path of a checkpoint file as model.pretrained (for "
            "OpenAI's weights with a model.name that ends in -quickgelu)"
        ) from error
    finally:
        logging.disable(disabled)
    preprocess_cfg = dict(model.visual.preprocess_cfg)
    if options.get("force_quick_gelu"):
        model_cfg["quick_gelu"] = True
    notes: list[str] = []
    if not local and pretrained != RANDOM and pretrained not in open_clip.list_pretrained_tags_by_model(name):
        if published := published_preprocessing(name):
            preprocess_cfg |= published
        quick_gelu = bool(model_cfg.get("quick_gelu"))
        notes = notes_on_file(name, pretrained, model, quick_gelu=quick_gelu, preprocess_cfg=preprocess_cfg)
    fixed = frozenset(key for key, parameter in model.named_parameters() if not parameter.requires_grad)
    transform = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    clip = Clip(model.eval(), transform, tokenizer, config, tuple(notes), fixed)
    try:
        checked = [check_cut(model.visual, clip.image_size_px), check_text(model, tokenizer)]
    except Exception as error:  # a tower of another library can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ModelError(
            f"model.name = {name}: it cannot encode an image of {clip.image_size_px} px and a text ({reason}); use another model"
        ) from error
    clip.notes += tuple(note for note in checked if note)
    return clip


def save_clip(clip: Clip, folder: Path) -> None:
    """Save a model in open_clip's `local-dir:` layout: open_clip_config.json and open_clip_model.safetensors.

    `open_clip.create_model("local-dir:FOLDER")` loads it and gives the same logits. A tokenizer with files of its own (Hugging
    Face's) is saved with it, as `open_clip.get_tokenizer("local-dir:FOLDER")` takes them from there, and so is the configuration
    of a text tower of transformers, which `load_clip` takes from there. LoRA's updates are merged.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = deepcopy(clip.config)
    config["model_cfg"].get("vision_cfg", {}).pop("timm_model_pretrained", None)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {key: value.detach().to("cpu").clone().contiguous() for key, value in plain_state(clip.model).items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    if isinstance(clip.tokenizer, HFTokenizer):
        clip.tokenizer.save_pretrained(folder)
    if isinstance(getattr(clip.model, "text", None), HFTextEncoder):
        clip.model.text.config.save_pretrained(folder / TEXT_TOWER)
    (folder / "open_clip_model.safetensors").chmod(0o644)  # safetensors creates files that only their owner can read


def _check_tag(name: str, pretrained: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained).is_file():
        raise ModelError(
            f"model.pretrained = '{pretrained}': no such tag of {name} and no such file{nearest(pretrained, tags)} "
            f"(tags: {', '.join(tags) or 'none'}; '{RANDOM}' for untrained weights)"
        )


def _saved_text_tower(name: str, model_cfg: dict[str, Any]) -> str:
    """Return the folder with the saved configuration of a text tower of transformers; empty where there is none."""
    folder = Path(name.removeprefix("local-dir:")) / TEXT_TOWER
    is_saved = name.startswith("local-dir:") and (folder / "config.json").is_file()
    return str(folder) if is_saved and model_cfg["text_cfg"].get("hf_model_name") else ""


def _model_config(name: str) -> dict[str, Any]:
    """Return a model's configuration, checked before open_clip reads it."""
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        return check_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    if name.startswith("hf-hub:"):
        from open_clip.factory import _get_hf_config  # not exported, but the only access to the config on the hub

        return check_config(_get_hf_config(name.removeprefix("hf-hub:")), f"{name}/open_clip_config.json")
    return deepcopy(open_clip.get_model_config(name))
