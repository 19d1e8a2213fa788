"""Distance of edits to their sources by perceptual hashes (imagehash): an edit that changed nothing teaches nothing.

    distance = bits that differ among 64 of structure (pHash) and 56 of colours (colorhash)

pHash alone sees neither a change of brightness nor one of colour. Re-encoded, rescaled or slightly blurred copies differ in a few
bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import read_image
from flyp_saflex.records import Edit, Sample

THREADS = 4
COLOUR_BITS = 4
"""Bits for each of the 14 shares of black, grey and hues."""


def hash_distance(one: Image.Image, other: Image.Image) -> int:
    """Return the number of bits, 0..120, by which two images differ.

    The second is brought to the size of the first.
    """
    import imagehash

    other = other if other.size == one.size else other.resize(one.size, Image.Resampling.LANCZOS)
    return int(imagehash.phash(one) - imagehash.phash(other)) + int(
        imagehash.colorhash(one, COLOUR_BITS) - imagehash.colorhash(other, COLOUR_BITS)
    )


def hash_distances(
    edits: Sequence[Edit], sources: Mapping[str, Sample], *, box_crop: bool, threads: int = THREADS
) -> NDArray[np.float64]:
    """Return distance_N of edits to their sources; NaN where one of the two cannot be read.

    Args:
        edits: edits, those of one source best one after the other, for then it is read once.
        sources: training images by `sample_id`.
        box_crop: sources are cropped to their boxes.
        threads: images are decoded by so many at once.
    """

    def of_source(numbers: Sequence[int]) -> list[float]:
        sample = sources[edits[numbers[0]].source_id]
        try:
            source = read_image(sample.image, box=sample.box if box_crop else None)
        except DataError:
            return [np.nan] * len(numbers)
        return [_distance(edits[number], source) for number in numbers]

    groups = [list(group) for _, group in groupby(range(len(edits)), key=lambda number: edits[number].source_id)]
    with ThreadPoolExecutor(threads) as pool:
        return np.array([distance for part in pool.map(of_source, groups) for distance in part], dtype=np.float64)


def _distance(edit: Edit, source: Image.Image) -> float:
    try:
        return float(hash_distance(read_image(edit.path), source))
    except DataError:
        return float("nan")
