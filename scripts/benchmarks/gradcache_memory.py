"""Measure what `train.rows_at_once` saves and costs: peak memory and time of a step in one pass and in parts.

    python scripts/benchmarks/gradcache_memory.py [--model ViT-B-32] [--batches 32,64,128] [--rows 8] [--repetitions 3]

Every setting runs in a fresh process (Linux), whose largest resident size is reset when weights, gradients, optimiser state
and inputs are there, and read after two steps: what came on top is what the step itself needs. Times are compared within one
process, steps of both kinds in turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from made_up_task import made_up_task

from flyp_saflex.clip.model import load_clip
from flyp_saflex.saflex.objectives import CONTRASTIVE
from flyp_saflex.step.step import StepLoss
from flyp_saflex.tasks.label_space import Rows

NUM_CLASSES = 20


class Bench:
    """A model with random weights, its optimiser and one batch."""

    def __init__(self, model: str, batch: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        clip = load_clip(model, "random")
        self.task = made_up_task(clip, [f"a photo of animal number {number}." for number in range(NUM_CLASSES)])
        self.optimizer = torch.optim.AdamW(self.task.network.parameters(), lr=1e-7, fused=True)
        labels_N, side = torch.arange(batch) % NUM_CLASSES, clip.image_size_px
        self.batch = batch
        self.rows = Rows(torch.randn(batch, 3, side, side), labels_N, labels_N, torch.arange(batch), batch)

    def step(self, rows_at_once: int, size: int = 0) -> None:
        """Take an optimiser step, on the first `size` rows (0: all)."""
        size = size or self.batch
        few = Rows(self.rows.inputs[:size], self.rows.captions_N[:size], self.rows.labels_N[:size], self.rows.ids_N[:size], size)
        loss = StepLoss(self.task, CONTRASTIVE, rows_at_once=rows_at_once)
        for surrogate in loss(few).surrogates:
            surrogate().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


def resident_mib(line: str) -> float:
    """Return a resident size of this process: `VmRSS`, the present one, or `VmHWM`, the largest since it was reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{line}:")[2].split(maxsplit=1)[0]) / 1024


def measure(model: str, batch: int, rows_at_once: int) -> None:
    """Print the size before two steps, and the peak during them; runs in a process of its own."""
    bench = Bench(model, batch)
    bench.step(0, size=1)  # kernels, gradients and optimiser state are there
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5): resets VmHWM
    for _ in range(2):
        bench.step(rows_at_once)
    print(before, resident_mib("VmHWM"))


def main() -> None:
    """Run every setting and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batches", default="32,64,128")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        batch, rows_at_once = map(int, options.measure.split(","))
        measure(options.model, batch, rows_at_once)
        return
    print(f"{options.model}, random weights, {NUM_CLASSES} captions, float32, one thread, parts of {options.rows} rows")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| rows | one pass: peak, of it the step | in parts: peak, of it the step | step's memory, ratio | CPU time, ratio |")
    print("|--:|--:|--:|--:|--:|")
    for batch in map(int, options.batches.split(",")):
        found = []
        for rows_at_once in (0, options.rows):
            command = [sys.executable, __file__, "--model", options.model, "--measure", f"{batch},{rows_at_once}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            before, after = map(float, done.stdout.split())
            found.append((after, after - before))
        (whole, step), (less, part) = found
        bench, ratios = Bench(options.model, batch), []
        bench.step(0)
        for _ in range(options.repetitions):
            seconds = []
            for rows_at_once in (0, options.rows):
                start = time.process_time()
                bench.step(rows_at_once)
                seconds.append(time.process_time() - start)
            ratios.append(seconds[1] / seconds[0])
        low, middle, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        print(
            f"| {batch} | {whole:.0f} MiB, {step:.0f} | {less:.0f} MiB, {part:.0f} | {part / step:.2f} | "
            f"{middle:.2f} ({low:.2f} to {high:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
