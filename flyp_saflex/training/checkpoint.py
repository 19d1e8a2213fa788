"""Full-state checkpoints: written whole or not at all, the newest kept, the last good one found.

A checkpoint is one file, checkpoints/step-00000200.pt, that holds tensors and plain values only, so that it is read
without running code from it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flyp_saflex import recipe
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.records import Dataset
from flyp_saflex.storage.data_record import difference, read_record, record_of
from flyp_saflex.storage.files import atomic_write, read_mapping
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.user_text import quoted

MAY_CHANGE = (
    "compare.",
    "data.workers",
    "data.max_unreadable",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.frozen_cache",
    "train.max_loss",
    "train.process_timeout_s",
    "train.tracker",
)
"""Options that a resumed run may have otherwise: they change no digit of what is trained."""

PATTERN = re.compile(r"step-(\d{8})\.pt")


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, oldest first."""
    matches = (PATTERN.fullmatch(path.name) for path in folder.glob("step-*.pt")) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in matches if match)


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write the state after `step` steps, then delete all but the newest `keep` checkpoints.

    Raises:
        RunError: read-only folder or full disk; older checkpoints are then still there.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        reason = _refusal(error) or first_line(error)
        raise RunError(f"cannot write {path}: {reason}; free disk space and go on with --resume") from error
    for old in saved_steps(folder)[:-keep]:
        (folder / f"step-{old:08d}.pt").unlink(missing_ok=True)
    return path


def tidy(folder: Path) -> None:
    """Remove the unfinished files that a killed run left; the caller holds the lock of the run."""
    for pattern in (".step-*.pt.*.tmp", ".best.safetensors.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut where it is long; its type where it has none."""
    lines = str(error).strip().splitlines()
    return quoted(lines[0]) if lines else type(error).__name__


def _refusal(error: BaseException | None) -> str:
    """Return why the file system refused a write; the empty string where it did not.

    torch's writer ends with an error about positions, which came up while the one about the disk was handled.
    """
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    return ""


def load_newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Return the newest checkpoint's step and state, on the CPU; None if there is none.

    Raises:
        RunError: it cannot be read (it was changed after it was written).
    """
    steps = saved_steps(folder)
    if not steps:
        return None
    path = folder / f"step-{steps[-1]:08d}.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds {type(state).__name__}, expected the parts of a run's state")
        return steps[-1], state
    except Exception as error:  # torch raises a dozen types for a damaged file
        raise RunError(
            f"checkpoint {path} cannot be read ({first_line(error)}): delete it to resume from the one before"
        ) from error


def moved(value: Any, device: torch.device) -> Any:
    """Return nested dictionaries with their tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: moved(item, device) for key, item in value.items()} if isinstance(value, dict) else value


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


def check_data(path: Path, dataset: Dataset) -> list[str]:
    """Check that the run in a folder, if there is one, was started on this data; return notes.

    Raises:
        RunError: other classes, images or labels.
    """
    if not (path / "config.toml").is_file():
        return []
    own, found = read_record(path), record_of(dataset)
    if own is None:
        return [f"run folder {path} has no data.json (an older version): its classes and data cannot be compared"]
    if changed := difference(own, found, sizes=False):
        raise RunError(
            f"run folder {path} was started on other data ({changed}): bring the data back, or choose another --run-dir"
        )
    notes = [f"{path}: {changed} than when the run was started"] if (changed := difference(own, found)) else []
    if own.templates != found.templates:
        notes.append(f"{path}: the caption templates are not those that the run was started with")
    return notes


def open_run(
    run: RunDir, config: Config, dataset: Dataset, accelerator: Accelerator, *, limit: int | None
) -> tuple[int, dict[str, Any]] | None:
    """Write config.toml, env.json and data.json, drop logged rows that will come again, return the checkpoint to go on from."""
    existing = (run.path / "config.toml").is_file()
    state = load_newest(run.checkpoints) if existing else None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        tidy(run.checkpoints)
        if existing:
            run.rewind(state[0] if state else 0)
        run.write_environment(limit=limit)
        if not existing or read_record(run.path) is None:
            record_of(dataset).write(run.path)
        run.write_config(config)  # the last: a folder with a config.toml has all three
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


def limit_of(path: Path) -> int | None:
    """Return the `--limit` that the run in a folder was started with."""
    limit = read_mapping(path / "env.json").get("limit")
    return limit if isinstance(limit, int) else None
