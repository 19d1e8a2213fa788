"""Command `demo`: what edits and SAFLEX are for, in minutes on synthetic images, without download or GPU.

1. A synthetic camera-trap dataset with biased cameras: in training every species is at its home place only.
2. Edits that put the animals of training at ten named places, drawn by the world's own renderer instead of a diffusion model.
   Half of them are wrong on purpose: they show another species, or nobody.
3. A few edits with the same instructions by the tiny InstructPix2Pix of `assets/tiny_editor`, to look at.
4. The tiny CLIP of `assets/tiny_clip`, zero-shot and finetuned with FLYP: without edits, with all of them, with a plain filter,
   with SAFLEX, with an oracle that is told which edits are wrong.
5. A table and a report.

All results are in one folder; a repeated command skips the finished parts:

    demo.json       settings of the demo                   demo.log      output of the single steps
    seed0/          one folder per seed:                   report.html   report; table.txt: the table that is printed last
        world/          a WILDS iWildCam v2.0 folder       verdict.txt   answers of the comparison
        augment_cache/  rendered edits, diffusion edits    runs/         one run folder per condition and seed
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
from flyp_saflex.comparison.conditions import SET_MARK, conditions_of
from flyp_saflex.comparison.runs import run_path
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.demo.biased_cameras import EDITS_PER_IMAGE, biased_world, write_rendered_edits
from flyp_saflex.demo.places import PLACES
from flyp_saflex.demo.world import CLASSES, FOLDER
from flyp_saflex.editing.generate import generate
from flyp_saflex.errors import RunError, UserError
from flyp_saflex.evaluation.statistics import paired_difference, summarise
from flyp_saflex.extras import require
from flyp_saflex.storage.augment_cache import SHEETS
from flyp_saflex.storage.files import atomic_write, write_json
from flyp_saflex.storage.results import align, percent, read_results
from flyp_saflex.storage.run_folder import RunDir

RATE = 0.5
"""Share of the rendered edits that are wrong on purpose."""
NUM_DIFFUSION = 32
"""Pictures that the tiny diffusion model edits."""
SAFLEX = "saflex"
LABELS = {
    "zero-shot": "zero-shot",
    "no-edits": "FLYP, no edits",
    "trusted": "FLYP + rendered edits, all trusted",
    "filter-argmax": "FLYP + rendered edits, argmax filter",
    SAFLEX: "FLYP + rendered edits, SAFLEX",
    "oracle": "FLYP + rendered edits, oracle",
}
"""Conditions of the recipe's `[compare]`, by the words of the table."""
RIVALS = ("no-edits", "zero-shot", "trusted", "filter-argmax", "oracle")
"""Conditions that SAFLEX is compared with below the table."""
ID, OOD = "id_test", "test"
INTRODUCTION = """\
A drawn world of camera traps: in training every species is at its home place only, in test anywhere else.
Edits put the animals at ten named places. They are rendered: the world's own renderer is the editor, no diffusion model.
Half of them are wrong on purpose: they show another species, or nobody. SAFLEX is not told which."""
ONE_SEED = (
    "n = 1: one seed shows how it works, not by how much it helps: no difference has an interval, and single seeds vary\n"
    "by several points. --seeds 5 repeats everything."
)


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
        UserError: several processes, fewer than one seed, or an extra that is not installed.
        DataError: `num_images` is below 400.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the demo runs in one process: start it as `flyp-saflex demo`, without accelerate launch")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expected 1 or more")
    require("flyp-saflex demo", "diffusers", "transformers", "wilds", "matplotlib")
    started = time.monotonic()
    changes = [f"train.steps={steps}"] if steps else []
    settings = {"num_images": num_images, "recipe": recipe.dumps(recipe.load("demo", changes))}
    with _folder(out, settings):
        print(INTRODUCTION + (f"\n{ONE_SEED}" if seeds == 1 else ""), flush=True)
        progress = _Progress(2 * seeds + 2)
        for seed in range(seeds):
            _make_edits(out, seed, num_images, _config(out, seed, changes, seeds), progress)
        config = _config(out, 0, changes, seeds)
        _edit_with_diffusion(out, config, progress)
        progress.say(f"training: {'; '.join(LABELS.values())}")
        compare(config, out)
        text = summary([run_path(out, one, seed) for one in conditions_of(config) for seed in config.compare.seeds])
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
        return f"seed {seed}, " if self.total > 4 else ""


def _config(out: Path, seed: int, changes: Sequence[str], seeds: int) -> Config:
    """Return the recipe of one seed, whose `[compare]` is about all of them."""
    paths = [
        f"data.root={out}/seed{{seed}}/world/{FOLDER}",
        f"data.prompts={out}/seed{{seed}}/world/{FOLDER}/prompts",
        f"cache.root={out}/seed{{seed}}/augment_cache",
    ]
    options = [*changes, f"seed={seed}", *(path.replace("{seed}", str(seed)) for path in paths)]
    options += [f"model.name=local-dir:{TINY_CLIP}", f"editor.model={TINY_EDITOR}"]
    options += [f"compare.seeds={list(range(seeds))}", f"compare.common={json.dumps(paths)}"]
    return recipe.load("demo", options)


def _make_edits(out: Path, seed: int, num_images: int, config: Config, progress: _Progress) -> None:
    """Draw the world of a seed and render edits of its training pictures, as far as it is not done."""
    home, told = out / f"seed{seed}", progress.told(seed)
    home.mkdir(exist_ok=True)
    progress.say(f"{told}world: {num_images} camera-trap pictures of {len(CLASSES)} classes")
    biased_world(home / "world", seed=seed, num_images=num_images)
    progress.say(
        f"{told}edits: each training picture rendered at {EDITS_PER_IMAGE} of {len(PLACES)} named places, "
        "half of them wrong on purpose"
    )
    dataset = load_dataset(config.data, seed=seed)
    write_rendered_edits(dataset, Path(config.cache.root), config.cache.key, seed=seed, rate=RATE)


def _edit_with_diffusion(out: Path, config: Config, progress: _Progress) -> None:
    """Edit a few pictures of the first world with the tiny diffusion model, unless it is done."""
    progress.say(
        f"a look at diffusion edits: a small InstructPix2Pix follows the same instructions on {NUM_DIFFUSION} pictures "
        f"(prompts: {config.editor.prompts}); nothing is trained on them"
    )
    with _printing_to(out / "demo.log"):
        folder = generate(replace(config, cache=replace(config.cache, key="diffusion")), limit=NUM_DIFFUSION)
    print(f"      sheets of pictures and edits: {folder / SHEETS}", flush=True)


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


def summary(runs: Sequence[Path]) -> str:
    """Return the table of the runs as text.

    It has the mean over seeds per condition and, with several seeds, the paired differences of SAFLEX to the other conditions.
    """
    by_name: dict[str, dict[int, dict[str, float | None]]] = {name: {} for name in LABELS}
    for run in runs:
        results = read_results(run)
        by_name[results["recipe"].partition(SET_MARK)[0]][results["seed"]] = _numbers(results)
    head = ("in percent", "ID acc.", "ID F1", "OOD acc.", "OOD F1", "WiSE OOD acc.", "WiSE OOD F1")
    lines: list[tuple[str, ...]] = [head]
    for name, by_seed in by_name.items():
        columns = [[value for row in by_seed.values() if (value := row[key]) is not None] for key in head[1:]]
        lines.append((LABELS[name], *(percent(summarise(column).mean) if column else "-" for column in columns)))
    num_seeds = len(by_name[SAFLEX])
    text = align(lines, left=1) + (
        f"\n\nRendered edits: drawn by the world's own renderer, half of them wrong on purpose; only the oracle is told which."
        f"\nF1: macro. ID: {ID}, cameras of the training split; OOD: {OOD}, cameras at places that are not in training."
        "\nWiSE: weights between zero-shot (0) and finetuned (1); alpha chosen on id_val, never on a test split."
        "\nSAFLEX takes its validation gradient from val: cameras at two other places, which no run trains on.\n"
    )
    if num_seeds == 1:
        return f"{text}{ONE_SEED}\n"
    text += f"\nSAFLEX against the others, n = {num_seeds} seeds: points with a paired 95 % interval\n"
    lines = [("against", "OOD acc.", "OOD F1")]
    for rival in RIVALS:
        cells = []
        for key in lines[0][1:]:
            ours, theirs = ({seed: row[key] or 0.0 for seed, row in by_name[name].items()} for name in (SAFLEX, rival))
            found = paired_difference(ours, theirs)
            if found is None or found.low is None or found.high is None:
                cells.append("-")
            else:
                cells.append(f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]")
        lines.append((LABELS[rival], *cells))
    return f"{text}{align(lines, left=1)}\n"


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
