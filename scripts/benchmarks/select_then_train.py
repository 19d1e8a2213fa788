"""Measure what SAFLEX costs where it decides first and trains on the kept rows only: ratio to the step that trusts every row.

    python scripts/benchmarks/select_then_train.py [--model ViT-B-32] [--batch 32] [--repetitions 5] [--kept 0.25,0.5,0.75]

Both sides take the same 32 training and 32 augmented rows with random weights: the plain step (no SAFLEX, every augmented
row trained) and SAFLEX's (head scope, default preset) once in one pass and once selecting first, with a given part of the
rows kept: a rule that keeps the first rows stands in for the verdict, after all of SAFLEX's own work. Steps alternate in one
process; what is compared is CPU time of forward, decision, backward and optimiser. The validation gradient is timed apart
and told as a share of the plain step, divided by the steps between refreshes.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from flyp_saflex.method.clip import load_clip
from flyp_saflex.method.learner import Learner
from flyp_saflex.method.saflex import Saflex
from flyp_saflex.method.step import Rows, StepLoss, Validation
from flyp_saflex.method.two_pass import Selecting

NUM_CLASSES = 20


class Judged(Saflex):
    """SAFLEX whose verdict, once it has done all of its work, is replaced by one that keeps a given part."""

    part = 1.0

    def solve(self, gains_AK: torch.Tensor, *arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide, then keep the first rows."""
        weights_A, labels_AK = super().solve(gains_AK, *arguments, **options)  # type: ignore[arg-type]
        return (torch.arange(len(weights_A)) < self.part * len(weights_A)).to(weights_A.dtype), labels_AK


def quartiles(values: list[float]) -> str:
    """Return "median (first quartile to third)"."""
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Time the steps and print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--kept", default="0.25,0.5,0.75")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clip = load_clip(options.model, "random")
    learner = Learner(clip.model)
    learner.freeze()
    learner.set_mode(training=True, freeze_batchnorm=True)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-7, fused=True)
    tokens_ML = clip.tokenizer([f"a photo of animal number {number}." for number in range(NUM_CLASSES)])
    side, batch = clip.image_size_px, options.batch
    labels_N = torch.randint(NUM_CLASSES, (2 * batch,))
    rows = Rows(torch.randn(2 * batch, 3, side, side), labels_N, labels_N, torch.arange(2 * batch), batch)
    validation = Validation(torch.randn(batch, 3, side, side), labels_N[:batch], labels_N[:batch])
    judged = Judged()

    def step_loss(saflex: Saflex | None, select: str) -> StepLoss:
        return StepLoss(
            learner,
            learner,
            caption_tokens_ML=tokens_ML,
            class_captions_K=torch.arange(NUM_CLASSES),
            saflex=saflex,
            selecting=Selecting(select),  # type: ignore[arg-type]
        )

    plain, one_pass, selecting = step_loss(None, "never"), step_loss(judged, "never"), step_loss(judged, "always")

    def timed(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def train(step: StepLoss) -> None:
        for surrogate in step(rows).surrogates:
            surrogate().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ratios: dict[str, list[float]] = {}
    plain.saflex = judged  # only `refresh` reads it here
    plain.refresh(validation)
    plain.saflex = None
    for step in (plain, one_pass, selecting):  # loads kernels, fills the optimiser's state
        train(step)
    for _ in range(options.repetitions):
        base = timed(lambda: train(plain))
        ratios.setdefault("one pass", []).append(timed(lambda: train(one_pass)) / base)
        for judged.part in map(float, options.kept.split(",")):
            ratios.setdefault(f"select, {judged.part:.0%} kept", []).append(timed(lambda: train(selecting)) / base)
        ratios.setdefault("refresh", []).append(timed(lambda: selecting.refresh(validation)) / base)
    print(f"{options.model}, random weights, {batch} + {batch} rows, {NUM_CLASSES} captions, float32, one thread")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"CPU time / plain step that trusts every augmented row, {options.repetitions} repetitions: median (quartiles)\n")
    refresh = torch.tensor(ratios.pop("refresh"))
    every = judged.settings.refresh_every
    for name, values in ratios.items():
        whole = [value + share / every for value, share in zip(values, refresh.tolist(), strict=True)]
        print(f"SAFLEX, {name:<17} {quartiles(values)}   with a refresh of {batch} rows every {every} steps: {quartiles(whole)}")


if __name__ == "__main__":
    main()
