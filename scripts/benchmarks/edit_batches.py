"""What batches and remembered texts save when a diffusion editor edits: ours against one pipeline call per image.

    python scripts/benchmarks/edit_batches.py                  # the shipped tiny editor: two minutes on one CPU core
    python scripts/benchmarks/edit_batches.py --device cuda --precision fp16 --model timbrooks/instruct-pix2pix --size 512

Three sides edit the same drawn pictures with the same texts and the same noise: diffusers' pipeline called as its
documentation shows, image by image, the text as a string; our editor with a batch of one, which encodes every text once; and
our editor with batches. The largest difference between the edits of the last two is told too: batches change nothing but
rounding.
"""

from __future__ import annotations

import argparse

import diffusers
import numpy as np
import torch
from interleaved import hardware, ratio, rounds, stopwatch
from PIL import Image

from flyp_saflex.assets import TINY_EDITOR
from flyp_saflex.demo.scene import render
from flyp_saflex.demo.world import plan
from flyp_saflex.editing.diffusers_editor import PRECISIONS
from flyp_saflex.editing.editor import Request, load_editor
from flyp_saflex.offline import EditorConfig
from flyp_saflex.prompting.edit_prompts import load_edit_prompts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(TINY_EDITOR), help="an InstructPix2Pix model; default: the shipped one")
    parser.add_argument("--edits", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="side of the edits in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="no")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()

    texts = [text.instruction.replace("{}", "animal") for text in load_edit_prompts("demo.places", "demo").edits]
    scenes = [shot.scene for shot in plan(max(400, options.edits), seed=0)][: options.edits]
    pictures = [render(scene, size_px=options.size) for scene in scenes]
    requests = [Request(image=picture, text=texts[number % len(texts)], seed=number) for number, picture in enumerate(pictures)]
    config = EditorConfig(
        model=options.model,
        steps=options.steps,
        guidance=7.5,
        image_guidance=1.5,
        size_px=options.size,
        precision=options.precision,
        safety_checker=False,
    )
    editor = load_editor(config, device=options.device)
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        options.model, dtype=PRECISIONS[options.precision], safety_checker=None, requires_safety_checker=False
    ).to(options.device)
    pipeline.set_progress_bar_config(disable=True)

    def plain() -> list[Image.Image]:
        return [
            pipeline(
                request.text,
                image=request.image,
                num_inference_steps=options.steps,
                guidance_scale=7.5,
                image_guidance_scale=1.5,
                generator=torch.Generator().manual_seed(request.seed),
            ).images[0]
            for request in requests
        ]

    edits: dict[int, list[Image.Image | str]] = {}

    def ours(batch_size: int) -> None:
        editor.batch_size = batch_size
        edits[batch_size] = editor.edit(requests)

    sides = {"plain": plain, "one": lambda: ours(1), "batch": lambda: ours(options.batch)}
    seconds = rounds(sides, options.repetitions, clock=stopwatch(options.device))
    pairs = [(np.asarray(one).astype(int), np.asarray(many)) for one, many in zip(edits[1], edits[options.batch], strict=True)]
    print(f"{hardware(options.device)}; {options.edits} edits of {options.size} px, {options.steps} steps, {len(texts)} texts")
    print(f"one by one, texts remembered / pipeline called per image: {ratio(seconds['one'], seconds['plain'])}")
    print(f"batches of {editor.batch_size} / pipeline called per image: {ratio(seconds['batch'], seconds['plain'])}")
    print(f"batches of {editor.batch_size} / one by one: {ratio(seconds['batch'], seconds['one'])}")
    print(f"largest difference between the two: {max(int(np.abs(a - b).max()) for a, b in pairs)} of 255")


if __name__ == "__main__":
    main()
