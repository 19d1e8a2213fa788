"""Measure what SAFLEX adds to an epoch of the paper's other tracks: ResNet-18 on small images, an MLP on rows of numbers.

    python scripts/benchmarks/track_overhead.py
    python scripts/benchmarks/track_overhead.py --tracks mlp --rounds 9

Both sides train the same rows of a batch, training and augmented, with the optimiser's step; one of them with SAFLEX. They take
turns in one process, a few steps at a time, on random weights and made-up data; times are CPU time. An epoch has as many steps on
both sides, so the ratio of steps is that of epochs. Upstream operations are part of both sides.

The paper (appendix C): +54 % with RandAugment and +31 % with Mixup on MedMNIST, 42 % on average; +81 % on tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import hardware, ratio, rounds

from flyp_saflex import recipe
from flyp_saflex.config import DataConfig
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.step.step import StepLoss
from flyp_saflex.tables import DATASETS
from flyp_saflex.training.batches import read_steps
from flyp_saflex.training.optimizers import optimizer_of
from flyp_saflex.training.rows import RowBuilder, ValidationRows
from flyp_saflex.training.setup import prepare

WAYS = {
    "exact, every step": ("saflex.preset=paper-log",),
    "exact, refresh every 4": ("saflex.preset=paper-log", "saflex.refresh_every=4"),
    "one-sided, every step": ("saflex.preset=paper-log", "saflex.estimator=one-sided"),
    "one-sided, refresh every 4": ("saflex.preset=paper-log", "saflex.estimator=one-sided", "saflex.refresh_every=4"),
    "head scope, refresh every 4 (robust)": ("saflex.preset=robust",),
}
UPSTREAMS = {"image-classifier": ("randaugment", "mixup"), "mlp": ("cutmix", "mixup")}
PAPER = {
    ("image-classifier", "randaugment"): "+54 %",
    ("image-classifier", "mixup"): "+31 %",
    ("mlp", "cutmix"): "+81 % (seven tables)",
    ("mlp", "mixup"): "+81 % (seven tables)",
}


def made_up(images: bool) -> Callable[[DataConfig], Dataset]:
    """Return a reader of noise: images of 28 px, or rows of 41 numbers, in two classes."""

    def read(config: DataConfig) -> Dataset:
        generator = np.random.default_rng(0)
        shape = (28, 28, 3) if images else (41,)
        noise = generator.integers(0, 256, (768, *shape), dtype=np.uint8)
        rows = noise if images else (noise / 128 - 1).astype(np.float32)
        samples = [Sample(sample_id=f"{row}", item=row, label=row % 2) for row in range(len(rows))]
        splits = {
            "train": Split(name="train", role="train", shift="id", samples=tuple(samples[:512])),
            "id_val": Split(name="id_val", role="select", shift="id", samples=tuple(samples[512:])),
        }
        return Dataset(name="noise", root=Path(), class_names=("a", "b"), splits=splits, templates=("{}",), rows=rows)

    return read


def steps_of(options: list[str], num_steps: int) -> Callable[[], None]:
    """Return a function that trains some steps of a recipe, and goes on where it stopped."""
    setup = prepare(recipe.load("folder", options))
    config, task, device = setup.config, setup.task, torch.device("cpu")
    task.begin_phase(only_head=False)
    step_loss = StepLoss(task, setup.objective, saflex=setup.saflex)
    builder = RowBuilder(setup, device)
    validation = ValidationRows(setup, None, device) if setup.saflex is not None else None
    groups = task.parameter_groups(lr=config.train.lr, head_lr=config.train.head_lr, weight_decay=0.01, decays_all=False)
    optimizer = optimizer_of(groups, config.train)
    state: dict[str, Any] = {"step": 0}

    def run() -> None:
        first = state["step"]
        for step, batches in enumerate(read_steps(setup, None, first, first + num_steps), start=first):
            task.network.set_mode(training=True, freeze_batchnorm=config.train.freeze_batchnorm)
            if validation is not None and setup.saflex is not None and setup.saflex.due(step):
                step_loss.refresh(validation.at(step, setup.saflex.settings))
            result = step_loss(builder.build(batches[0], step, 0))
            result.surrogates[0]().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state["step"] = first + num_steps

    return run


def measure(track: str, upstream: str, arguments: argparse.Namespace) -> None:
    """Print the seconds of a step and the ratio to the plain step, for every way."""
    options = [
        f"data.name=noise-{track}",
        f"train.method={track}",
        "model.name=resnet18" if track == "image-classifier" else "model.name=mlp",
        "model.pretrained=random",
        f"network.width={arguments.width}" if track == "image-classifier" else "network.width=64",
        f"train.batch_size={arguments.batch}",
        "train.freeze_batchnorm=false",
        "train.steps=1000",
        "augment.on_train=[]",
        f"augment.upstream={upstream}",
        "saflex.temperature=0.01",
        "saflex.check_every=0",
    ]
    num_steps = arguments.steps
    sides = {"plain": steps_of(options, num_steps)}
    for name, changes in WAYS.items():
        sides[name] = steps_of([*options, "saflex.enabled=true", *changes], num_steps)
    seconds = rounds(sides, arguments.rounds)
    told = PAPER[track, upstream]
    print(f"\n{track}, {upstream}, {arguments.batch} + {arguments.batch} rows; paper: {told}")
    for name, found in seconds.items():
        each = 1000 * float(np.median(found)) / num_steps
        against = "" if name == "plain" else f"  with / without {ratio(found, seconds['plain'])}"
        print(f"  {name:<38} {each:8.1f} ms a step{against}", flush=True)


def main() -> None:
    """Read the command line and measure every track and upstream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracks", default="mlp,image-classifier", help="which of the two")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a side in a round, a multiple of 4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64, help="channels of the ResNet's first stage")
    arguments = parser.parse_args()
    for track in UPSTREAMS:
        DATASETS[f"noise-{track}"] = made_up(track == "image-classifier")
    print(hardware())
    for track in arguments.tracks.split(","):
        for upstream in UPSTREAMS[track]:
            measure(track, upstream, arguments)


if __name__ == "__main__":
    main()
