"""Weights of a file: notes on what is taken, as no file tells it, and ways out for foreign formats."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import open_clip
import torch

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
POSITIONS = ("visual.positional_embedding", "visual.trunk.pos_embed", "visual.attnpool.positional_embedding")


def published_preprocessing(name: str) -> dict[str, Any]:
    """Return the preprocessing on which all published weights of an architecture agree; empty where they do not."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    found = [open_clip.get_pretrained_cfg(name, tag) or {} for tag in tags]
    values = [{key: _plain(config.get(key)) for key in PREPROCESSING} for config in found]
    if not values or any(value != values[0] for value in values):
        return {}
    return {key: value for key, value in values[0].items() if value is not None}


def notes_on_file(name: str, path: str, model: Any, *, quick_gelu: bool, preprocess_cfg: dict[str, Any]) -> list[str]:
    """Return notes on weights that were read from a file.

    Args:
        name: built-in architecture.
        path: the file.
        model: with its weights.
        quick_gelu: whether its activations are QuickGELU.
        preprocess_cfg: what its images are prepared with.
    """
    shown = {key: preprocess_cfg.get(key) for key in ("size", *PREPROCESSING)}
    taken = ", ".join(f"{key} {_text(value)}" for key, value in shown.items())
    notes = [f"weights of a file ({path}) do not say how images are prepared: {taken} are taken"]
    if quick_gelu:
        notes.append(f"weights of a file ({path}) are run with QuickGELU, as model.name = {name} says")
    else:
        other = f"{name}-quickgelu"
        way = f"model.name={other}" if other in open_clip.list_models() else 'a local-dir: folder with "quick_gelu": true'
        notes.append(
            f"weights of a file ({path}) are run with GELU; those of OpenAI, DFN and MetaCLIP need QuickGELU: for them set {way}"
        )
    if changed := _positions(path, model):
        notes.append(f"weights of a file ({path}) have {changed}: they are interpolated; the file is for another image size")
    return notes


def foreign_form(name: str, pretrained: str) -> str:
    """Return the format of weights that open_clip cannot read, and the way out; empty if it is unknown."""
    folder = Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None
    if folder is not None:
        if (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file():
            return (
                f"{folder} has the layout of transformers (config.json), open_clip's is needed (open_clip_config.json): give the "
                "same weights as published for open_clip, model.name=hf-hub:ORG/NAME or a built-in name with its tag"
            )
        return ""
    path = Path(pretrained)
    if not path.is_file() or path.suffix == ".safetensors":
        return ""
    if _is_torchscript(path):
        quick = f"{name.removesuffix('-quickgelu')}-quickgelu"
        drop = "('input_resolution', 'context_length', 'vocab_size', 'attn_mask')"
        return (
            f"{path} is a TorchScript archive, as OpenAI published its weights; turn it into a state dict: python -c "
            f'"import torch; s = torch.jit.load({str(path)!r}, map_location={"cpu"!r}).state_dict(); '
            f'torch.save({{k: v for k, v in s.items() if k not in {drop}}}, {path.stem + "-state.pt"!r})", then set '
            f"model.pretrained={path.stem}-state.pt, and for OpenAI's weights model.name={quick}"
        )
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        if "weights only" in str(error).lower() or "weights_only" in str(error):
            return (
                f"{path} holds pickled Python objects, which are not loaded because loading runs code: if you trust its author, "
                "save the state_dict() of its CLIP with the code that wrote it, torch.save(model.state_dict(), FILE), and set "
                "model.pretrained=FILE"
            )
    return ""


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _positions(path: str, model: Any) -> str:
    """Return in words the number of positions in the file; empty if the model has as many."""
    state = open_clip.factory.load_state_dict(path)
    own = model.state_dict()
    for key in POSITIONS:
        if key in state and key in own and state[key].shape != own[key].shape:
            return f"{state[key].shape[-2]} positions, the model {own[key].shape[-2]}"
    return ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> str:
    return " ".join(f"{part:.3g}" for part in value) if isinstance(value, (list, tuple)) else str(value)
