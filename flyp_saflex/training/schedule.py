"""Schedule of a run: its phases, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from flyp_saflex.tables import PhasePlan
from flyp_saflex.training.setup import Setup

RISING, START_DIVISOR, END_DIVISOR = 0.3, 25.0, 1e4
"""`OneCycleLR`'s `pct_start`, `div_factor` and `final_div_factor`."""


@dataclass(frozen=True)
class Phase:
    """A part of a run with its own optimiser: steps `start` .. `start + steps - 1`."""

    name: str
    start: int
    steps: int
    only_head: bool

    @property
    def end(self) -> int:
        """The step after the last."""
        return self.start + self.steps

    def rate(self, step: int, warmup_steps: int, floor: float, schedule: str = "cosine") -> float:
        """Return the learning rate of a step as a fraction of the peak.

        Args:
            step: of the run, within this phase.
            warmup_steps: of the schedule `cosine`.
            floor: the schedule ends at this fraction, or at its own where that is higher.
            schedule: a name in `SCHEDULES`.
        """
        return SCHEDULES[schedule](step - self.start, self.steps, warmup_steps, floor)


def _cosine(done: int, steps: int, warmup_steps: int, floor: float) -> float:
    """Return linear warm-up over at most a tenth of the steps, then a cosine down to `floor`."""
    warmup = min(warmup_steps, steps // 10)
    if done < warmup:
        return (done + 1) / warmup
    return _eased(1, floor, (done - warmup) / max(steps - warmup, 1))


def _one_cycle(done: int, steps: int, warmup_steps: int, floor: float) -> float:
    """Return the rate of `torch.optim.lr_scheduler.OneCycleLR` with its defaults (arXiv 1708.07120)."""
    top = RISING * steps - 1  # PyTorch's own: the peak lies between two steps, and the end at the last step
    if done <= top:
        return _eased(1 / START_DIVISOR, 1, done / top if top else 1.0)
    end = max(1 / (START_DIVISOR * END_DIVISOR), floor)
    return _eased(1, end, (done - top) / (steps - 1 - top))


def _eased(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {"cosine": _cosine, "one-cycle": _one_cycle}
"""Functions of steps done, steps of the phase, warm-up steps and floor, by the names of `train.schedule`."""


def phases_of(plans: Sequence[PhasePlan], *, steps: int, probe_steps: int) -> list[Phase]:
    """Return the phases of a run, one after another.

    Args:
        plans: of the method.
        steps: optimiser steps of finetuning.
        probe_steps: of a linear probe before it.
    """
    phases: list[Phase] = []
    for plan in plans:
        length = {"steps": steps, "probe_steps": probe_steps}[plan.steps]
        phases.append(Phase(plan.name, phases[-1].end if phases else 0, length, plan.only_head))
    return phases


def plan_line(setup: Setup, phases: Sequence[Phase], accelerator: Accelerator) -> str:
    """Return one line about the run that is about to start."""
    config = setup.config
    rows = f"{config.train.batch_size} training" + (f" + {setup.num_augmented} augmented" if setup.num_augmented else "")
    steps = " + ".join(f"{phase.steps}" for phase in phases)
    size = sum(parameter.numel() for parameter in setup.task.network.parameters()) / 1e6
    return (
        f"{config.train.method} on {len(setup.dataset.train)} images of {setup.dataset.num_classes} classes: "
        f"{steps} steps of {rows} rows, SAFLEX {'on' if setup.saflex else 'off'}, "
        f"{size:.1f} M parameters in all, {accelerator.device}, "
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    )
