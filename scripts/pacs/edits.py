"""Stylising edits of PACS photographs, some of them corrupted, as augment caches (one per seed and corruption rate).

Every training photograph gets four edits by different image operations. A corrupted edit is either *swapped* (an edit of a
photograph of another class, under this one's label) or *destroyed* (its patches shuffled). Which edit is corrupted at which
rate is nested: what is corrupted at 0.25 is corrupted at 0.5 too, so rates can be compared pairwise. The truth is written
beside the caches, where training does not look.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from flyp_saflex import AugmentCache
from flyp_saflex.data.batches import derived_seed
from flyp_saflex.data.images import read_image
from flyp_saflex.records import Dataset, Sample

EDITS_PER_PHOTO = 4
PATCHES = 4  # per side, of a destroyed edit


def posterise(image: Image.Image) -> Image.Image:
    """Two bits per channel."""
    return ImageOps.posterize(image, 2)


def sketch(image: Image.Image) -> Image.Image:
    """Dark outlines on white."""
    edges = image.convert("L").filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES)
    return ImageOps.autocontrast(ImageOps.invert(edges), cutoff=2).convert("RGB")


def solarise(image: Image.Image) -> Image.Image:
    """Bright values inverted."""
    return ImageOps.solarize(image, 128)


def swap_colours(image: Image.Image) -> Image.Image:
    """Red, green and blue exchanged."""
    red, green, blue = image.split()
    return Image.merge("RGB", (blue, red, green))


def paint(image: Image.Image) -> Image.Image:
    """Flat areas, as with a broad brush."""
    return image.filter(ImageFilter.ModeFilter(7))


def emboss(image: Image.Image) -> Image.Image:
    """A grey relief."""
    return ImageOps.autocontrast(image.convert("L").filter(ImageFilter.EMBOSS), cutoff=1).convert("RGB")


def ink(image: Image.Image) -> Image.Image:
    """Black, white and two greys."""
    return ImageOps.posterize(ImageOps.autocontrast(ImageOps.grayscale(image), cutoff=5), 2).convert("RGB")


def pixelate(image: Image.Image) -> Image.Image:
    """Blocks of six pixels."""
    width, height = image.size
    small = image.resize((max(width // 6, 1), max(height // 6, 1)), Image.Resampling.BOX)
    return small.resize((width, height), Image.Resampling.NEAREST)


OPERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    operation.__name__: operation for operation in (posterise, sketch, solarise, swap_colours, paint, emboss, ink, pixelate)
}


def shuffle_patches(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Exchange the 4 x 4 patches of an image at random."""
    width, height = image.size[0] // PATCHES, image.size[1] // PATCHES
    boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(PATCHES) for x in range(PATCHES)]
    result = image.crop((0, 0, width * PATCHES, height * PATCHES))
    for target, source in zip(boxes, generator.permutation(len(boxes)), strict=True):
        result.paste(image.crop(boxes[source]), target[:2])
    return result


def write_cache(dataset: Dataset, root: Path, *, seed: int, rate: float) -> Path:
    """Write the cache entry of a seed and rate, unless it is there; return its folder."""
    key = f"seed{seed}-rate{rate:g}"
    folder = root / dataset.name / key
    truth_file = root / "truth" / f"{key}.json"
    if (folder / "DONE").is_file() and truth_file.is_file():
        return folder
    cache = AugmentCache.create(folder, dataset.name)
    photos = sorted(dataset.train.samples, key=lambda sample: sample.sample_id)
    truth: dict[str, str] = {}
    for photo in photos:
        generator = np.random.default_rng(derived_seed(seed, "edits", photo.sample_id))
        names = generator.permutation(list(OPERATIONS))[:EDITS_PER_PHOTO]
        for name in names:
            aug_id = f"images/{photo.label}/{Path(photo.sample_id).stem}-{name}.jpg"
            image, truth[aug_id] = edit(photo, photos, str(name), rate, np.random.default_rng(derived_seed(seed, aug_id)))
            if aug_id not in cache:
                row = {"source_id": photo.sample_id, "label": photo.label, "instruction": str(name), "file_name": aug_id, "seed": seed}
                cache.append(image, row)
    cache.finish()
    cache.write_scores(({"aug_id": aug_id, "keep": kind == "clean"} for aug_id, kind in truth.items()), "oracle.jsonl")
    truth_file.parent.mkdir(parents=True, exist_ok=True)
    truth_file.write_text(json.dumps(truth), encoding="utf-8")
    return folder


def edit(
    photo: Sample, photos: list[Sample], name: str, rate: float, generator: np.random.Generator
) -> tuple[Image.Image, str]:
    """Return an edit and what became of it: `clean`, `swapped` or `destroyed`."""
    corrupted, swapped = generator.random() < rate, generator.random() < 0.5
    others = [other for other in photos if other.label != photo.label]
    other = others[generator.integers(len(others))]
    if not corrupted:
        return OPERATIONS[name](read_image(photo.path)), "clean"
    if swapped:
        return OPERATIONS[name](read_image(other.path)), "swapped"
    return shuffle_patches(OPERATIONS[name](read_image(photo.path)), generator), "destroyed"
