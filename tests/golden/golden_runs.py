"""Golden runs: the commands on a small drawn dataset, and the digits that they print and write.

Everything goes through the command line, so that no digit depends on where a function lives. `test_golden.py` compares.

    python tests/golden/golden_runs.py            print every difference to the stored digits
    python tests/golden/golden_runs.py --write    store the digits of this checkout (a change of method says why)
    python tests/golden/golden_runs.py --before   make before.tar.xz: run folders, a cache and a recipe of this checkout
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "flyp_saflex" / "assets"
BEFORE = HERE / "before.tar.xz"
CLASSES = ("circle", "square", "stripes")
TEXTS = """
dataset = "folder"
[[edits]]
domain = "snow"
instruction = "put the {} in the snow"
[[edits]]
domain = "savanna"
instruction = "put the {} in the savanna"
[[edits]]
domain = "lake"
instruction = "put the {} near a lake"
[[edits]]
domain = "rocks"
instruction = "put the {} in the rocks"
[semantic]
positive = ["a photo of a {}."]
negative = ["a photo of a landscape without animals."]
"""
EDITED = ("augment.upstream=cache",)
SAFLEX = (*EDITED, "saflex.enabled=true", "saflex.preset=robust")
RUNS: dict[str, tuple[str, ...]] = {
    "flyp": (),
    "robust": SAFLEX,
    "paper": (*SAFLEX, "saflex.preset=paper"),
    "mixup": ("augment.upstream=mixup", "saflex.enabled=true"),
    "in-parts": (*SAFLEX, "train.rows_at_once=4"),
    "decided-first": (*SAFLEX, "saflex.select=always"),
    "ce-text": ("train.method=ce-text", *SAFLEX, "saflex.validation_loss=ce"),
    "lp-ft": ("train.method=lp-ft", "train.probe_steps=8", "train.steps=12", *EDITED, "augment.filter=argmax"),
}
"""Overrides by run: the plain step, both presets, and every way a step can go."""


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in a folder, so that run folders hold relative paths."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def draw_images(root: Path) -> None:
    """Write root/<domain>/<class>/N.png: two domains, three classes, eight pictures each, 64 px, in whole numbers only."""
    y, x = np.mgrid[:64, :64]
    for dark, domain in enumerate(("day", "night")):
        for kind, name in enumerate(CLASSES):
            (root / domain / name).mkdir(parents=True)
            for number in range(8):
                left, top = (number * 7 + kind) % 17 - 8, (number * 5 + dark) % 13 - 6
                masks = (
                    (x - 32 - left) ** 2 + (y - 32 - top) ** 2 < 260,
                    np.maximum(abs(x - 32 - left), abs(y - 32 - top)) < 14,
                    (x + left) % 16 < 8,
                )
                pixels = np.full((64, 64, 3), (190, 50)[dark]) + ((x * 3 + y * 5 + number) % 24)[..., None] // 8 * 8
                pixels[masks[kind]] = ((60, 90, 150), (120, 40, 80))[dark]
                Image.fromarray(pixels.astype(np.uint8)).save(root / domain / name / f"{number}.png")


def options(model: Path | str) -> list[str]:
    """Return the `--set` values that all runs share; every path is relative to the working folder."""
    values = [
        "seed=3",
        "data.root=images",
        "data.train_domains=day",
        "data.test_domains=night",
        "data.select_fraction=0.25",
        "data.test_fraction=0.25",
        f"model.name=local-dir:{model}",
        "model.pretrained=",
        "editor.prompts=texts.toml",
        "editor.model=tiny_editor",
        "editor.steps=2",
        "editor.size_px=64",
        "editor.safety_checker=false",
        "cache.root=augment_cache",
        "cache.key=edits",
        "train.steps=20",
        "train.batch_size=6",
        "train.lr=1e-4",
        "train.warmup_steps=2",
        "train.log_every=1",
        "train.log_augmented=true",
        "train.evaluate_every=10",
        "evaluate.bootstrap=20",
    ]
    return [part for value in values for part in ("--set", value)]


def command(*words: str) -> None:
    """Run a command of the command line in this process."""
    from flyp_saflex.cli import main

    code = main(words)
    assert code == 0, f"flyp-saflex {' '.join(words)}: exit code {code}"


def run_all(home: Path) -> dict[str, Any]:
    """Run everything in an empty folder; return the digits, by name."""
    with working_in(home):
        draw_images(Path("images"))
        Path("texts.toml").write_text(TEXTS, encoding="utf-8")
        for name in ("tiny_clip", "tiny_editor"):
            Path(name).symlink_to(ASSETS / name)
        common = options("tiny_clip")
        found: dict[str, Any] = {}
        command("generate", "folder", *common, "--limit", "3")
        entry = Path("augment_cache/folder/edits")
        manifest = sorted(rows(entry / "metadata.jsonl"), key=lambda row: row["file_name"])
        found["edits"] = [edit_digits(entry, row) for row in manifest]
        for name, changes in RUNS.items():
            own = [part for change in changes for part in ("--set", change)]
            command("train", "folder", *common, *own, "--set", f"recipe={name}", "--run-dir", f"runs/{name}")
            found[f"train {name}"] = run_digits(Path("runs") / name)
        command("filter", "folder", *common, "--set", "filter.run=runs/flyp", "--set", "filter.sheet_rows=0")
        found["filter"] = sorted(rows(entry / "scores.jsonl"), key=lambda row: row["aug_id"])
        for name in ("flyp", "robust", "lp-ft"):
            command("evaluate", f"runs/{name}", "--wise-alphas", "0,0.5,1")
            found[f"evaluate {name}"] = json.loads(Path(f"runs/{name}/results.json").read_text(encoding="utf-8"))
        command("report", "runs/flyp", "runs/robust", "runs/lp-ft", "--baseline", "flyp", "--out", "report.json")
        found["report"] = without_paths(json.loads(Path("report.json").read_text(encoding="utf-8")))
        return found


def rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def edit_digits(entry: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Return an edit's provenance without what names this machine, and the mean of its pixels in nine fields."""
    with Image.open(entry / row["file_name"]) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    fields = [float(part.mean()) for band in np.array_split(pixels, 3) for part in np.array_split(band, 3, axis=1)]
    kept = ("file_name", "source_id", "label", "instruction", "seed", "steps", "guidance", "image_guidance")
    return {key: row[key] for key in kept if key in row} | {"pixels": fields}


def run_digits(run: Path) -> dict[str, Any]:
    """Return a run's losses, norms and decisions, step by step."""
    metrics = rows(run / "metrics.jsonl")
    found: dict[str, Any] = {
        "loss": [row["loss"] for row in metrics if "loss" in row],
        "grad_norm": [row["grad_norm"] for row in metrics if "loss" in row],
        "select": [[row["step"], row["accuracy"], row["macro_f1"], row["ece"]] for row in metrics if "accuracy" in row],
    }
    decided = rows(run / "augmented.jsonl") if (run / "augmented.jsonl").is_file() else []
    if decided:
        last = max(row["step"] for row in decided)
        steps = [[row for row in decided if row["step"] == step] for step in range(1, last + 1)]
        found["weights"] = [[row["weight"] for row in step] for step in steps]
        if "gain" in decided[0]:
            found["gains"] = [sum(row["gain"] for row in step) for step in steps]
            found["labels"] = [[row["learned_label"] for row in step] for step in steps]
    return found


def without_paths(value: Any) -> Any:
    """Leave out of a report what differs between machines: paths, times, versions."""
    if isinstance(value, dict):
        dropped = ("path", "run", "runs", "seconds", "environment", "provenance")
        return {key: without_paths(item) for key, item in value.items() if key not in dropped}
    return [without_paths(item) for item in value] if isinstance(value, list) else value


def differences(stored: Any, found: Any, tolerance: float, where: str = "") -> Iterator[str]:
    """Yield every place where two results differ by more than `tolerance`, relative to the larger of 1e-3 and the value."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for key in sorted(stored.keys() | found.keys()):
            if key not in stored or key not in found:
                yield f"{where}/{key}: only {'stored' if key in stored else 'found'}"
            else:
                yield from differences(stored[key], found[key], tolerance, f"{where}/{key}")
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for place, (old, new) in enumerate(zip(stored, found, strict=True)):
            yield from differences(old, new, tolerance, f"{where}[{place}]")
    elif isinstance(stored, float) and isinstance(found, (int, float)):
        if abs(stored - found) > tolerance * max(abs(stored), 1e-3):
            yield f"{where}: {stored!r} stored, {found!r} found"
    elif stored != found:
        yield f"{where}: {stored!r} stored, {found!r} found"


def rounded(value: Any) -> Any:
    """Round floats to eight significant digits: more than float32 holds."""
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else value
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def write(found: dict[str, Any]) -> None:
    """Store the digits, one file per command, one line per series."""
    for name, value in found.items():
        lines = json.dumps(rounded(value), indent=None, sort_keys=True).replace('], "', '],\n "').replace("}, {", "},\n {")
        (HERE / f"{name.replace(' ', '-')}.json").write_text(lines + "\n", encoding="utf-8")


def stored() -> dict[str, Any]:
    """Return the stored digits by name, as `run_all` returns them."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json"))}
    names = [
        "edits",
        "filter",
        "report",
        *(f"train {name}" for name in RUNS),
        *(f"evaluate {n}" for n in ("flyp", "robust", "lp-ft")),
    ]
    return {name: found[name.replace(" ", "-")] for name in names}


def make_before(home: Path) -> None:
    """Write before.tar.xz: a finished run, a linear one, one that was stopped half way, a cache and a recipe."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    with working_in(home):
        draw_images(Path("images"))
        Path("texts.toml").write_text(TEXTS, encoding="utf-8")
        for name in ("tiny_clip", "tiny_editor"):
            Path(name).symlink_to(ASSETS / name)
        config = {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
        }
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        with (
            torch.no_grad()
        ):  # few values in a short pattern: half of the weights of a CLIP this small, and nothing in the archive
            model.token_embedding.weight.copy_(torch.arange(49408 * 8).view(-1, 8) % 97 % 11 * 0.004 - 0.02)
        preprocess = {
            "size": 16,
            "mode": "RGB",
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }
        Path("clip").mkdir()
        Path("clip/open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}), encoding="utf-8"
        )
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, "clip/open_clip_model.safetensors")
        common = [*options("clip"), "--set", "train.freeze_token_embedding=true", "--set", "train.keep_checkpoints=1"]
        command("generate", "folder", *common, "--limit", "3")
        Path("mine.toml").write_text('[data]\nname = "folder"\nroot = "images"\ntrain_domains = ["day"]\n', encoding="utf-8")
        saflex = [part for change in SAFLEX for part in ("--set", change)]
        command("train", "folder", *common, *saflex, "--set", "recipe=robust", "--run-dir", "runs/robust")
        command("evaluate", "runs/robust", "--wise-alphas", "0,0.5,1")
        linear = [
            "--set",
            "train.method=lp-ft",
            "--set",
            "train.probe_steps=4",
            "--set",
            "train.steps=4",
            "--set",
            "recipe=lp-ft",
        ]
        command("train", "folder", *common, *linear, "--run-dir", "runs/lp-ft")
        command("evaluate", "runs/lp-ft", "--wise-alphas", "0,0.5,1")
        stop_after(
            10, lambda: command("train", "folder", *common, *saflex, "--set", "recipe=robust", "--run-dir", "runs/stopped")
        )
        with tarfile.open(BEFORE, "w:xz") as archive:
            for path in sorted(Path(".").rglob("*")):
                unneeded = (
                    path.name == ".lock"
                    or "sheets" in path.parts
                    or ("checkpoints" in path.parts and "stopped" not in path.parts)
                )
                if path.is_file() and not unneeded and path.parts[0] not in ("tiny_clip", "tiny_editor"):
                    archive.add(path)


def stop_after(steps: int, train: Any) -> None:
    """Call `train` and stop it as Ctrl-C does, once its log holds that many steps."""
    import signal
    import threading
    import time

    log = Path("runs/stopped/metrics.jsonl")

    def watch() -> None:
        while not log.is_file() or sum("loss" in row for row in rows(log)) < steps:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    try:
        train()
    except (AssertionError, KeyboardInterrupt):
        return
    raise SystemExit("the run ended before it was stopped: give it more steps")


def main() -> None:
    """Write the digits, or print how they differ from the stored ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--before", action="store_true")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        if arguments.before:
            make_before(Path(home))
            return
        found = run_all(Path(home))
    if arguments.write:
        write(found)
        return
    problems = list(differences(rounded(stored()), rounded(json.loads(json.dumps(found))), 0.0))
    print("\n".join(problems[:50]) or "every digit is as stored")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
