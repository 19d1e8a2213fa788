"""Edits of photographs by image operations, some of them corrupted.

A corrupted edit is either *swapped* (an edit of a photograph of another class under this one's label) or *destroyed* (its patches
shuffled).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from flyp_saflex.demo.corruption import KnownEdit, draw_kind
from flyp_saflex.images.decode import read_image
from flyp_saflex.records import Sample
from flyp_saflex.training.sampling import derived_seed

SWAPPED, DESTROYED = "swapped", "destroyed"
PATCHES = 4
"""Patches per side of a destroyed edit."""
Operation = Callable[[Image.Image, np.random.Generator], Image.Image]


def edit_of(
    photo: Sample,
    photos: Sequence[Sample],
    operation: Operation,
    *,
    file_name: str,
    instruction: str,
    domain: str,
    seed: int,
    rate: float,
) -> KnownEdit:
    """Return one edit of a photograph, clean or corrupted.

    Args:
        photo: its source.
        photos: those that a swapped edit may be made from, in an order that is always the same.
        operation: makes the edit.
        file_name: below the entry; with `seed` it decides everything that is random.
        instruction: the text that a person would have asked an editor for it with.
        domain: the setting that it is put in.
        seed: of the entry.
        rate: probability of corruption, 0..1.
    """
    generator = np.random.default_rng(derived_seed(seed, file_name))
    kind = draw_kind(rate, (SWAPPED, DESTROYED), generator)
    others = [other for other in photos if other.label != photo.label]
    other = others[generator.integers(len(others))]
    source = other if kind == SWAPPED else photo

    def draw() -> Image.Image:
        edited = operation(read_image(source.path), generator)
        return shuffle_patches(edited, generator) if kind == DESTROYED else edited

    return KnownEdit(
        file_name=file_name,
        source_id=photo.sample_id,
        label=photo.label,
        instruction=instruction,
        domain=domain,
        kind=kind,
        true_label=None if kind == DESTROYED else source.label,
        draw=draw,
    )


def shuffle_patches(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Exchange the 4 x 4 patches of an image at random."""
    width, height = image.size[0] // PATCHES, image.size[1] // PATCHES
    boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(PATCHES) for x in range(PATCHES)]
    result = image.crop((0, 0, width * PATCHES, height * PATCHES))
    for target, source in zip(boxes, generator.permutation(len(boxes)), strict=True):
        result.paste(image.crop(boxes[source]), target[:2])
    return result
