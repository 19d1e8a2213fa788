"""How long a user waits: from the shell to `--help`, and to the first training step, against importing open_clip.

    python scripts/benchmarks/cold_start.py

Every command is a process of its own, one after another in turn; what is told is CPU time of the process and its children
(steadier than wall time on a shared machine; both are printed). Training is a whole run of one step of a tiny CLIP on a
drawn world: reading the recipe and 400 rows of metadata, loading the model, one step, and writing the model at the end.
The world is drawn before and not timed. Files are in the operating system's cache: a first round is not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from interleaved import hardware, ratio

from flyp_saflex.demo.world import write_world

HEAVY = ("torch", "pandas", "numpy", "PIL", "open_clip", "accelerate", "diffusers", "transformers", "wilds", "sklearn")
TARGET = 1.5
ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str]) -> tuple[float, float]:
    """Run a command in silence; return its CPU seconds, children included, and its wall seconds."""
    before, started = os.times(), time.perf_counter()
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    after, wall = os.times(), time.perf_counter() - started
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{found.stderr}")
    return after.children_user + after.children_system - before.children_user - before.children_system, wall


def heavy_imports(command: list[str]) -> list[str]:
    """Return which of the heavy libraries a Python command imports."""
    found = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]], capture_output=True, text=True, cwd=ROOT, check=True
    ).stderr
    modules = {match[1].split(".")[0] for match in re.finditer(r"\|\s+([\w.]+)$", found, flags=re.MULTILINE)}
    return [name for name in HEAVY if name in modules]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=9)
    repetitions = parser.parse_args().repetitions
    python = sys.executable
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = write_world(folder / "world", num_images=400)
        options = [
            f"data.root={folder / 'world'}",
            f"data.prompts={world / 'prompts'}",
            f"model.name=local-dir:{ROOT / 'flyp_saflex' / 'assets' / 'tiny_clip'}",
            "train.steps=1",
            "train.select_split=",
            "train.log_augmented=false",
            "augment.upstream=[]",
            "data.workers=0",
        ]
        settings = [part for option in options for part in ("--set", option)]
        commands = {
            "import": [python, "-c", "import open_clip"],
            "help": [python, "-m", "flyp_saflex", "--help"],
            "train": [python, "-m", "flyp_saflex", "train", "demo", *settings],
        }
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in commands}
        for number in range(repetitions + 1):
            for key, command in commands.items():
                extra = ["--run-dir", str(folder / f"run{number}")] if key == "train" else []
                measured = run(command + extra)
                if number:
                    times[key].append(measured)
    print(f"{hardware()}, {repetitions} rounds; CPU time (wall time)")

    def against(one: str, other: str) -> str:
        parts = [ratio([row[n] for row in times[one]], [row[n] for row in times[other]]) for n in (0, 1)]
        return f"{parts[0]} ({parts[1]})"

    print(f"one-step training run / import open_clip: {against('train', 'import')} (target {TARGET})")
    print(f"--help / import open_clip: {against('help', 'import')}")
    print(f"heavy libraries that --help imports: {', '.join(heavy_imports(commands['help'])) or 'none'} (of {', '.join(HEAVY)})")


if __name__ == "__main__":
    main()
