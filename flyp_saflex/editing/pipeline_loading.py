"""Loading of a diffusers pipeline as the pipeline of an editor's kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flyp_saflex.editing.one_card import SMALLER
from flyp_saflex.editing.pipeline_files import Source, reason
from flyp_saflex.editing.settings import EditorKind
from flyp_saflex.errors import ModelError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.tables import EDITORS


def load_pipeline(
    diffusers: Any, settings: EditorConfig, kind: EditorKind, source: Source, dtype: torch.dtype, more: dict[str, Any]
) -> Any:
    """Load the pipeline of the kind from a folder.

    Args:
        diffusers: the library.
        settings: options `model` and `safety_checker`.
        kind: says the class.
        source: the folder.
        dtype: of the weights.
        more: further arguments: parts that were loaded from elsewhere, quantisation.

    Raises:
        ModelError: it cannot be loaded, or does not fit into the GPU's memory.
    """
    own_class = kind.family and kind.family in source.class_name
    options: dict[str, Any] = {"dtype": dtype} | more
    if source.has_safety_checker and not settings.safety_checker:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with _without_bars(diffusers):
            cls = getattr(diffusers, "DiffusionPipeline" if own_class else kind.pipeline)
            return cls.from_pretrained(source.folder, **options)
    except torch.OutOfMemoryError:
        raise ModelError(f"editor.model = {settings.model} does not fit into the GPU's memory: {SMALLER}") from None
    except Exception as error:  # diffusers, transformers and safetensors raise a dozen types here
        raise ModelError(
            f"editor.model = {settings.model}: its {source.class_name} cannot be loaded for editor.kind = {settings.kind} "
            f"({reason(error)}); use another editor.kind, or fetch the model again"
        ) from error


def check_channels(pipeline: Any, settings: EditorConfig, kind: EditorKind) -> None:
    """Refuse a UNet that was trained for another kind; diffusers would fail in the middle of an edit."""
    unet, vae = getattr(pipeline, "unet", None), getattr(pipeline, "vae", None)
    if unet is None or vae is None or not kind.unet_channels:
        return
    latent, found = vae.config.latent_channels, unet.config.in_channels
    fitting = [a * latent + b for a, b in kind.unet_channels]
    if found not in fitting:
        usual = {name: other.unet_channels[0] for name, other in EDITORS.items() if other.unet_channels}
        made_for = " or ".join(name for name, (a, b) in usual.items() if a * latent + b == found) or "auto"
        raise ModelError(
            f"editor.model = {settings.model}: its UNet has {found} input channels, but editor.kind = {settings.kind} needs "
            f"{fitting[0]}; use editor.kind = {made_for}, or another editor.model"
        )


@contextmanager
def _without_bars(diffusers: Any) -> Iterator[None]:
    """Hide the progress bars that the libraries draw for every file."""
    from transformers.utils import logging

    shown = [library for library in (diffusers.utils.logging, logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
