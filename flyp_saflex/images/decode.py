"""Reading an image from disk (floor 2).

Whatever the file holds (CMYK, 16 bit, palette, transparency, a rotation flag) comes out as upright 8-bit RGB. A JPEG that is
made small anyway can be decoded at a half or a quarter of its size (DCT scaling), which is cheaper.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from flyp_saflex.errors import DataError
from flyp_saflex.images.picture import Picture

Box = tuple[float, float, float, float]

ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation values, and what makes the image upright."""
MAX_PIXELS = 100_000_000
"""Larger images are refused: decoded, this is 300 MB."""


def read_image(path: Path, *, box: Box | None = None) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    Args:
        path: the file.
        box: (left, top, width, height) in pixels of the stored image (before its rotation flag is followed) to crop to.

    Raises:
        DataError: the file is missing, empty, cut off, too large or no image; or the box lies outside of it.
    """
    return read_picture(path, box=box).image()


def read_picture(path: Path, *, box: Box | None = None, at_least_px: int | None = None) -> Picture:
    """Do what `read_image` does, but decode no more than is needed.

    Args:
        path: the file.
        box: as for `read_image`.
        at_least_px: shorter side, after the crop, that has to be there; a JPEG may be decoded smaller, but not below it.
            None: decode everything.

    Raises:
        DataError: as for `read_image`.
    """
    try:
        with open(path, "rb") as file:
            return decode_picture(file, path, box=box, at_least_px=at_least_px)
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror or error}; check the path and its permissions") from None


def decode_image(file: BinaryIO, path: Path, *, box: Box | None = None) -> Image.Image:
    """Do what `read_image` does with an open file; `path` names it in errors."""
    return decode_picture(file, path, box=box).image()


def decode_picture(file: BinaryIO, path: Path, *, box: Box | None = None, at_least_px: int | None = None) -> Picture:
    """Do what `read_picture` does with an open file; `path` names it in errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are checked below; odd metadata is no concern of training
            image: Image.Image = Image.open(file)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"image {path} is too large: {width} x {height} pixels, at most {MAX_PIXELS}; shrink or remove it"
                )
            left, top, right, bottom = (0, 0, width, height) if box is None else _edges(image, box, path)
            shorter = min(right - left, bottom - top)
            window = _decode_smaller(image, shorter // at_least_px if at_least_px else 1)
            image.load()
            turn = TURNS.get(_orientation(image))
            picture = Picture(image, (width, height), window)
            if box is not None:
                picture = picture.crop(left, top, right - left, bottom - top)
            picture = Picture(_rgb(picture.pixels), picture.size, picture.window)
            return picture if turn is None else picture.turned(turn)
    except Image.DecompressionBombError:
        raise DataError(f"image {path} is too large, at most {MAX_PIXELS} pixels; shrink or remove it") from None
    # Broken files make Pillow's decoders raise any of these.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError, struct.error) as error:
        size = Path(path).stat().st_size if Path(path).exists() else 0
        told = "" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        reason = "the file is empty" if size == 0 else told or "no image format that Pillow knows"
        raise DataError(f"image {path} cannot be decoded ({reason}); replace or remove it") from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1  # broken EXIF is no reason to lose the image


def _decode_smaller(image: Image.Image, most: int) -> tuple[float, float, float, float]:
    """Have a JPEG decoded at a part of its size, `most` times smaller or less; return where the image will then lie."""
    width, height = image.size
    # Of a block of 8 x 8 a quarter keeps 2 x 2 values and an eighth one: that costs 1 and 2 dB, which a quarter makes up for by
    # keeping more pixels than it has to.
    factor = 4 if most >= 5 else 2 if most >= 2 else 1
    if factor > 1 and isinstance(image, JpegImageFile):
        drafted = image.draft(image.mode, (width // factor, height // factor))
        if drafted is not None:
            return drafted[1]
    return 0, 0, width, height


def _edges(image: Image.Image, box: Box, path: Path) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a box, cut to the image."""
    left, top, width, height = box
    edges = (
        max(0, round(left)),
        max(0, round(top)),
        min(image.width, round(left + width)),
        min(image.height, round(top + height)),
    )
    if edges[0] >= edges[2] or edges[1] >= edges[3]:
        raise DataError(
            f"image {path}: the box {box} (left, top, width, height) lies outside of its {image.width} x {image.height} pixels; "
            "correct the box or set data.box_crop=false"
        )
    return edges


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel: Pillow's own conversion would clip at 255
        values: np.ndarray = np.asarray(image, dtype=np.float32)
        if image.mode == "F":
            values = values * 255 if values.size and values.max() <= 1 else values
        elif image.mode != "I" or values.max() > 255:
            values = values / 257  # 0..65535 to 0..255
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
