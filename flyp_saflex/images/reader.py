"""Image readers: from a file to the tensor that the model takes.

    exact    the whole image is decoded and goes through the model's own transform
    scaled   a JPEG is decoded smaller, but to at least 2.25 times what the model sees; the difference is at most 1/255 on
             average, PSNR >= 50 dB on photographs, 46 dB where they are sharp to the last pixel (tests/images/test_reader.py)
    resized  a copy made once by `flyp-saflex data RECIPE --materialise` is read instead of the file

An image that is too small for that, or no JPEG, is the same to the last bit in the first two. A preprocessing that is not the
usual one, or a transform without a description, is always exact.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flyp_saflex.config import DataConfig
from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import Box, Place, read_bytes, read_picture
from flyp_saflex.images.picture import Picture
from flyp_saflex.images.preprocessing import Preprocessing
from flyp_saflex.images.resized_copies import ResizedImages
from flyp_saflex.records import Edit, Sample

Preprocess = Callable[[Image.Image], Tensor]

MARGIN = 2.25
"""A smaller decoding has at least this many times the pixels, per side, of what the model sees; twice, then, of what
`random-crop` leaves. At 1 PSNR is 37..47 dB."""


class Source(Protocol):
    """Reader of samples: files, rows of an array or rows of a table become model inputs.

    Attributes:
        notes: what a person should know about it.
    """

    notes: list[str]

    def read(self, item: Sample | Edit, *, box_crop: bool = False) -> Any:
        """Return a row as random operations take it: a `Picture`, or an array.

        Raises:
            DataError: it cannot be read.
        """

    def tensor(self, row: Any) -> Tensor:
        """Return what the model takes."""

    def key(self, item: Sample | Edit) -> str:
        """Return a hash of the row's content; empty: not readable."""


class RowReader:
    """Rows of an array as float tensors: features of a table, or pixels that need no preprocessing.

    Args:
        rows: array-like; `Sample.item` is an index of it.
    """

    def __init__(self, rows: Sequence[Any] | None) -> None:
        self.rows = rows
        self.notes: list[str] = []

    def read(self, item: Sample | Edit, *, box_crop: bool = False) -> Any:
        """Return the row of a sample."""
        return row_of(self.rows, item)

    def tensor(self, row: Any) -> Tensor:
        """Return the row as float32."""
        return torch.as_tensor(np.asarray(row), dtype=torch.float32)

    def key(self, item: Sample | Edit) -> str:
        """Return a hash of the row."""
        return hashlib.sha256(np.ascontiguousarray(self.read(item)).tobytes()).hexdigest()


def row_of(rows: Sequence[Any] | None, item: Sample | Edit) -> Any:
    """Return the row of an array that an item names.

    Raises:
        DataError: the item is a file, or the dataset has no rows.
    """
    if rows is None or not isinstance(item.item, int):
        raise DataError(f"{item.item} is no row of an array, which this train.method takes: use a method that reads images")
    return rows[item.item]


class ImageReader:
    """Reads images as the model sees them; the same in every process.

    Args:
        preprocess: the model's own transform, image to tensor `[3, S, S]`, without randomness.
        settings: open_clip's description of it (`preprocess_cfg`); empty: it is only known as a function.
        scaled: decode JPEGs smaller where that is enough.
        resized: copies that are read instead of the files.
        rows: images of samples that are rows of an array (uint8, [H, W, 3] or [H, W]) instead of files.

    Attributes:
        notes: what a person should know about the copies.
        resized: the copies that are used.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        settings: Mapping[str, Any] | None = None,
        *,
        scaled: bool = False,
        resized: ResizedImages | None = None,
        rows: Sequence[Any] | None = None,
    ) -> None:
        self.preprocess, self.rows = preprocess, rows
        known = Preprocessing.of(settings or {})
        self._usual = known if scaled or resized is not None else None
        self._scaled = scaled
        self.notes: list[str] = []
        self.resized = resized if known is not None else None
        if resized is not None:
            self.notes.append(
                resized.note()
                if known is not None
                else "data.materialised has no effect: the model's preprocessing is not resize, centre crop and normalise"
            )

    @property
    def scaled(self) -> bool:
        """True if JPEGs are decoded smaller where that is enough."""
        return self._scaled and self._usual is not None

    def read(self, item: Sample | Edit, *, box_crop: bool = False) -> Picture:
        """Return the picture of a sample or an edit.

        Args:
            item: a file, or a row of `rows`.
            box_crop: crop samples to their bounding box.

        Raises:
            DataError: it cannot be read.
        """
        if isinstance(item.item, int):
            return Picture.of(Image.fromarray(np.asarray(row_of(self.rows, item))).convert("RGB"))
        return self.picture(item.image, box=item.box if box_crop and isinstance(item, Sample) else None)

    def picture(self, path: Place, *, box: Box | None = None) -> Picture:
        """Read an image.

        Args:
            path: the file, or the image inside of a dataset's files.
            box: to crop to, in pixels of the stored image.

        Raises:
            DataError: it cannot be read.
        """
        if self.resized is not None and isinstance(path, Path) and (copy := self.resized.picture(path, box)) is not None:
            return copy
        if not self._scaled or self._usual is None:
            return read_picture(path, box=box)
        return read_picture(path, box=box, at_least_px=math.ceil(MARGIN * self._usual.size_px))

    def tensor(self, picture: Picture) -> Tensor:
        """Return what the model takes, `[3, S, S]`."""
        if self._usual is None or (picture.whole and not self._scaled):
            return self.preprocess(picture.image())
        return self._usual(picture)

    def key(self, item: Sample | Edit) -> str:
        """Return a hash of the content, and of how the copy that is read instead was made; empty: not readable."""
        if isinstance(item.item, int):
            return hashlib.sha256(np.ascontiguousarray(row_of(self.rows, item)).tobytes()).hexdigest()
        if self.resized is not None and isinstance(item.item, Path) and (known := self.resized.key(item.item)):
            return known
        try:
            return hashlib.sha256(read_bytes(item.image)).hexdigest()
        except DataError:
            return ""


def reader_of(preprocess: Preprocess | Source) -> Source:
    """Return the reader itself, or the exact one of a transform."""
    return ImageReader(preprocess) if callable(preprocess) else preprocess


def open_reader(
    data: DataConfig,
    preprocess: Preprocess,
    settings: Mapping[str, Any],
    samples: Sequence[Sample],
    rows: Sequence[Any] | None = None,
) -> ImageReader:
    """Return the reader that a recipe's `[data]` section asks for.

    Args:
        data: `decoding`, `materialised`, `box_crop`.
        preprocess: the model's own transform.
        settings: open_clip's description of it.
        samples: images that may be read from resized copies.
        rows: images of samples that are no files.

    Raises:
        DataError: the copies cannot be read, or are smaller than the model's images.
    """
    resized = None
    if data.materialised:
        known = Preprocessing.of(settings)
        resized = ResizedImages.open(
            Path(data.materialised), samples, box_crop=data.box_crop, image_size_px=known.size_px if known else 0
        )
    return ImageReader(preprocess, settings, scaled=data.decoding == "scaled", resized=resized, rows=rows)
