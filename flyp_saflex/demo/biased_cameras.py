"""Biased cameras: a drawn world whose places tell the species in training, and the perfect edits that break this bias.

Training sees every species at its own place only, so a model learns the place; the cameras of `val` and `test` stand elsewhere.
An edit draws the same scene at another place. Edits go to all ten places, those of `val` and `test` among them, by cameras of
their own: as one who knows where a model will be used would ask an editor for them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from flyp_saflex.demo.animals import SPECIES
from flyp_saflex.demo.corruption import KnownEdit, draw_kind, write_entry
from flyp_saflex.demo.places import PLACES
from flyp_saflex.demo.scene import Scene, at, render
from flyp_saflex.demo.world import CLASSES, EMPTY, FOLDER, RELEASE, read_scenes, release_text, write_world
from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.training.sampling import derived_seed

NUM_IMAGES = 2400
SIZE_PX = 64
EDITS_PER_IMAGE = 2
CAMERAS = range(100, 200)
"""Numbers of the edits' cameras; the world has none of them."""
PHRASES = {
    "savanna": "in the savanna",
    "forest": "in the forest",
    "desert": "in the desert",
    "lake": "near a lake",
    "rocks": "in the rocks",
    "meadow": "in the meadow",
    "dusk": "in the dusk",
    "autumn": "in the autumn forest",
    "snow": "in the snow",
    "infrared night": "in the infrared night",
}
"""Ends of the instructions by place."""
SWAPPED, LOST = "swapped", "lost"


def biased_world(folder: Path, *, seed: int, num_images: int = NUM_IMAGES) -> Path:
    """Write the world unless it is there; return its dataset's folder, `folder/iwildcam_v2.0`.

    Raises:
        DataError: the folder holds another world, or `num_images` is too small.
    """
    root = folder / FOLDER
    if not (root / RELEASE).is_file():
        return write_world(folder, num_images=num_images, seed=seed, size_px=SIZE_PX, at_home=1.0)
    found = (root / RELEASE).read_text(encoding="utf-8")
    wanted = release_text(num_images=num_images, seed=seed, size_px=SIZE_PX, at_home=1.0)
    if found != wanted:
        raise DataError(f"{root} holds another world ({found.strip()}), expected: {wanted.strip()}; give a new folder")
    return root


def write_rendered_edits(dataset: Dataset, root: Path, key: str, *, seed: int, rate: float) -> Path:
    """Write two rendered edits of every training picture, each to another place, as the cache entry `key`.

    With probability `rate` an edit is corrupted and keeps its label: half of these show another species (`swapped`), half
    nobody (`lost`). For a picture without animals nobody is right, so that all its corrupted edits show a species.

    Args:
        dataset: a world that was drawn here, as its reader returns it.
        root: `cache.root`; see `corruption` for what is where.
        key: `cache.key`.
        seed: of places, cameras and corruption.
        rate: 0..1; what is corrupted at a rate is corrupted in the same way at every higher one.

    Returns:
        The entry's folder.

    Raises:
        DataError: the dataset is no drawn world, or the entry holds other edits or cannot be written.
    """
    scenes = read_scenes(dataset.root.parent)  # its images lie in train/
    edits: list[KnownEdit] = []
    for sample in dataset.train.samples:
        scene = scenes[sample.sample_id]
        places = np.random.default_rng(derived_seed(seed, sample.sample_id)).permutation(len(PLACES))[:EDITS_PER_IMAGE]
        edits += [_edit(sample.sample_id, scene, tuple(PLACES)[place], seed, rate) for place in places]
    return write_entry(root, dataset.name, key, edits, made_by="rendered", seed=seed)


def _edit(source_id: str, scene: Scene, place: str, seed: int, rate: float) -> KnownEdit:
    """Return the edit of one scene to one place, perfect or corrupted."""
    generator = np.random.default_rng(derived_seed(seed, source_id, place))
    species, name = scene.species, scene.species or EMPTY
    instruction = f"put the {name} {PHRASES[place]}"
    camera = int(generator.choice(CAMERAS))
    other = str(generator.choice([kind for kind in SPECIES if kind != species]))
    kind = draw_kind(rate, (SWAPPED, LOST if species else SWAPPED), generator)
    shown = {SWAPPED: other, LOST: None}.get(kind, species)
    edited = dataclasses.replace(at(scene, place), camera=camera, species=shown)
    return KnownEdit(
        file_name=AugmentCache.file_name(source_id, instruction),
        source_id=source_id,
        label=CLASSES.index(name),
        instruction=instruction,
        domain=place,
        kind=kind,
        true_label=CLASSES.index(shown or EMPTY),
        draw=lambda: render(edited, SIZE_PX),
    )
