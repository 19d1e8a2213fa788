"""Synthetic camera-trap dataset, written as a WILDS iWildCam v2.0 folder.

Each camera is at one place. In training, `id_val` and `id_test`, which share their cameras, most images of a species are from
its home place: place and class are correlated. The cameras of `val` and `test` are at new places, without that correlation.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from flyp_saflex.demo.animals import SPECIES
from flyp_saflex.demo.scene import Scene, render
from flyp_saflex.errors import DataError

EMPTY = "landscape without animals"
CLASSES = (EMPTY, *SPECIES)
"""English class names by class index; each reads well in `a photo of a {}.`"""
TEMPLATES = ("a photo of a {}.", "a camera trap photo of a {}.", "a photo of a {} in the wild.")
TRAIN_PLACES = ("savanna", "forest", "desert", "lake", "rocks", "meadow")
VAL_PLACES = ("snow", "infrared night")
TEST_PLACES = ("dusk", "autumn")
HOME = dict(
    zip(SPECIES, ("forest", "savanna", "meadow", "forest", "desert", "meadow", "savanna", "rocks", "lake", "lake"), strict=True)
)
"""Home place of each species in training; species that share a place differ in appearance only."""
AT_HOME = 0.9
"""Fraction of the training bursts of a species at its home place; the others are at a random training place."""
EMPTY_PART = 0.2
"""Fraction of the bursts without an animal."""
RARER = 0.76
"""Ratio of the frequencies of consecutive species."""
SPLITS = {"train": 1 / 3, "id_val": 1 / 12, "id_test": 1 / 8, "val": 1 / 8, "test": 1 / 3}
"""Fraction of the images per split. The test split is as large as the training split: with fewer test images a difference of a
few points would be noise."""
ANIMAL_SIZE = 0.45
"""Mean of the larger of height and width of an animal, as a fraction of the image."""
CAMERAS_PER_PLACE = 4
FOLDER, RELEASE = "iwildcam_v2.0", "RELEASE_v2.0.txt"
COLUMNS = (
    "split", "location_remapped", "location", "sequence_remapped", "seq_id", "seq_num_frames", "frame_num", "filename",
    "image_id", "datetime", "category_id", "y",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """Image of a camera: scene, split, number of the burst, and position in the burst."""

    scene: Scene
    split: str
    burst: int
    frame: int
    num_frames: int

    @property
    def label(self) -> int:
        """Class index of the image."""
        return CLASSES.index(self.scene.species or EMPTY)


def plan(num_images: int, seed: int, *, animal_size: float = ANIMAL_SIZE, at_home: float = AT_HOME) -> list[Shot]:
    """Plan all images of a world without rendering them.

    Every class has at least one burst in every split.

    Args:
        num_images: number of images in all splits together, at least 400.
        seed: seed of the plan.
        animal_size: mean size of an animal, as a fraction of the image.
        at_home: fraction of the bursts of a species that training cameras take at its home place, 0..1; 1: nowhere else.

    Raises:
        DataError: `num_images` is below 400.
    """
    if num_images < 400:
        raise DataError(
            f"a world of {num_images} images is too small for {len(CLASSES)} classes in five splits; draw 400 or more"
        )
    rng = np.random.default_rng(seed)
    sizes = {name: round(part * num_images) for name, part in SPLITS.items()}
    sizes["train"] += num_images - sum(sizes.values())
    shots: list[Shot] = []
    num_bursts = 0
    for split, size in sizes.items():
        left = size
        most = 4 if size >= 4 * len(CLASSES) else 2  # so that one burst of every class fits
        for label, places in _visits(split, at_home, rng):
            frames = min(left, int(rng.integers(1, most + 1)))
            place, camera = places[int(rng.integers(len(places)))]
            scenes = _burst(CLASSES[label] if label else None, place, camera, frames, animal_size, rng)
            shots += [
                Shot(scene=scene, split=split, burst=num_bursts, frame=frame, num_frames=frames)
                for frame, scene in enumerate(scenes)
            ]
            num_bursts += 1
            left -= frames
            if not left:
                break
    return shots


def _cameras() -> dict[str, tuple[int, ...]]:
    places = (*TRAIN_PLACES, *VAL_PLACES, *TEST_PLACES)
    return {place: tuple(range(n * CAMERAS_PER_PLACE, (n + 1) * CAMERAS_PER_PLACE)) for n, place in enumerate(places)}


def _visits(split: str, at_home: float, rng: np.random.Generator) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """Yield class and candidate (place, camera) pairs of bursts, endlessly; each class once at first."""
    cameras = _cameras()
    frequency = RARER ** np.arange(len(SPECIES))
    frequency = np.concatenate([[EMPTY_PART], (1 - EMPTY_PART) * frequency / frequency.sum()])
    places = {"val": VAL_PLACES, "test": TEST_PLACES}.get(split, TRAIN_PLACES)
    first = [int(label) for label in rng.permutation(len(CLASSES))]
    while True:
        label = first.pop() if first else int(rng.choice(len(CLASSES), p=frequency))
        home = HOME.get(CLASSES[label])
        chosen = home if home is not None and home in places and rng.random() < at_home else str(rng.choice(places))
        yield label, [(chosen, camera) for camera in cameras[chosen]]


def _burst(
    species: str | None, place: str, camera: int, num_frames: int, animal_size: float, rng: np.random.Generator
) -> list[Scene]:
    """Return the scenes of a burst: one walking animal, or an empty place."""
    facing = int(rng.choice((-1, 1)))
    earliest, latest = {"infrared night": (20, 29), "dusk": (18, 20)}.get(place, (6, 18))
    start = datetime(2014, 1, 1) + timedelta(
        days=int(rng.integers(364)), seconds=int(rng.integers(3600 * earliest, 3600 * latest))
    )
    scene = Scene(
        species=species,
        place=place,
        camera=camera,
        x=0.5 - facing * (num_frames - 1) * 0.04 + float(rng.normal(0, 0.1)),
        y=float(rng.uniform(0.7, 0.87)),
        size=animal_size * float(np.clip(rng.normal(1, 0.226), 0.55, 1.53)),
        facing=facing,
        phase=float(rng.random()),
        head=float(rng.choice((0.0, 0.0, rng.random(), 1.0))),
        tone=float(rng.uniform(-1, 1)),
        occlusion=float(rng.choice((0.0, 0.0, rng.uniform(0.2, 0.9)))),
        blur_px=float(rng.choice((0.0, 0.0, rng.uniform(0.3, 1.0)))),
        exposure=float(np.exp(rng.normal(0, 0.13))),
        time=str(start),
        individual=int(rng.integers(2**31)),
    )
    step = float(rng.uniform(0.0, 0.1))
    return [
        dataclasses.replace(
            scene,
            x=scene.x + facing * step * frame,
            phase=(scene.phase + 2.5 * step * frame) % 1,
            time=str(start + timedelta(seconds=frame)),
            seed=int(rng.integers(2**31)),
        )
        for frame in range(num_frames)
    ]


def write_world(folder: Path, *, num_images: int = 2000, seed: int = 0, size_px: int = 64, at_home: float = AT_HOME) -> Path:
    """Render a world and write it in the layout of WILDS iWildCam v2.0.

    Writes `folder/iwildcam_v2.0/` (`metadata.csv`, `categories.csv`, `RELEASE_v2.0.txt`, `train/*.jpg`) and, in addition to
    the layout of WILDS, `scenes.jsonl` with one scene per image and `prompts/` for `data.prompts`. Use it with
    `data.name = "iwildcam"`, `data.root = FOLDER`, `data.prompts = FOLDER/iwildcam_v2.0/prompts`.

    Args:
        folder: output folder, created if missing; an existing world with the same arguments is overwritten.
        num_images: number of images in all five splits together, at least 400.
        seed: seed of the world; equal arguments give equal files.
        size_px: side of an image in pixels.
        at_home: fraction of the bursts of a species that training cameras take at its home place, 0..1; 1: the place tells
            the species, except in `val` and `test`.

    Returns:
        The folder `iwildcam_v2.0`. `RELEASE_v2.0.txt`, which `wilds` needs to open it, is written last.

    Raises:
        DataError: `num_images` is below 400.
    """
    shots = plan(num_images, seed, at_home=at_home)
    root = folder / FOLDER
    (root / "train").mkdir(parents=True, exist_ok=True)
    (root / "prompts").mkdir(exist_ok=True)
    location_of = {camera: n for n, camera in enumerate(sorted({shot.scene.camera for shot in shots}))}
    with (
        open(root / "metadata.csv", "w", newline="", encoding="utf-8") as table,
        open(root / "scenes.jsonl", "w", encoding="utf-8") as scenes,
    ):
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        for number, shot in enumerate(shots):
            image_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}/{number}"))
            render(shot.scene, size_px).save(root / "train" / f"{image_id}.jpg", quality=90)
            writer.writerow(_row(shot, image_id, seed, location_of[shot.scene.camera]))
            scenes.write(json.dumps({"filename": f"{image_id}.jpg"} | dataclasses.asdict(shot.scene)) + "\n")
    with open(root / "categories.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("y", "category_id", "name"))
        rows.writerows((y, y, "empty" if y == 0 else name) for y, name in enumerate(CLASSES))
    names = ("empty\t" + EMPTY, *SPECIES)
    (root / "prompts" / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (root / "prompts" / "templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
    release = release_text(num_images=num_images, seed=seed, size_px=size_px, at_home=at_home)
    (root / RELEASE).write_text(release, encoding="utf-8")
    return root


def release_text(*, num_images: int, seed: int, size_px: int, at_home: float) -> str:
    """Return the text of a world's release file: the arguments of `write_world`."""
    bias = "" if at_home == AT_HOME else f", at home {at_home:g}"
    return f"drawn: {num_images} images, seed {seed}, {size_px} px{bias}\n"


def _row(shot: Shot, image_id: str, seed: int, location: int) -> Mapping[str, object]:
    return {
        "split": shot.split,
        "location_remapped": location,
        "location": shot.scene.camera,
        "sequence_remapped": shot.burst,
        "seq_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}/burst {shot.burst}")),
        "seq_num_frames": shot.num_frames,
        "frame_num": shot.frame,
        "filename": f"{image_id}.jpg",
        "image_id": image_id,
        "datetime": f"{shot.scene.time}.000000",
        "category_id": shot.label,
        "y": shot.label,
    }


def read_scenes(root: Path) -> dict[str, Scene]:
    """Read the scene of every image of a world, by file name.

    Args:
        root: folder returned by `write_world`.

    Raises:
        DataError: the folder has no `scenes.jsonl`.
    """
    path = root / "scenes.jsonl"
    if not path.is_file():
        raise DataError(f"{root} has no scenes.jsonl: it is not a synthetic world; give the folder that write_world returned")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row.pop("filename"): Scene(**row) for row in rows}
