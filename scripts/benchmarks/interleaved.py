"""Times several sides in turn, so that whatever else the machine does falls on all of them, and tells their ratios.

A single time says little about a shared machine. A ratio is taken within every round (A B A B ...), and told as the median
over the rounds with the quartiles beside it.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def stopwatch(device: torch.device | str = "cpu") -> Callable[[], float]:
    """Return a clock in seconds: this process's CPU time, all threads; on an accelerator, time until all work is done."""
    if torch.device(device).type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return clock


def rounds(
    sides: Mapping[str, Callable[[], object]], repetitions: int, *, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Run every side once unmeasured, then all of them in turn; return the seconds of every side, round by round.

    Every other round goes backwards, so that no side always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repetitions + 1):
        order = list(sides) if number % 2 else list(sides)[::-1]
        for name in order:
            started = clock()
            sides[name]()
            if number:
                seconds[name].append(clock() - started)
    return seconds


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """Return the ratio of two sides as `0.53 [0.51, 0.56]`: the median over rounds and its quartiles."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def hardware(device: torch.device | str = "cpu") -> str:
    """Return what the figures were measured on."""
    name = torch.device(device)
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = f"{models[0]} ({len(models)} cores)" if models else processor
    gpu = f"{torch.cuda.get_device_name(name)}, " if name.type == "cuda" else ""
    return f"{gpu}{processor}, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}"
