"""Run folder: lock, atomic writes, configuration, metrics, environment and the final DONE.

Files are written under a temporary name, flushed to disk and renamed, so that no reader sees a half-written file; logs
(`metrics.jsonl`, `augmented.jsonl`) are appended to, and an incomplete last line is ignored.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from filelock import Timeout

from flyp_saflex import recipe as recipe_module
from flyp_saflex.config import Config
from flyp_saflex.errors import RunError
from flyp_saflex.storage.files import atomic_write, hold, read_mapping, write_json
from flyp_saflex.user_text import quoted

PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "accelerate",
    "wilds",
    "timm",
    "numpy",
    "pillow",
    "transformers",
    "diffusers",
)


class RunDir:
    """Run folder, locked by one process at a time.

    Args:
        path: the folder; it is created if missing.
        lock: whether to lock it against other processes (in a distributed run only the main process does).

    Raises:
        RunError: the folder cannot be written, or another process has locked it.
    """

    def __init__(self, path: Path, *, lock: bool = True) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = hold(path / ".lock") if lock else None
        except Timeout:
            raise RunError(
                f"run folder {path} is in use by another process: wait for it, stop it, or choose another with --run-dir"
            ) from None
        except OSError as error:
            raise RunError(f"run folder {path} cannot be written: {error.strerror}; choose another with --run-dir") from error

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def checkpoints(self) -> Path:
        """Folder of the full-state checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Folder of the finetuned model, in open_clip's `local-dir:` layout."""
        return self.path / "model"

    @property
    def done(self) -> bool:
        """True if the run is finished."""
        return (self.path / "DONE").is_file()

    def mark_done(self) -> None:
        """Write DONE, the last file of a run."""
        with atomic_write(self.path / "DONE") as file:
            file.write(time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))

    def write_config(self, config: Config) -> None:
        """Write config.toml with the options of the run, defaults included."""
        with atomic_write(self.path / "config.toml") as file:
            file.write(recipe_module.dumps(config))

    def read_config(self) -> Config:
        """Read config.toml.

        Raises:
            RunError: the folder has no config.toml.
            ConfigError: the file is invalid, see `recipe.load`.
        """
        path = self.path / "config.toml"
        if not path.is_file():
            raise RunError(
                f"{self.path} is not a run folder: it has no config.toml; give the folder that `flyp-saflex train` wrote"
            )
        return recipe_module.load(str(path))

    def write_environment(self, **extra: Any) -> None:
        """Write env.json: `environment()` and the given entries."""
        write_json(self.path / "env.json", environment() | extra)

    def note_seconds(self, stage: str, part: str, seconds: float) -> None:
        """Record in env.json the seconds that a part of a later command took; a repeated part replaces its time."""
        path = self.path / "env.json"
        values = read_mapping(path)  # empty in a run that was copied without its env.json
        noted = values.get("stage_seconds")
        noted = noted if isinstance(noted, dict) else {}
        parts = noted.get(stage)
        parts = parts if isinstance(parts, dict) else {}
        values["stage_seconds"] = noted | {stage: parts | {part: round(seconds, 3)}}
        write_json(path, values)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl; NaN and infinity become null.

        Raises:
            RunError: the disk is full or not writable.
        """
        self._append("metrics.jsonl", [row])

    def append_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to augmented.jsonl: weight, gain and learned label of each augmented row.

        Raises:
            RunError: the disk is full or not writable.
        """
        self._append("augmented.jsonl", rows)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            with open(self.path / name, "ab") as file:
                file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        except OSError as error:
            raise RunError(
                f"cannot write {self.path / name}: {error.strerror}; free disk space and go on with --resume"
            ) from error

    def kept_share(self) -> float | None:
        """Return the mean part of the augmented rows that was kept, over the logged steps; None if none was logged.

        Raises:
            RunError: a line of metrics.jsonl is damaged.
        """
        found = [row["kept_fraction"] for row in self.read_rows() if isinstance(row.get("kept_fraction"), (int, float))]
        return math.fsum(found) / len(found) if found else None

    def read_rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Read metrics.jsonl or augmented.jsonl, without a last line truncated by a kill; empty if the file is missing.

        Raises:
            RunError: another line is damaged.
        """
        path, rows = self.path / name, []
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(msgspec.json.decode(line, type=dict[str, Any]))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                if number == len(lines):  # no newline after it: the writer was killed
                    break
                raise RunError(f"{path} line {number}: no valid row ({quoted(str(error))}); mend or remove the line") from None
        return rows

    def rewind(self, step: int) -> None:
        """Remove the logged rows after `step`, which a resumed run writes again."""
        for name in ("metrics.jsonl", "augmented.jsonl"):
            if (self.path / name).is_file():
                rows = [row for row in self.read_rows(name) if row.get("step", 0) <= step and "diverged" not in row]
                with atomic_write(self.path / name, "wb") as file:
                    file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def environment() -> dict[str, Any]:
    """Return versions of Python and packages, platform, CPU, commit (None outside of a checkout) and command line."""
    versions = {}
    for package in ("flyp-saflex", *PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    source = Path(__file__).resolve().parents[2]
    commit = None
    if (source / ".git").exists():
        git = subprocess.run(["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
        "commit": commit,
        "command": sys.argv,
    }
