"""Calculate what diffusion edits cost on a GPU: floating-point operations of Stable Diffusion 1.5's parts, per 10,000 edits.

    python scripts/benchmarks/edit_cost.py

Nothing is measured and no weight is needed: the architectures (stated below, as published with the weights) are built
without memory and torch counts the operations of one call. Hours follow from an assumed part of the peak.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
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
    print("\nAssumed: " + ", ".join(f"{part:.0%} of {peak} TFLOP/s on {name}" for name, (peak, part) in GPUS.items()))


if __name__ == "__main__":
    main()
