"""Measure CPU seconds and peak memory of the commands on a table of a million rows and 1.2 million cached edits.

    python scripts/benchmarks/scale.py [--rows 1000000] [--only train] [--folder DIR]

The data are made first, in DIR (kept, and used again) or in a temporary folder: a table with three fifths of its rows in
`train`, two edits of each of these, and iWildCam's metadata. Their images are hard links to a few files. Every command is a
process of its own in one thread; its figures are those of the operating system, with the start of Python and torch (`start`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from interleaved import hardware
from PIL import Image

from flyp_saflex import recipe
from flyp_saflex.config import Config
from flyp_saflex.editing.plan import stated_settings, wordings_for
from flyp_saflex.editing.settings import resolve
from flyp_saflex.prompting.edit_prompts import load_edit_prompts
from flyp_saflex.storage.augment_cache import DONE, AugmentCache
from flyp_saflex.storage.augment_cache_files import state_settings

ROOT = Path(__file__).resolve().parents[2]
ROWS, IWILDCAM_ROWS, LINKS = 1_000_000, 203_029, 30_000
CLASSES, TEMPLATES, BOOTSTRAP_IMAGES = 1_000, 80, 100_000
TEXTS = ("put the {} in the snow", "put the {} in the fog")
GOALS = {
    "start": "",
    "train": "15 s, 1.5 GB",
    "train again": "15 s, 1.5 GB",
    "generate": "12 s, 1.2 GB",
    "iwildcam": "5 s",
    "zero-shot": "1 head for 3 evaluations",
    "bootstrap": "3 s, 0.3 GB",
}
"""Row of the table -> goal at full size."""
HEADS = """
import sys
from pathlib import Path
from flyp_saflex.config import Config, ModelConfig, TrainConfig
from flyp_saflex.records import Dataset
from flyp_saflex.tasks import clip_task
from flyp_saflex.tasks.task import TaskInputs
calls, real = [], clip_task.zero_shot_head
clip_task.zero_shot_head = lambda *args: (calls.append(1), real(*args))[1]
names = tuple(f"thing number {k}" for k in range(int(sys.argv[2])))
templates = tuple(f"a photo of a {{}}, number {m}" for m in range(int(sys.argv[3])))
config = Config(model=ModelConfig(name=f"local-dir:{sys.argv[1]}", pretrained=""), train=TrainConfig(freeze_text=True))
data = Dataset(name="a", root=Path(), class_names=names, splits={}, templates=templates)
task = clip_task.ClipTask.build(TaskInputs(config=config, dataset=data))
for _ in range(3):
    task.after_step()
    task.predictor()
print(f"{len(calls)} head(s) for 3 evaluations of a frozen text tower", end="")
"""
INTERVALS = """
import resource, sys, time
import numpy as np
from flyp_saflex.evaluation.metrics import bootstrap_intervals
used, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
rng = np.random.default_rng(0)
n, k = int(sys.argv[1]), int(sys.argv[2])
labels = rng.integers(0, k, n)
guesses = np.where(rng.random(n) < float(sys.argv[3]), labels, rng.integers(0, k, n))
bootstrap_intervals(labels, guesses)
more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) / 2**20
print(f"of that beyond the imports {time.process_time() - started:.1f} s, {more:.2f} GB", end="")
"""


def link_images(folder: Path, names: Iterable[str]) -> None:
    """Put a picture under every name, without a file of its own for each."""
    source, made = Path(), set()
    for number, name in enumerate(names):
        path = folder / name
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        if number % LINKS == 0:
            source = folder / f".picture{number // LINKS}.png"
            Image.new("RGB", (8, 8), (number % 251, 0, 0)).save(source)
        os.link(source, path)


def make_table(folder: Path, rows: int) -> None:
    """Make `rows` labelled images, their table, and a finished cache entry with two edits of every training image."""
    splits = ("train", "train", "train", "val", "test")
    ids = [f"class{row % 100:02d}/{row // 10_000:03d}/image-{row:08d}.png" for row in range(rows)]
    link_images(folder / "images", ids)
    with open(folder / "table.csv", "w", encoding="utf-8") as table:
        table.write("path,label,split,camera\n")
        table.writelines(
            f"{name},class {n % 100:02d},{splits[n // 100 % 5]},camera {n // 7 % 300}\n" for n, name in enumerate(ids)
        )
    (folder / "edits.toml").write_text(
        "\n".join(f'[[edits]]\ndomain = "{text.split()[-1]}"\ninstruction = "{text}"\nprompt = "{text}"' for text in TEXTS),
        encoding="utf-8",
    )
    config = _config(folder)
    prompts = load_edit_prompts(config.editor.prompts, config.data.name)
    entry = folder / "cache" / "table" / "all"
    stated = stated_settings(config, resolve(config.editor), wordings_for(prompts, config.editor.kind))
    state_settings(entry, stated | {"identity": {"model": "made-up", "revision": "1"}}, write=True)
    names = []
    with open(entry / "metadata.jsonl", "w", encoding="utf-8") as manifest:
        for n, name in enumerate(ids):
            if splits[n // 100 % 5] != "train":
                continue
            for text in TEXTS:
                instruction = text.replace("{}", f"class {n % 100:02d}")
                file_name = AugmentCache.file_name(name, instruction, 0)
                names.append(file_name)
                row = {"file_name": file_name, "aug_id": file_name, "dataset": "table", "source_id": name, "label": n % 100}
                row |= {"instruction": instruction, "domain": text.split()[-1], "k": 0, "kind": "instruct-pix2pix"}
                row |= {"model": "made-up", "revision": "1", "steps": 100, "guidance": 7.5, "image_guidance": 1.5, "seed": n}
                row |= {"scheduler": "euler-ancestral", "size": [8, 8], "sha256": f"{n:064x}"}
                manifest.write(json.dumps(row) + "\n")
    link_images(entry, sorted(names))
    (entry / DONE).write_text(f"{len(names)} edits\n", encoding="utf-8")


def make_iwildcam(folder: Path, rows: int) -> None:
    """Make metadata.csv as WILDS has it, with 182 classes, 323 locations and an image under every name."""
    rng = np.random.default_rng(0)
    names = [f"{row:08x}-21bc-11ea-a13a-137349068a90.jpg" for row in range(rows)]
    home = folder / "iwildcam_v2.0"
    (home / "train").mkdir(parents=True)
    (home / "RELEASE_v2.0.txt").touch()
    splits = np.array(["train", "id_val", "id_test", "val", "test"])[np.searchsorted([0.64, 0.68, 0.72, 0.79], rng.random(rows))]
    splits[:182], locations = "train", rng.integers(0, 323, rows)
    locations[:323] = np.arange(323)
    classes = np.minimum(rng.geometric(0.05, rows) - 1, 181)
    classes[:182] = np.arange(182)
    with open(home / "metadata.csv", "w", encoding="utf-8") as table:
        table.write(",split,location_remapped,location,sequence_remapped,seq_id,y,category_id,datetime,filename,image_id\n")
        for row, name in enumerate(names):
            place, y = locations[row], classes[row]
            table.write(
                f"{row},{splits[row]},{place},{place + 1},{row},s{row},{y},{y + 5},2013-06-01 15:40:00.000,{name},{name[:-4]}\n"
            )
    link_images(home / "train", names)


def _options(folder: Path) -> list[str]:
    clip = ROOT / "flyp_saflex" / "assets" / "tiny_clip"
    return [
        "data.name=table",
        f"data.root={folder / 'images'}",
        f"data.table={folder / 'table.csv'}",
        "data.split_column=split",
        "data.domain_column=camera",
        f"cache.root={folder / 'cache'}",
        "cache.key=all",
        f"model.name=local-dir:{clip}",
        "model.pretrained=",
        "editor.kind=instruct-pix2pix",
        "editor.model=made-up",
        f"editor.prompts={folder / 'edits.toml'}",
        'augment.upstream=["cache"]',
        "train.steps=1",
        "train.select_split=",
        "saflex.preset=robust",
        "saflex.validation_split=val",
    ]


def _config(folder: Path) -> Config:
    return recipe.load("folder", _options(folder))


def measured(command: list[str], folder: Path) -> tuple[float, float, str]:
    """Run a command; return its CPU seconds, its peak memory in GB and its last line."""
    output = folder / "output.txt"
    with open(output, "wb") as file:
        process = os.posix_spawn(
            sys.executable,
            [sys.executable, *command],
            os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), fd) for fd in (1, 2)],
        )
        _, status, usage = os.wait4(process, 0)
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(lines[-20:]))
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, lines[-1] if lines else ""


def main() -> None:
    """Make the data, measure every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of the table; the other sizes go with it (default: {ROWS})")
    parser.add_argument("--folder", type=Path, help="where the data are made and kept (default: a temporary folder)")
    parser.add_argument("--only", choices=tuple(GOALS), action="append", help="measure this row (repeatable)")
    options = parser.parse_args()
    chosen, share = options.only or list(GOALS), options.rows / ROWS
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as name:
        folder = Path(name).absolute() / f"rows-{options.rows}"
        _ensure(folder / "table", lambda home: make_table(home, options.rows))
        _ensure(folder / "iwildcam", lambda home: make_iwildcam(home, max(1_000, round(IWILDCAM_ROWS * share))))
        commands = _commands(folder, share)
        print(f"{hardware()}; {options.rows} rows\n")
        print("| what | CPU seconds | peak memory, GB | goal | last line |\n|---|--:|--:|--:|---|")
        for row in chosen:
            if row == "train":
                (folder / "table" / "cache" / "table" / "all" / ".index.arrow").unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as run:
                command = [part.replace("RUN", f"{run}/run") for part in commands[row]]
                seconds, memory, line = measured(command, folder)
            goal = GOALS[row] if options.rows == ROWS else ""
            print(f"| {row} | {seconds:.1f} | {memory:.2f} | {goal} | {line[-90:]} |", flush=True)


def _commands(folder: Path, share: float) -> dict[str, list[str]]:
    settings = [part for option in _options(folder / "table") for part in ("--set", option)]
    clip = ROOT / "flyp_saflex" / "assets" / "tiny_clip"
    module = ["-m", "flyp_saflex"]
    train = [*module, "train", "folder", *settings, "--run-dir", "RUN"]
    wild = [
        f"data.root={folder / 'iwildcam'}",
        f"model.name=local-dir:{clip}",
        "model.pretrained=",
        "augment.upstream=[]",
        "train.precision=no",
    ]
    classes, images = max(10, round(CLASSES * share)), max(1_000, round(BOOTSTRAP_IMAGES * share))
    return {
        "start": ["-c", "import flyp_saflex.training.train"],
        "train": train,
        "train again": train,
        "generate": [*module, "generate", "folder", *settings],
        "iwildcam": [*module, "train", "iwildcam", "--dry-run", *(part for option in wild for part in ("--set", option))],
        "zero-shot": ["-c", HEADS, str(clip), str(classes), str(TEMPLATES)],
        "bootstrap": ["-c", INTERVALS, str(images), str(classes), "0.5"],
    }


def _ensure(home: Path, make: Callable[[Path], None]) -> None:
    """Make data unless an earlier call made them whole."""
    if not (home / "made").is_file():
        home.mkdir(parents=True)
        make(home)
        (home / "made").touch()


if __name__ == "__main__":
    main()
