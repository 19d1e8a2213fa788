"""Stylising edits of PACS photographs, some of them corrupted, as augment caches (one per seed and corruption rate).

Every training photograph gets four edits: as a painting, a cartoon and a sketch, and in other colours, the instructions that one
would give an editor to be ready for pictures that are no photographs. A corrupted edit is either *swapped* (an edit of a
photograph of another class, under this one's label) or *destroyed* (its patches shuffled). Which edit is corrupted at which
rate is nested: what is corrupted at 0.25 is corrupted at 0.5 too, so rates can be compared pairwise. The truth is written
beside the caches, where training does not look.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from flyp_saflex import AugmentCache
from flyp_saflex.images.decode import read_image
from flyp_saflex.records import Dataset, Sample
from flyp_saflex.training.sampling import derived_seed

PATCHES = 4  # per side, of a destroyed edit


def painting(image: Image.Image) -> Image.Image:
    """Flat patches with soft edges, as with a broad brush."""
    return image.filter(ImageFilter.ModeFilter(7)).filter(ImageFilter.SMOOTH)


def cartoon(image: Image.Image) -> Image.Image:
    """Few, strong colours and dark outlines."""
    flat = image.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.ModeFilter(5))
    flat = ImageOps.posterize(ImageEnhance.Color(flat).enhance(1.8), 3)
    lines = ImageOps.invert(outlines(image)).point(lambda value: 255 if value > 90 else 0).filter(ImageFilter.GaussianBlur(0.5))
    return Image.composite(Image.new("RGB", image.size, "black"), flat, lines)


def sketch(image: Image.Image) -> Image.Image:
    """Dark outlines on white."""
    return outlines(image).convert("RGB")


def recolour(image: Image.Image) -> Image.Image:
    """Other hues, stronger: every colour turned by 120 degrees."""
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.merge("HSV", (hue.point(lambda degree: (degree + 85) % 256), saturation, value)).convert("RGB")
    return ImageEnhance.Color(turned).enhance(1.3)


def outlines(image: Image.Image) -> Image.Image:
    """Edges of a slightly blurred image, dark on white, one channel."""
    edges = image.convert("L").filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES)
    edges = ImageOps.expand(ImageOps.crop(edges, 1), 1)  # the filter draws a frame
    return ImageOps.autocontrast(ImageOps.invert(edges), cutoff=2)


OPERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    operation.__name__: operation for operation in (painting, cartoon, sketch, recolour)
}


def shuffle_patches(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Exchange the 4 x 4 patches of an image at random."""
    width, height = image.size[0] // PATCHES, image.size[1] // PATCHES
    boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(PATCHES) for x in range(PATCHES)]
    result = image.crop((0, 0, width * PATCHES, height * PATCHES))
    for target, source in zip(boxes, generator.permutation(len(boxes)), strict=True):
        result.paste(image.crop(boxes[source]), target[:2])
    return result


def write_cache(dataset: Dataset, root: Path, key: str, *, seed: int, rate: float) -> Path:
    """Write the cache entry `key` of a seed and rate, unless it is there; return its folder."""
    folder = root / dataset.name / key
    truth_file = root / "truth" / f"{key}.json"
    if (folder / "DONE").is_file() and truth_file.is_file():
        return folder
    cache = AugmentCache.create(folder, dataset.name)
    photos = sorted(dataset.train.samples, key=lambda sample: sample.sample_id)
    truth: dict[str, str] = {}
    for photo in photos:
        for name in OPERATIONS:
            aug_id = f"images/{photo.label}/{Path(photo.sample_id).stem}-{name}.jpg"
            image, truth[aug_id] = edit(photo, photos, name, rate, np.random.default_rng(derived_seed(seed, aug_id)))
            if aug_id not in cache:
                row = {"source_id": photo.sample_id, "label": photo.label, "instruction": name, "file_name": aug_id, "seed": seed}
                cache.append(image, row)
    cache.finish()
    cache.write_scores(({"aug_id": aug_id, "keep": kind == "clean"} for aug_id, kind in truth.items()), "oracle.jsonl")
    truth_file.parent.mkdir(parents=True, exist_ok=True)
    truth_file.write_text(json.dumps(truth), encoding="utf-8")
    return folder


def edit(photo: Sample, photos: list[Sample], name: str, rate: float, generator: np.random.Generator) -> tuple[Image.Image, str]:
    """Return an edit and what became of it: `clean`, `swapped` or `destroyed`."""
    corrupted, swapped = generator.random() < rate, generator.random() < 0.5
    others = [other for other in photos if other.label != photo.label]
    other = others[generator.integers(len(others))]
    if not corrupted:
        return OPERATIONS[name](read_image(photo.path)), "clean"
    if swapped:
        return OPERATIONS[name](read_image(other.path)), "swapped"
    return shuffle_patches(OPERATIONS[name](read_image(photo.path)), generator), "destroyed"
