"""Calculate what diffusion edits cost on a GPU: floating-point operations of Stable Diffusion 1.5's parts, per 10,000 edits.

    python scripts/benchmarks/edit_cost.py

Nothing is measured and no weight is needed: the architectures (stated below, as published with the weights) are built
without memory and torch counts the operations of one call. Hours follow from an assumed part of the peak.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode

SIZE_PX = 512
GPUS = {  # peak of dense half precision in TFLOP/s (vendors' data sheets), assumed part of it that a UNet of this size reaches
    "V100 SXM2": (125, 0.35),
    "A100 SXM": (312, 0.45),
    "H100 / H200 SXM": (989, 0.40),
}
KINDS = {  # steps, forward passes per step, part of the steps that is done, autoencoder's encoder is used
    "instruct-pix2pix (20 steps, two guidances)": (20, 3, 1.0, True),
    "img2img (50 steps, strength 0.5)": (50, 2, 0.5, True),
    "text2img (50 steps)": (50, 2, 1.0, False),
    "inpaint (50 steps)": (50, 2, 1.0, True),
}


def teraflops() -> dict[str, float]:
    """Return the operations of one call of the UNet, the encoder and the decoder, in 10^12."""
    latent = SIZE_PX // 8
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, in_channels=8, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
        image, noisy = torch.empty(1, 3, SIZE_PX, SIZE_PX), torch.empty(1, 8, latent, latent)
        calls = {
            "unet": lambda: unet(noisy, torch.empty(1), torch.empty(1, 77, 768)),
            "encoder": lambda: vae.encode(image),
            "decoder": lambda: vae.decode(noisy[:, :4]),
        }
        counts = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            counts[name] = counter.get_total_flops() / 1e12
    return counts


def denoisers() -> dict[str, tuple[float, float]]:
    """Return parameters in 10^9 and operations of one forward pass in 10^12 of the other presets' denoisers.

    Transformers see 1024 px: 4,096 tokens each of edit and source, and those of the text (Qwen's with the source: 1,024 assumed).
    """
    with torch.device("meta"):
        step, tokens = torch.empty(1), 8192
        sdxl = UNet2DConditionModel(
            in_channels=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
        net = ControlNetModel(cross_attention_dim=768, attention_head_dim=8)
        flux = FluxTransformer2DModel(guidance_embeds=True)
        klein = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )
        qwen = QwenImageTransformer2DModel()
        calls = {
            "ControlNet, 512 px": (
                net,
                lambda: net(torch.empty(1, 4, 64, 64), step, torch.empty(1, 77, 768), torch.empty(1, 3, 512, 512)),
            ),
            "SDXL, 768 px": (
                sdxl,
                lambda: sdxl(
                    torch.empty(1, 8, 96, 96),
                    step,
                    torch.empty(1, 77, 2048),
                    added_cond_kwargs={"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)},
                ),
            ),
            "FLUX.1 Kontext": (
                flux,
                lambda: flux(
                    hidden_states=torch.empty(1, tokens, 64),
                    encoder_hidden_states=torch.empty(1, 512, 4096),
                    pooled_projections=torch.empty(1, 768),
                    timestep=step,
                    guidance=step,
                    img_ids=torch.empty(tokens, 3),
                    txt_ids=torch.empty(512, 3),
                ),
            ),
            "FLUX.2 klein 4B": (
                klein,
                lambda: klein(
                    hidden_states=torch.empty(1, tokens, 128),
                    encoder_hidden_states=torch.empty(1, 512, 7680),
                    timestep=step,
                    guidance=None,
                    img_ids=torch.empty(1, tokens, 4),
                    txt_ids=torch.empty(1, 512, 4),
                ),
            ),
            "Qwen-Image-Edit": (
                qwen,
                lambda: qwen(
                    hidden_states=torch.empty(1, tokens, 64),
                    encoder_hidden_states=torch.empty(1, 1024, 3584),
                    encoder_hidden_states_mask=None,
                    timestep=step,
                    img_shapes=[[(1, 64, 64), (1, 64, 64)]],
                ),
            ),
        }
        found = {}
        for name, (network, call) in calls.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            found[name] = sum(each.numel() for each in network.parameters()) / 1e9, counter.get_total_flops() / 1e12
    return found


def main() -> None:
    """Print the table."""
    counts = teraflops()
    print(", ".join(f"{name}: {count:.2f} TFLOP" for name, count in counts.items()), f"per call at {SIZE_PX} px, batch 1")
    print(f"\n| editor | TFLOP per edit | {' | '.join(f'{name}, h per 10,000' for name in GPUS)} |")
    print("|---|--:|" + "--:|" * len(GPUS))
    for kind, (steps, passes, done, encodes) in KINDS.items():
        total = steps * done * passes * counts["unet"] + counts["decoder"] + (counts["encoder"] if encodes else 0)
        hours = [10_000 * total / (peak * part) / 3600 for peak, part in GPUS.values()]
        print(f"| {kind} | {total:.0f} | {' | '.join(f'{hour:.1f}' for hour in hours)} |")
    print("\nDenoisers of the other presets, behind the table in docs/how-to/make-edits.md (editing/cost.py):")
    for name, (billions, count) in denoisers().items():
        print(f"  {name}: {billions:.2f} billion parameters, {count:.2f} TFLOP per pass")
    print("\nAssumed: " + ", ".join(f"{part:.0%} of {peak} TFLOP/s on {name}" for name, (peak, part) in GPUS.items()))


if __name__ == "__main__":
    main()
