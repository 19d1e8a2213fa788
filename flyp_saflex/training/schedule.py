"""The start of a training run: phases, the accelerator, and the checks of its folder (floor 3, shared by stages)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration

from flyp_saflex import recipe
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training import checkpoint
from flyp_saflex.training.setup import Job

MAY_CHANGE = (
    "compare.",
    "data.workers",
    "data.max_unreadable",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.frozen_cache",
    "train.max_loss",
    "train.tracker",
)
"""Options that a resumed run may have otherwise: they change no digit of what is trained."""


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


def phases_of(job: Job) -> list[Phase]:
    """Return the phases of a run: one, or for LP-FT a linear probe and then finetuning."""
    method, steps = job.config.train.method, job.total_steps
    if method == "lp-ft":
        probe = job.config.train.probe_steps
        return [Phase("linear-probe", 0, probe, True), Phase("finetune", probe, steps, False)]
    return [Phase("train", 0, steps, method == "linear-probe")]


def make_accelerator(config: Config, path: Path) -> Accelerator:
    """Return the accelerator: device, precision, processes, tracker.

    Raises:
        ConfigError: precision or tracker that this machine does not have, or rows that cannot be shared evenly.
    """
    options = config.train
    tracker = None if options.tracker == "none" else options.tracker
    AcceleratorState._reset_state()  # a run earlier in this process may have had another precision; keeps the processes
    try:
        accelerator = Accelerator(
            mixed_precision=options.precision,
            log_with=tracker,
            project_dir=str(path),
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"train.precision = {options.precision}, train.tracker = {options.tracker}: {str(error).splitlines()[0]}; "
            "choose another, or install the tracker (pip install 'flyp-saflex[tracking]')"
        ) from error
    rows = (options.batch_size, round(config.augment.per_train * options.batch_size) if config.augment.upstream else 0)
    share = accelerator.num_processes * options.accumulation
    if any(count % share for count in rows):
        raise ConfigError(
            f"{rows[0]} training and {rows[1]} augmented rows per step cannot be shared by "
            f"{accelerator.num_processes} processes x "
            f"{options.accumulation} parts: change train.batch_size, augment.per_train or train.accumulation"
        )
    return accelerator


def check_folder(path: Path, config: Config, *, resume: bool, limit: int | None) -> None:
    """Check, before anything is loaded, that a run can start or go on in this folder; write nothing.

    Raises:
        RunError: it holds a run that is not to be resumed, that is finished, or that was started otherwise.
    """
    if not (path / "config.toml").is_file():
        return
    if not resume:
        raise RunError(f"run folder {path} already holds a run: add --resume to go on with it, or choose another --run-dir")
    run = RunDir(path, lock=False)
    if run.done:
        raise RunError(f"run {path} is finished: evaluate it with flyp-saflex evaluate {path}, or choose another --run-dir")
    changed = [line for line in recipe.differences(run.read_config(), config) if not line.startswith(MAY_CHANGE)]
    started_with = limit_of(path)
    if started_with != limit:
        changed.append(f"--limit: {started_with} -> {limit}")
    if changed:
        raise RunError(
            f"run folder {path} was started with another recipe ({'; '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}): "
            "undo the change, or choose another --run-dir"
        )


def device_name(device: torch.device) -> str:
    """Return what trained, in words that mean something in a report: the GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def open_run(run: RunDir, config: Config, accelerator: Accelerator, *, limit: int | None) -> tuple[int, dict[str, Any]] | None:
    """Write config.toml and env.json, drop logged rows that will come again, return the checkpoint to go on from."""
    existing = (run.path / "config.toml").is_file()
    state = checkpoint.load_newest(run.checkpoints) if existing else None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if existing:
            run.rewind(state[0] if state else 0)
        run.write_environment(limit=limit)
        run.write_config(config)  # after env.json: a folder with a config.toml has both
        accelerator.print(f"resuming after step {state[0]}" if state else f"run folder {run.path}")
    if config.train.tracker != "none":
        try:
            accelerator.init_trackers("flyp-saflex", config={"recipe": config.recipe, "seed": config.seed})
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(
                f"train.tracker = {config.train.tracker} cannot start ({str(error).splitlines()[0]}): "
                "choose another, or train.tracker=none"
            ) from error
    accelerator.wait_for_everyone()
    return state


def plan_line(job: Job, phases: list[Phase], accelerator: Accelerator) -> str:
    """Return one line that says what is about to be done."""
    rows = f"{job.config.train.batch_size} training" + (f" + {job.num_augmented} augmented" if job.num_augmented else "")
    steps = " + ".join(f"{phase.steps}" for phase in phases)
    size = sum(parameter.numel() for parameter in job.learner.parameters()) / 1e6
    return (
        f"{job.config.train.method} on {len(job.dataset.train)} images of {job.dataset.num_classes} classes: "
        f"{steps} steps of {rows} rows, SAFLEX {'on' if job.saflex else 'off'}, "
        f"{size:.1f} M parameters in all, {accelerator.device}, "
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    )


def limit_of(path: Path) -> int | None:
    """Return the `--limit` that the run in a folder was started with."""
    try:
        limit = json.loads((path / "env.json").read_text(encoding="utf-8")).get("limit")
    except (OSError, ValueError):
        return None
    return int(limit) if limit is not None else None
