"""Stylising edits of PACS photographs, some of them corrupted, as augment caches (one per seed and corruption rate).

Every training photograph gets four edits: as a painting, a cartoon and a sketch, and in other colours, the instructions that one
would give an editor to be ready for pictures that are no photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from photographs import edit_of
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from flyp_saflex.demo.corruption import write_entry
from flyp_saflex.records import Dataset


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


def write_style_edits(dataset: Dataset, root: Path, key: str, *, seed: int, rate: float) -> Path:
    """Write four edits of every training photograph as the cache entry `key`; return its folder.

    Args:
        dataset: photographs to train on.
        root: `cache.root`; see `flyp_saflex.demo.corruption` for what is where.
        key: `cache.key`.
        seed: of the corruption.
        rate: 0..1; what is corrupted at a rate is corrupted in the same way at every higher one.
    """
    photos = sorted(dataset.train.samples, key=lambda sample: sample.sample_id)
    edits = [
        edit_of(
            photo,
            photos,
            lambda image, _, operation=operation: operation(image),
            file_name=f"images/{photo.label}/{Path(photo.sample_id).stem}-{name}.jpg",
            instruction=name,
            domain=name,
            seed=seed,
            rate=rate,
        )
        for photo in photos
        for name, operation in OPERATIONS.items()
    ]
    return write_entry(root, dataset.name, key, edits, made_by="image operation", seed=seed)
