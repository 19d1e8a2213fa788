"""Full-state checkpoints: write whole or not at all, keep the newest, find the last good one (floor 3, shared by stages).

A checkpoint is one file, checkpoints/step-00000200.pt, that holds tensors and plain values only, so that it is read
without running code from it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from flyp_saflex.errors import RunError
from flyp_saflex.storage.files import atomic_write

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
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the file refuses a write
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        raise RunError(f"cannot write {path}: {reason}; free disk space and go on with --resume") from error
    for old in saved_steps(folder)[:-keep]:
        (folder / f"step-{old:08d}.pt").unlink(missing_ok=True)
    return path


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
        return steps[-1], torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"checkpoint {path} cannot be read ({reason}): delete it to resume from the one before") from error
