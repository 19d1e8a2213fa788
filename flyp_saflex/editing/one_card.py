"""Large pipelines on one card: quantised weights, offloading to main memory, VAE tiling, attention backend."""

from __future__ import annotations

from typing import Any

import torch

from flyp_saflex.editing.pipeline_files import quiet, reason
from flyp_saflex.errors import ConfigError, ModelError
from flyp_saflex.extras import require
from flyp_saflex.offline import EditorConfig

QUANTISED = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts that are quantised, where a pipeline has them; the autoencoder is small and loses most."""
SMALLER = "set editor.offload=model (or sequential), editor.quantisation=nf4, editor.tiling=true or editor.precision=bf16"
"""Advice where memory does not suffice."""


def check_quantisation(settings: EditorConfig, device: torch.device) -> None:
    """Check that quantised weights can be used on the device.

    Raises:
        ConfigError: there is no GPU, bitsandbytes is not installed, or layers are offloaded one by one.
    """
    if settings.quantisation == "none":
        return
    option = f"editor.quantisation = {settings.quantisation}"
    if settings.offload == "sequential":
        raise ConfigError(f"{option} cannot be offloaded layer by layer: set editor.offload=model, or leave one of them out")
    if device.type != "cuda":
        raise ConfigError(f"{option} needs an NVIDIA GPU, and the editor would run on the {device.type}: set it to none")
    require(option, "bitsandbytes")


def quantisation_config(diffusers: Any, settings: EditorConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the argument of `from_pretrained` that quantises; empty without quantisation.

    Args:
        diffusers: the library.
        settings: option `quantisation`.
        dtype: of the calculations.
    """
    if settings.quantisation == "none":
        return {}
    nf4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    backend, options = (
        ("bitsandbytes_4bit", nf4) if settings.quantisation == "nf4" else ("bitsandbytes_8bit", {"load_in_8bit": True})
    )
    config = diffusers.PipelineQuantizationConfig(
        quant_backend=backend, quant_kwargs=options, components_to_quantize=list(QUANTISED)
    )
    return {"quantization_config": config}


def tune(pipeline: Any, settings: EditorConfig) -> None:
    """Set VAE tiling and attention backend.

    Raises:
        ConfigError: the pipeline has no such thing, or the backend cannot be used here.
    """
    name = type(pipeline).__name__
    if settings.tiling:
        vae = getattr(pipeline, "vae", None)
        try:
            vae.enable_tiling()  # type: ignore[union-attr]
        except (AttributeError, NotImplementedError):  # no autoencoder; one whose class diffusers cannot tile
            raise ConfigError(
                f"editor.tiling = true, but the autoencoder of {name} ({type(vae).__name__}) has no tiling: remove the option"
            ) from None
    if not settings.attention:
        return
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    processors = getattr(denoiser, "attn_processors", {}).values()
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ConfigError(
            f"editor.attention = {settings.attention} has no effect on {type(denoiser).__name__}, whose attention is fixed: "
            "remove the option"
        )
    try:
        with quiet():
            denoiser.set_attention_backend(settings.attention)  # type: ignore[union-attr]
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"editor.attention = {settings.attention} cannot be used here ({reason(error)}): install its package, or remove the "
            "option"
        ) from error


def place(pipeline: Any, settings: EditorConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Bring a pipeline to the device: as a whole, or part by part while it edits.

    Raises:
        ModelError: it does not fit into the GPU's memory.
    """
    try:
        if settings.offload != "none" and device.type != "cpu":
            offload(pipeline, settings.offload, device)
        elif settings.quantisation != "none" or pipeline.dtype == dtype:
            pipeline.to(device)
        else:
            pipeline.to(device, dtype)
    except torch.OutOfMemoryError:
        raise ModelError(f"editor.model = {settings.model} does not fit into the GPU's memory: {SMALLER}") from None


def offload(pipeline: Any, way: str, device: torch.device) -> None:
    """Have diffusers move parts (`model`) or layers (`sequential`) to the device when they are needed."""
    if way == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)


def offload_note(settings: EditorConfig, device: torch.device) -> str:
    """Return a line if offloading has no effect on the device, else the empty string."""
    if settings.offload == "none" or device.type != "cpu":
        return ""
    return f"editor.offload = {settings.offload} has no effect without a GPU: weights are in main memory anyway"
