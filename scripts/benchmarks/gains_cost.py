"""Measure what SAFLEX adds to a training step, in parts: the gains' derivative and the validation gradient.

    python scripts/benchmarks/gains_cost.py
    python scripts/benchmarks/gains_cost.py --models tiny --repeats 15

A plain step is forward and backward on B train + B augmented rows, without the optimiser. Every way of taking the gains does
the same step with them (all rows are kept, so that the backward pass is the same), in turns with the plain one in one process,
on random weights and noise; times are CPU time. The validation gradient is timed beside it and charged every 4th step: that of
all parameters from V = B rows, in head scope the default's. Numbers are percent of the plain step: median over the
repetitions [quartiles].
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from banked import usual_validation
from made_up_task import made_up_task

from flyp_saflex.assets import TINY_CLIP
from flyp_saflex.clip.model import load_clip
from flyp_saflex.saflex.objectives import CONTRASTIVE
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.step import StepLoss
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tasks.label_space import Rows

MODELS = {
    "tiny": (f"local-dir:{TINY_CLIP}", "", 32),
    "vit-s32": ("ViT-S-32-alt", "random", 16),
    "vit-b32": ("ViT-B-32", "random", 32),
    "vit-b16": ("ViT-B-16", "random", 8),
}
WAYS = {  # scope, estimator, whether the training pass leaves its products
    "head, exact (the default)": ("head", "exact", True),
    "all, one-sided": ("all", "one-sided", True),
    "all, exact, with the training pass's products": ("all", "exact", True),
    "all, exact, in a pass of its own": ("all", "exact", False),
}
REFRESH_EVERY = 4


class Case:
    """One model with rows, and a step for every way of taking the gains."""

    def __init__(self, name: str, pretrained: str, batch_size: int) -> None:
        torch.manual_seed(0)
        clip = load_clip(name, pretrained)
        num_classes = max(batch_size * 3 // 4, 2)
        self.task = made_up_task(clip, [f"a camera trap photo of animal {k}." for k in range(num_classes)])
        self.network = self.task.network
        self.network.set_mode(training=True, freeze_batchnorm=True)
        labels = torch.arange(2 * batch_size) % num_classes
        images = partial(torch.randn, 2 * batch_size, 3, clip.image_size_px, clip.image_size_px)
        self.rows = Rows(images(), labels, labels, torch.arange(2 * batch_size), batch_size)
        self.validation = {}
        self.steps = {"plain": self._step(None, True)}
        for way, (scope, estimator, kept) in WAYS.items():
            saflex = Saflex(scope=scope, estimator=estimator, weight_rule="all", refresh_every=REFRESH_EVERY, check_every=0)
            self.steps[way] = self._step(saflex, kept)
            usual = usual_validation(saflex, self.network, self.rows.inputs[0], torch.arange(num_classes))
            rows_of_all = Validation(images()[:batch_size], labels[:batch_size], labels[:batch_size])
            self.validation[way] = usual if scope == "head" else rows_of_all

    def _step(self, saflex: Saflex | None, kept: bool) -> StepLoss:
        forward = self.network if kept else partial(type(self.network).__call__, self.network)
        return StepLoss(self.task, CONTRASTIVE, forward, saflex=saflex)

    def train(self, way: str) -> None:
        """Do a step's forward and backward pass."""
        result = self.steps[way](self.rows)
        for surrogate in result.surrogates:
            surrogate().backward()
        self.network.zero_grad(set_to_none=True)

    def refresh(self, way: str) -> None:
        """Take the validation gradient."""
        self.steps[way].refresh(self.validation[way])


def cpu_seconds(work: Callable[[], None]) -> float:
    """Return the CPU time that a call takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def spread(values: list[float]) -> str:
    """Return median and quartiles in percent."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{100 * middle:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"


def main() -> None:
    """Print the table, a model at a time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "vit-b32", "vit-b16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.processor() or platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, float32")
    print(f"\n| model | gains | derivative | validation gradient / {REFRESH_EVERY} | together |\n|---|---|--:|--:|--:|")
    for name in options.models:
        case = Case(*MODELS[name])
        for way in WAYS:  # warm-up; the second step of a finite difference has its step size
            case.refresh(way)
            case.train(way)
        rows: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(options.repeats):
            plain = cpu_seconds(partial(case.train, "plain"))
            for way, found in rows.items():
                share = cpu_seconds(partial(case.refresh, way)) / REFRESH_EVERY / plain
                found.append((cpu_seconds(partial(case.train, way)) / plain - 1, share))
            plain_again = cpu_seconds(partial(case.train, "plain"))
            for found in rows.values():  # against the mean of the plain steps before and after: clocks drift
                derivative, share = found.pop()
                factor = 2 * plain / (plain + plain_again)
                found.append(((derivative + 1) * factor - 1, share * factor))
        size = f"{name}, B = {case.rows.num_train}"
        for way, found in rows.items():
            parts = [[pair[0] for pair in found], [pair[1] for pair in found], [sum(pair) for pair in found]]
            print(f"| {size} | {way} | {' | '.join(spread(part) for part in parts)} |", flush=True)


if __name__ == "__main__":
    main()
