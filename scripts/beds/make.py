"""Make a bed: data and edits, some corrupted, on which ways to use edits can be compared.

    python scripts/beds/make.py biased-cameras --out runs/beds/biased-cameras --seeds 0-4 --rates 0,0.25,0.5,0.75

Every bed has a recipe beside this file; its head says what to train. What is finished is left alone, so the same command goes
on after a stop, and further seeds and rates can be added. What is corrupted stands in OUT/edits/truth only, and in the
`oracle.jsonl` of every entry.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from conditions import write_condition_edits, write_test_domain
from number_lists import fractions, numbers
from styles import write_style_edits

from flyp_saflex import recipe, runtime
from flyp_saflex.assets import TINY_EDITOR
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.demo.biased_cameras import NUM_IMAGES, biased_world, write_rendered_edits
from flyp_saflex.editing.generate import generate
from flyp_saflex.errors import DataError, UserError
from flyp_saflex.records import Dataset

HERE = Path(__file__).resolve().parent
WriteEdits = Callable[..., Path]
"""Writes one entry: `write(dataset, root, key, seed=..., rate=...)`."""


def biased_cameras(options: argparse.Namespace) -> None:
    """Write the worlds and the rendered edits."""
    for seed in options.seeds:
        dataset = load_dataset(_in_world(options, seed).data, seed=seed)
        _every_rate(options, dataset, seed, write_rendered_edits)


def biased_cameras_editor(options: argparse.Namespace) -> None:
    """Write the worlds and the edits of the tiny InstructPix2Pix; how many of them are bad is not known."""
    for seed in options.seeds:
        say(generate(_in_world(options, seed, f"cache.key=seed{seed}-editor", f"editor.model={TINY_EDITOR}")))


def _in_world(options: argparse.Namespace, seed: int, *overrides: str) -> Config:
    """Draw the world of a seed unless it is there; return the bed's recipe for it."""
    folder = options.out / "worlds" / f"seed{seed}"
    root = biased_world(folder, seed=seed, num_images=options.num_images)
    places = [f"data.root={folder}", f"data.prompts={root / 'prompts'}", f"cache.root={options.out / 'edits'}", f"seed={seed}"]
    return recipe.load(str(HERE / "biased-cameras.toml"), [*places, *overrides])


def camera_trap_conditions(options: argparse.Namespace) -> None:
    """Write the test set, a link to the photographs beside it, and the edits."""
    root = options.out / "data"
    _link(_photographs(options), root / "photo")
    photographs = [f"data.root={root}", "data.test_domains=[]"]
    held_out = _photo_dataset("camera-trap-conditions", *photographs, "data.shots=0").splits["id_test"]
    print(f"{root / 'conditions'}: {write_test_domain(held_out.samples, root / 'conditions')} photographs", flush=True)
    for seed in options.seeds:
        dataset = _photo_dataset("camera-trap-conditions", *photographs, f"seed={seed}")
        _every_rate(options, dataset, seed, write_condition_edits)


def pacs(options: argparse.Namespace) -> None:
    """Write the edits; the data is used where it is."""
    root = _photographs(options).parent
    for seed in options.seeds:
        dataset = _photo_dataset("pacs", f"data.root={root}", "data.test_domains=[]", f"seed={seed}")
        _every_rate(options, dataset, seed, write_style_edits)


def _photo_dataset(bed: str, *overrides: str) -> Dataset:
    config = recipe.load(str(HERE / f"{bed}.toml"), overrides)
    return load_dataset(config.data, seed=config.seed)


def _photographs(options: argparse.Namespace) -> Path:
    """Return the folder of the photographs.

    Raises:
        DataError: none is given, or it is not there.
    """
    if options.data is None or not (options.data / "photo").is_dir():
        found = "not given" if options.data is None else f"{options.data}, which has no folder photo/"
        raise DataError(f"--data is {found}; expected a folder with photo/<class>/*.jpg, such as PACS")
    return options.data.absolute() / "photo"


def _link(target: Path, link: Path) -> None:
    """Make a link unless it is there.

    Raises:
        DataError: it leads elsewhere.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(target, target_is_directory=True)
    if link.resolve() != target.resolve():
        raise DataError(f"{link} leads to {link.resolve()}, not to {target}; give another --out, or the same --data as before")


def _every_rate(options: argparse.Namespace, dataset: Dataset, seed: int, write: WriteEdits) -> None:
    """Write the entries of one seed."""
    for rate in options.rates:
        say(write(dataset, options.out / "edits", f"seed{seed}-rate{rate:g}", seed=seed, rate=rate))


BEDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "biased-cameras": biased_cameras,
    "biased-cameras-editor": biased_cameras_editor,
    "camera-trap-conditions": camera_trap_conditions,
    "pacs": pacs,
}


def say(folder: Path) -> None:
    """Print an entry that is finished."""
    print(f"{folder}: {(folder / 'DONE').read_text(encoding='utf-8').strip()}", flush=True)


def main() -> int:
    """Make the bed that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("--out", type=Path, help="folder of the bed; runs/beds/BED if not given")
    parser.add_argument("--seeds", type=numbers, default=numbers("0-4"), help="such as 0-4,7")
    parser.add_argument("--rates", type=fractions, default=fractions("0,0.25,0.5,0.75"), help="parts of the edits to corrupt")
    parser.add_argument("--data", type=Path, help="the other beds: folder with photo/<class>/*.jpg; for pacs also the styles")
    parser.add_argument("--num-images", type=int, default=NUM_IMAGES, help="biased cameras: pictures of a world, 400 or more")
    options = parser.parse_args()
    options.out = options.out or Path("runs/beds") / options.bed.removesuffix("-editor")
    runtime.keep_freed_memory()
    try:
        BEDS[options.bed](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
