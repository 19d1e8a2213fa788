"""Command `demo`: the whole method in minutes on synthetic images, without download or GPU.

1. A synthetic camera-trap dataset.
2. Edits of its training images by the tiny InstructPix2Pix of `assets/tiny_editor`, which follows the prompt but does not
   always preserve the animal.
3. The tiny CLIP of `assets/tiny_clip`, zero-shot and finetuned with FLYP: without edits, with all edits, with filtered edits
   (ALIA), with SAFLEX.
4. A table and a report.

All results are in one folder; a repeated command skips the finished parts:

    demo.json       settings of the demo                   demo.log      output of the single steps
    seed0/          one folder per seed:                   report.html   report; table.txt: the table that is printed last
        world/          a WILDS iWildCam v2.0 folder
        augment_cache/  edits and filter scores
        runs/           one run folder per condition
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flyp_saflex import recipe
from flyp_saflex.assets import TINY_CLIP, TINY_EDITOR
from flyp_saflex.config import Config
from flyp_saflex.demo.world import CLASSES, FOLDER, write_world
from flyp_saflex.editing.generate import generate
from flyp_saflex.errors import RunError, UserError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.evaluation.statistics import paired_difference, summarise
from flyp_saflex.filtering.filter import filter_edits
from flyp_saflex.reporting.report import report
from flyp_saflex.storage.augment_cache import SCORES, AugmentCache
from flyp_saflex.storage.files import atomic_write, write_json
from flyp_saflex.storage.results import align, percent, read_results
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.train import train

SIZE_PX = 64
KEY = "edits"
TRUSTED, SAFLEX = "FLYP + edits, all trusted", "FLYP + edits, SAFLEX"
CONDITIONS: dict[str, tuple[str, ...]] = {
    "zero-shot": ("train.steps=0", "train.epochs=0"),
    "FLYP": (),
    TRUSTED: ("augment.upstream=cache",),
    "FLYP + edits, filtered": ("augment.upstream=cache", "augment.filter=scores"),
    SAFLEX: ("augment.upstream=cache", "saflex.enabled=true"),
}
CLEAN = "FLYP"
"""Condition whose model the confidence filter uses."""
ID, OOD = "id_test", "test"


def demo(out: Path, *, seeds: int = 1, num_images: int = 2400, steps: int = 0) -> str:
    """Run the demo in a folder, or resume it.

    Args:
        out: a new or empty folder, or the folder of a demo with the same arguments (`seeds` may differ).
        seeds: number of repetitions with seeds 0, 1 ..., each with its own world, edits and training runs.
        num_images: number of images per world, at least 400.
        steps: steps per training run; 0: as in the recipe.

    Returns:
        The text that is printed last: the table, the duration and the path of the report.

    Raises:
        RunError: the folder holds other files, cannot be written, or is in use.
        UserError: several processes, or fewer than one seed.
        DataError: `num_images` is below 400.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the demo runs in one process: start it as `flyp-saflex demo`, without accelerate launch")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expected 1 or more")
    started = time.monotonic()
    changes = [f"train.steps={steps}"] if steps else []
    settings = {"num_images": num_images, "recipe": recipe.dumps(recipe.load("demo", changes))}
    with _folder(out, settings):
        progress = _Progress(seeds * (len(CONDITIONS) + 3) + 1)
        runs = [run for seed in range(seeds) for run in _one_seed(out, seed, num_images, changes, progress)]
        progress.say("report")
        with _printing_to(out / "demo.log"):
            report(runs, out=out / "report.html", baseline=TRUSTED)
        text = summary(runs)
        with atomic_write(out / "table.txt") as file:
            file.write(text)
    text += f"\nDone in {time.monotonic() - started:.0f} s. Report: {out / 'report.html'}"
    print(f"\n{text}")
    return text


@dataclass
class _Progress:
    """Counter of the steps of all seeds, printed with each step."""

    total: int
    done: int = field(default=0, init=False)

    def say(self, text: str) -> None:
        self.done += 1
        print(f"[{self.done}/{self.total}] {text}", flush=True)


def _one_seed(out: Path, seed: int, num_images: int, changes: Sequence[str], progress: _Progress) -> list[Path]:
    """Run all steps of one seed; return its run folders."""
    home, log = out / f"seed{seed}", out / "demo.log"
    told = f"seed {seed}, " if progress.total > len(CONDITIONS) + 4 else ""
    home.mkdir(exist_ok=True)
    progress.say(f"{told}world: {num_images} camera-trap pictures of {len(CLASSES)} classes")
    root = _world(home / "world", num_images, seed)
    options = [*changes, f"seed={seed}", f"data.root={root}", f"data.prompts={root / 'prompts'}"]
    options += [f"model.name=local-dir:{TINY_CLIP}", f"editor.model={TINY_EDITOR}"]
    options += [f"cache.root={home / 'augment_cache'}", f"cache.key={KEY}"]
    config = recipe.load("demo", options)
    progress.say(f"{told}edits: a small InstructPix2Pix moves the animals to other places (prompts: {config.editor.prompts})")
    with _printing_to(log):
        generate(config)
    entry = AugmentCache.open(config.cache.root, config.data.name, KEY)
    runs: dict[str, Path] = {}
    for name, condition in CONDITIONS.items():
        if "augment.filter=scores" in condition:
            progress.say(f"{told}filter: find edits without an animal, without a change, or of another class")
            if not (entry.folder / SCORES).is_file():
                with _printing_to(log):
                    filter_edits(recipe.load("demo", [*options, f"filter.run={runs[CLEAN]}"]))
        progress.say(f"{told}{name}")
        runs[name] = home / "runs" / _file_name(name)
        _run(recipe.load("demo", [*options, *condition, f"recipe={name}"]), runs[name], log)
    return list(runs.values())


@contextmanager
def _folder(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Lock the folder and check that it is new or has the same settings.

    Raises:
        RunError: see `demo`.
    """
    made_with = out / "demo.json"
    if out.is_dir() and not made_with.is_file() and any(entry.name != ".lock" for entry in out.iterdir()):
        raise RunError(f"--out {out}: the folder holds files that are not a demo's; give a new or an empty folder")
    if made_with.is_file() and (found := _read(made_with)) != settings:
        changed = sorted(key for key in settings if found.get(key) != settings[key])
        raise RunError(f"--out {out} holds a demo made with another {' and '.join(changed)}: give a new folder, or delete it")
    try:
        with RunDir(out):
            write_json(made_with, settings)
            yield
    except RunError as error:
        raise RunError(str(error).replace("--run-dir", "--out")) from None
    except OSError as error:
        raise RunError(
            f"--out {out}: {error.filename or 'a file'} cannot be written ({error.strerror}); free disk space or choose another"
        ) from error
    except KeyboardInterrupt:
        print("\nStopped; the same command resumes the demo.", flush=True)
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {}  # not written by the demo: differs from all settings


def _world(folder: Path, num_images: int, seed: int) -> Path:
    """Render the world unless it is complete; return the folder of its dataset."""
    root = folder / FOLDER
    if (root / "RELEASE_v2.0.txt").is_file():
        return root
    return write_world(folder, num_images=num_images, seed=seed, size_px=SIZE_PX)


def _run(config: Config, run: Path, log: Path) -> None:
    """Train and evaluate one condition; skip finished parts and resume interrupted ones."""
    folder = RunDir(run, lock=False)
    with _printing_to(log):
        if not folder.done:
            train(config, run, resume=(run / "config.toml").is_file())
        if not _evaluated(run):
            evaluate(run, wise_alphas=(1.0,) if config.recipe == "zero-shot" else None)


def _evaluated(run: Path) -> bool:
    try:
        return {ID, OOD} <= {row["split"] for row in read_results(run)["results"]}
    except RunError:
        return False


def summary(runs: Sequence[Path]) -> str:
    """Return the table of the runs as text.

    It has the mean over seeds per condition and, with several seeds, the paired difference of SAFLEX to trusting all edits.
    """
    by_name: dict[str, dict[int, dict[str, float | None]]] = {}
    for run in runs:
        results = read_results(run)
        by_name.setdefault(results["recipe"], {})[results["seed"]] = _numbers(results)
    head = ("in percent", "ID acc.", "ID F1", "OOD acc.", "OOD F1", "WiSE OOD acc.", "WiSE OOD F1")
    lines: list[tuple[str, ...]] = [head]
    for name, by_seed in by_name.items():
        columns = [[value for row in by_seed.values() if (value := row[key]) is not None] for key in head[1:]]
        lines.append((name, *(percent(summarise(column).mean) if column else "-" for column in columns)))
    seeds = sorted(by_name[SAFLEX])
    text = align(lines, left=1) + (
        f"\n\nF1: macro. ID: {ID}, cameras of the training split; OOD: {OOD}, cameras at places that are not in training."
        "\nWiSE: weights between zero-shot (0) and finetuned (1); alpha chosen on id_val, never on a test split."
        "\nSAFLEX takes its validation gradient from val: cameras at two other places, which no run trains on.\n"
    )
    if len(seeds) == 1:
        return text + f"n = 1 (seed {seeds[0]}): differences of a few points are noise; --seeds 5 repeats everything.\n"
    for key in ("OOD acc.", "OOD F1"):
        ours, trusted = ({seed: row[key] or 0.0 for seed, row in by_name[name].items()} for name in (SAFLEX, TRUSTED))
        found = paired_difference(ours, trusted)
        if found is not None and found.low is not None and found.high is not None:
            text += (
                f"{key}, SAFLEX against trusting the edits, n = {found.n} seeds, points with a paired 95 % interval: "
                f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]\n"
            )
    return text


def _numbers(results: dict[str, Any]) -> dict[str, float | None]:
    """Return the values of one run by column of the table."""
    by = {(row["split"], row["wise_alpha"]): row for row in results["results"]}
    found: dict[str, float | None] = {}
    for label, metric in (("acc.", "accuracy"), ("F1", "macro_f1")):
        found |= {f"{shift} {label}": by[split, 1.0][metric] for shift, split in (("ID", ID), ("OOD", OOD))}
        alpha = results["chosen_alpha"]
        found[f"WiSE OOD {label}"] = None if alpha is None else by[OOD, alpha][metric]
    return found


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Append the printed output of a step to a file; progress bars stay on the terminal."""
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file):
        yield


def _file_name(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
