"""Schedule of a run: its phases, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from flyp_saflex.tables import PhasePlan
from flyp_saflex.training.setup import Setup


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

    def rate(self, step: int, warmup_steps: int, floor: float) -> float:
        """Return the learning rate of a step as a part of the peak: linear warm-up, then a cosine down to `floor`.

        The warm-up is at most a tenth of the phase.
        """
        warmup = min(warmup_steps, self.steps // 10)
        done = step - self.start
        if done < warmup:
            return (done + 1) / warmup
        progress = (done - warmup) / max(self.steps - warmup, 1)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


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
