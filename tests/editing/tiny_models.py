"""Tiny diffusers pipelines for tests: real classes, seeded random weights, a few hundred kilobytes per folder.

The UNet has one downsampling, the VAE two: a grid of 4 pixels. An edit is coloured noise that depends on the image, the text
and the seed; these tests need no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CONTEXT_TOKENS = 64  # nearly a token a letter
PIPELINES: dict[str, tuple[type[DiffusionPipeline], int]] = {
    "instruct-pix2pix": (StableDiffusionInstructPix2PixPipeline, 8),
    "img2img": (StableDiffusionPipeline, 4),
    "text2img": (StableDiffusionPipeline, 4),
    "inpaint": (StableDiffusionInpaintPipeline, 9),
}
"""Per `editor.kind`: the class that the folder names, and the UNet's input channels."""


def build_tiny_editor(folder: Path, kind: str, *, safety_checker: str = "") -> Path:
    """Write a pipeline's folder.

    Args:
        folder: to be made.
        kind: a value of `editor.kind`, not `auto`.
        safety_checker: empty for none; `passes` lets everything through, `blocks` nothing.
    """
    cls, in_channels = PIPELINES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        parts: dict[str, Any] = {
            "vae": build_vae(),
            "text_encoder": CLIPTextModel(text_config(tokenizer)),
            "tokenizer": tokenizer,
            "unet": UNet2DConditionModel(
                sample_size=8,
                in_channels=in_channels,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(8, 16),
                layers_per_block=1,
                cross_attention_dim=16,
                attention_head_dim=2,
                norm_num_groups=4,
            ),
            "scheduler": DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
            ),
            "safety_checker": build_safety_checker(safety_checker) if safety_checker else None,
            "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        }
    pipeline = cls(**parts, requires_safety_checker=bool(safety_checker))
    pipeline.save_pretrained(folder)
    return folder


def build_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer without merges: one token per letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=CONTEXT_TOKENS)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Return a text encoder's configuration that fits the tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,  # with the usual 0.02 all texts would be alike
    )


def build_vae() -> AutoencoderKL:
    """Return an autoencoder, 4 channels at a quarter of the side, whose pictures have contrast."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.1,  # read by FLUX only
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 3
    return vae


def build_safety_checker(verdict: str) -> StableDiffusionSafetyChecker:
    """Return a checker that lets everything through (`passes`) or nothing (`blocks`)."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    with torch.no_grad():  # a concept is seen where the cosine similarity to it exceeds its threshold
        checker.concept_embeds_weights.fill_({"passes": 2.0, "blocks": -2.0}[verdict])
        checker.special_care_embeds_weights.fill_(2.0)
    return checker


def build_tiny_kontext(folder: Path) -> Path:
    """Write the folder of a FLUX Kontext pipeline, a transformer over packed latents of text and image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz")]
        t5 = T5Config(
            vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
        )
        pipeline = FluxKontextPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=build_vae(),
            text_encoder=CLIPTextModel(text_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(t5),
            tokenizer_2=T5TokenizerFast(vocab=pieces, extra_ids=0),
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    pipeline.save_pretrained(folder)
    return folder
