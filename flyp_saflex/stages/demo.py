"""`flyp-saflex demo`: the whole idea in minutes on images that are drawn here: no download, no GPU (floor 3).

A drawn camera-trap world; edits of its training photos, two fifths of them spoilt as diffusion editors spoil them; the tiny
CLIP of `assets/tiny_clip`, zero-shot and finetuned with FLYP without edits, with edits trusted, and with SAFLEX; the table.

Everything is kept in one folder, and what is there is not done again:

    world/          a WILDS iWildCam v2.0 folder            runs/           one run folder per condition
    augment_cache/  the edits, and what became of each      demo.log        what the single steps printed
    demo.json       what the folder was made with           report.html     the report, and table.txt what is printed last
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from flyp_saflex import recipe
from flyp_saflex.assets.animals import SPECIES
from flyp_saflex.assets.scene import Scene, at, render
from flyp_saflex.assets.world import CLASSES, FOLDER, TRAIN_PLACES, read_scenes, write_world
from flyp_saflex.cache import AugmentCache
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import RunError, UserError
from flyp_saflex.records import Sample
from flyp_saflex.results import align, percent, read_results
from flyp_saflex.rundir import RunDir, atomic_write, write_json
from flyp_saflex.stages.evaluate import evaluate
from flyp_saflex.stages.report import report
from flyp_saflex.stages.train import train

TINY_CLIP = Path(__file__).resolve().parents[1] / "assets" / "tiny_clip"
SIZE_PX = 64
SPOILT = 0.4
"""Part of the edits that does not show what it should. Chosen, not measured: editors differ."""
KEY = "drawn"
TRUTH = "truth.jsonl"
"""What became of every edit, beside the manifest: for a person who looks, never read in training."""
CONDITIONS: dict[str, tuple[str, ...]] = {
    "zero-shot": ("train.steps=0", "train.epochs=0"),
    "FLYP": (),
    "FLYP + edits, all trusted": ("augment.upstream=cache",),
    "FLYP + edits, SAFLEX": ("augment.upstream=cache", "saflex.enabled=true"),
}
ID, OOD = "id_test", "test"


def demo(out: Path, *, num_images: int = 1600, steps: int = 0, seed: int = 0) -> str:
    """Run the demo in a folder, or go on with it, and return what it printed last: the table and where the report is.

    Args:
        out: the folder; it is new, empty, or a demo's with the same arguments.
        num_images: pictures of the world, 400 or more.
        steps: of every training run; 0: as in the recipe.
        seed: of the world, the edits and the training runs.

    Raises:
        RunError: the folder holds something else, cannot be written, or is in use.
        UserError: started with several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the demo runs in one process: start it as `flyp-saflex demo`, without accelerate launch")
    started = time.monotonic()
    options = [f"seed={seed}", *([f"train.steps={steps}"] if steps else [])]
    settings = {"num_images": num_images, "seed": seed, "spoilt": SPOILT, "recipe": recipe.dumps(recipe.load("demo", options))}
    with _folder(out, settings):
        root = _world(out / "world", num_images, seed)
        options += [f"data.root={root}", f"data.prompts={root / 'prompts'}", f"model.name=local-dir:{TINY_CLIP}"]
        options += [f"cache.root={out / 'augment_cache'}", f"cache.key={KEY}"]
        truth = _edits(out / "augment_cache", root, recipe.load("demo", options), seed)
        runs = []
        for number, (name, changes) in enumerate(CONDITIONS.items(), 3):
            _say(number, name)
            runs.append(out / "runs" / _file_name(name))
            _run(recipe.load("demo", [*options, *changes, f"recipe={name}"]), runs[-1], out / "demo.log")
        with _printing_to(out / "demo.log"):
            report(runs, out=out / "report.html", baseline="FLYP")
        text = summary(runs, truth, seed)
        with atomic_write(out / "table.txt") as file:
            file.write(text)
    text += f"\nDone in {time.monotonic() - started:.0f} s. Report: {out / 'report.html'}"
    print(f"\n{text}")
    return text


@contextmanager
def _folder(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for this demo: new, or made with the same settings.

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
        print("\nWhat is done stays: the same command goes on from here.", flush=True)
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {}  # not ours: differs from every setting


def _world(folder: Path, num_images: int, seed: int) -> Path:
    """Draw the world unless it is there; return its dataset's folder."""
    _say(1, f"world: {num_images} camera-trap pictures of {len(CLASSES)} classes")
    root = folder / FOLDER
    return (
        root if (root / "RELEASE_v2.0.txt").is_file() else write_world(folder, num_images=num_images, seed=seed, size_px=SIZE_PX)
    )


def _edits(cache_root: Path, root: Path, config: Config, seed: int) -> dict[str, str]:
    """Draw one edit of every training picture unless it is there; return what became of each, by aug_id."""
    samples = load_dataset(config.data, seed=seed).train.samples
    scenes = read_scenes(root)
    _say(2, f"edits: {len(samples)} training pictures at another place, {SPOILT:.0%} of them spoilt")
    cache = AugmentCache.create(cache_root / config.data.name / KEY, config.data.name)
    truth = {}
    for number, sample in enumerate(tqdm(samples, unit="edit", desc="drawing edits", disable=None)):
        edited, instruction, kind = edit(scenes[Path(sample.sample_id).name], np.random.default_rng([seed, number]))
        name = AugmentCache.file_name(sample.sample_id, instruction)
        truth[name] = kind
        if name not in cache:
            cache.append(render(edited, SIZE_PX), _row(sample, name, instruction, seed))
    with atomic_write(cache.folder / TRUTH, "wb") as file:
        file.writelines(msgspec.json.encode({"aug_id": name, "kind": kind}) + b"\n" for name, kind in truth.items())
    cache.finish()
    return truth


def _row(sample: Sample, name: str, instruction: str, seed: int) -> dict[str, object]:
    return {
        "file_name": name,
        "source_id": sample.sample_id,
        "label": sample.label,
        "instruction": instruction,
        "model": "flyp_saflex.assets.world",
        "seed": seed,
    }


def edit(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str, str]:
    """Return an edit of a training scene: what it shows, the instruction, and what became of it.

    The place is another one of those that training knows: edits undo the tie between species and place, but show nothing of
    the places of `val` and `test`. A spoilt one has lost its animal or shows another species, half and half; in a spoilt
    edit of an empty picture some animal appears.
    """
    place = str(rng.choice([name for name in TRAIN_PLACES if name != scene.place]))
    moved, instruction = at(scene, place), f"put it in the {place}"
    if rng.random() >= SPOILT:
        return moved, instruction, "faithful"
    if scene.species is not None and rng.random() < 0.5:
        return replace(moved, species=None), instruction, "animal lost"
    species = str(rng.choice([name for name in SPECIES if name != scene.species]))
    return replace(moved, species=species), instruction, "other animal" if scene.species else "animal appeared"


def _run(config: Config, run: Path, log: Path) -> None:
    """Train and evaluate one condition; what is finished is left alone, what was interrupted goes on."""
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


def summary(runs: Sequence[Path], truth: dict[str, str], seed: int) -> str:
    """Return the table of the runs, and what SAFLEX kept of the edits, as text."""
    head = ("", "", "", "ID acc.", "ID F1", "OOD acc.", "OOD F1", "WiSE OOD acc.", "WiSE OOD F1", "alpha")
    lines = [head]
    for run in runs:
        results = read_results(run)
        by = {(row["split"], row["wise_alpha"]): row for row in results["results"]}
        alpha = results["chosen_alpha"]
        cells = [percent(by[split, 1.0][metric]) for split in (ID, OOD) for metric in ("accuracy", "macro_f1")]
        wise = [percent(by[OOD, alpha][metric]) if alpha is not None else "-" for metric in ("accuracy", "macro_f1")]
        lines.append((results["recipe"], "", "", *cells, *wise, "-" if alpha is None else f"{alpha:g}"))
    text = align([(line[0], *line[3:]) for line in lines], left=1)
    text += (
        f"\n\nIn percent, F1: macro. ID: {ID}, cameras that training knows; OOD: {OOD}, cameras at places that it never saw."
        "\nWiSE: weights between zero-shot (0) and finetuned (1); alpha chosen on id_val, never on a test split."
        "\nSAFLEX takes its gradient from val: cameras at two more places that nothing is trained on."
        f"\nn = 1 (seed {seed}): differences of a few points are noise.\n"
    )
    return text + _kept(runs[-1], truth)


def _kept(run: Path, truth: dict[str, str]) -> str:
    """Return a line: how many edits of each kind SAFLEX kept, over all steps."""
    seen, kept = Counter[str](), Counter[str]()
    for row in RunDir(run, lock=False).read_rows("augmented.jsonl"):
        kind = truth[row["id"]]
        seen[kind] += 1
        kept[kind] += row["weight"] > 0
    shares = (f"{kept[kind] / seen[kind]:.0%} of {kind}" for kind in sorted(seen, key=lambda kind: (kind != "faithful", kind)))
    return f"SAFLEX, which is not told what became of an edit, kept: {', '.join(shares)}.\n"


def _say(number: int, text: str) -> None:
    print(f"[{number}/{len(CONDITIONS) + 2}] {text}", flush=True)


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Append what the single steps print to a file; progress bars stay on the terminal."""
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file):
        yield


def _file_name(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
