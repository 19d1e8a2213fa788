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
        world/          a WILDS iWildCam v2.0 folder       verdict.txt   answers of the comparison
        augment_cache/  edits and filter scores            runs/         one run folder per condition and seed
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flyp_saflex import recipe
from flyp_saflex.assets import TINY_CLIP, TINY_EDITOR
from flyp_saflex.comparison.compare import compare
from flyp_saflex.config import Config
from flyp_saflex.demo.world import CLASSES, FOLDER, write_world
from flyp_saflex.editing.generate import generate
from flyp_saflex.errors import RunError, UserError
from flyp_saflex.evaluation.statistics import paired_difference, summarise
from flyp_saflex.filtering.filter import filter_edits
from flyp_saflex.storage.augment_cache import SCORES, AugmentCache
from flyp_saflex.storage.files import atomic_write, write_json
from flyp_saflex.storage.results import align, percent, read_results
from flyp_saflex.storage.run_folder import RunDir

SIZE_PX = 64
KEY = "edits"
CLEAN, TRUSTED, FILTERED, SAFLEX = "no-edits", "trusted", "filter-alia", "saflex"
LABELS = {
    "zero-shot": "zero-shot",
    CLEAN: "FLYP",
    TRUSTED: "FLYP + edits, all trusted",
    FILTERED: "FLYP + edits, filtered",
    SAFLEX: "FLYP + edits, SAFLEX",
}
"""Conditions of the recipe's `[compare]`, by the words of the table."""
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
        progress = _Progress(3 * seeds + 2)
        for seed in range(seeds):
            _make_edits(out, seed, num_images, _config(out, seed, changes, seeds), progress)
        config = _config(out, 0, changes, seeds)
        progress.say(f"training: {', '.join(label for name, label in LABELS.items() if name not in (FILTERED, SAFLEX))}")
        first = {name: own for name, own in config.compare.conditions.items() if name not in (FILTERED, SAFLEX)}
        compare(replace(config, compare=replace(config.compare, conditions=first)), out, conclude=False)
        for seed in range(seeds):
            progress.say(f"{progress.told(seed)}filter: find edits without an animal, without a change, or of another class")
            _filter(out, seed, _config(out, seed, changes, seeds))
        progress.say(f"training: {LABELS[FILTERED]}, {LABELS[SAFLEX]}")
        compare(config, out)
        text = summary([out / "runs" / f"{name}-seed{seed}" for name in LABELS for seed in range(seeds)])
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

    def told(self, seed: int) -> str:
        """Return the seed in words where there are several."""
        return f"seed {seed}, " if self.total > 5 else ""


def _config(out: Path, seed: int, changes: Sequence[str], seeds: int) -> Config:
    """Return the recipe of one seed, whose `[compare]` is about all of them."""
    paths = [
        f"data.root={out}/seed{{seed}}/world/{FOLDER}",
        f"data.prompts={out}/seed{{seed}}/world/{FOLDER}/prompts",
        f"cache.root={out}/seed{{seed}}/augment_cache",
    ]
    options = [*changes, f"seed={seed}", *(path.replace("{seed}", str(seed)) for path in paths), f"cache.key={KEY}"]
    options += [f"model.name=local-dir:{TINY_CLIP}", f"editor.model={TINY_EDITOR}"]
    options += [f"compare.seeds={list(range(seeds))}", f"compare.common={json.dumps(paths)}"]
    return recipe.load("demo", options)


def _make_edits(out: Path, seed: int, num_images: int, config: Config, progress: _Progress) -> None:
    """Draw the world of a seed and edit its training pictures, as far as it is not done."""
    home, told = out / f"seed{seed}", progress.told(seed)
    home.mkdir(exist_ok=True)
    progress.say(f"{told}world: {num_images} camera-trap pictures of {len(CLASSES)} classes")
    _world(home / "world", num_images, seed)
    progress.say(f"{told}edits: a small InstructPix2Pix moves the animals to other places (prompts: {config.editor.prompts})")
    with _printing_to(out / "demo.log"):
        generate(config)


def _filter(out: Path, seed: int, config: Config) -> None:
    """Score the edits of a seed with the model trained without them, unless it is done."""
    entry = AugmentCache.open(config.cache.root, config.data.name, KEY)
    if not (entry.folder / SCORES).is_file():
        with _printing_to(out / "demo.log"):
            run = out / "runs" / f"{CLEAN}-seed{seed}"
            filter_edits(replace(config, filter=replace(config.filter, run=str(run))))


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
        lines.append((LABELS[name], *(percent(summarise(column).mean) if column else "-" for column in columns)))
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
