"""Decoding of image files to upright 8-bit RGB.

CMYK, 16 bit, palettes, transparency and rotation flags are followed. A JPEG that is made small anyway can be decoded at a half
or a quarter of its size (DCT scaling), which is cheaper. Only formats that Pillow decodes itself are opened: an EPS file, say,
would start Ghostscript, whatever its ending.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from flyp_saflex.errors import DataError
from flyp_saflex.images.picture import Picture
from flyp_saflex.records import StoredImage

Box = tuple[float, float, float, float]
Place = Path | StoredImage
"""Where an encoded image is: a file, or inside of a dataset's files."""

FORMATS = (
    *("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM"),
    *("PSD", "QOI", "SGI", "DDS", "ICO", "PCX", "TGA"),
)
"""Pillow's formats that are opened; TGA, which has no signature, last."""
HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
"""Kinds of ISO media files that are HEIC images."""
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


def read_image(path: Place, *, box: Box | None = None) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    Args:
        path: the file, or the image inside of a dataset's files.
        box: (left, top, width, height) in pixels of the stored image (before its rotation flag is followed) to crop to.

    Raises:
        DataError: the file is missing, empty, cut off, too large or no image; or the box lies outside of it.
    """
    return read_picture(path, box=box).image()


def read_picture(path: Place, *, box: Box | None = None, at_least_px: int | None = None) -> Picture:
    """Do what `read_image` does, but decode no more than is needed.

    Args:
        path: as for `read_image`.
        box: as for `read_image`.
        at_least_px: shorter side, after the crop, that has to be there; a JPEG may be decoded smaller, but not below it.
            None: decode everything.

    Raises:
        DataError: as for `read_image`.
    """
    with open_image(path) as file:
        return decode_picture(file, path, box=box, at_least_px=at_least_px)


def open_image(path: Place) -> BinaryIO:
    """Open an encoded image for reading.

    Raises:
        DataError: as for `open_regular`, or a dataset's file cannot be read.
    """
    return io.BytesIO(path.read()) if isinstance(path, StoredImage) else open_regular(path)


def open_regular(path: Path) -> BinaryIO:
    """Open an image's file for reading.

    Raises:
        DataError: it is not there, or no regular file: a pipe would never end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"image {path} is no regular file; replace or remove it")
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"image {path} cannot be read: {reason}; check the path and its permissions") from None


def read_bytes(path: Place) -> bytes:
    """Return the bytes of an encoded image.

    Raises:
        DataError: as for `open_image`, or it cannot be read.
    """
    with open_image(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise DataError(f"image {path} cannot be read: {error.strerror}; check the file system") from None


def decode_image(file: BinaryIO, path: Place, *, box: Box | None = None) -> Image.Image:
    """Do what `read_image` does with an open file; `path` names it in errors."""
    return decode_picture(file, path, box=box).image()


def decode_picture(file: BinaryIO, path: Place, *, box: Box | None = None, at_least_px: int | None = None) -> Picture:
    """Do what `read_picture` does with an open file; `path` names it in errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are checked below; odd metadata is no concern of training
            image: Image.Image = Image.open(file, formats=formats())
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"image {path} is too large: {width} x {height} pixels, at most {MAX_PIXELS}; shrink or remove it"
                )
            left, top, right, bottom = (0, 0, width, height) if box is None else _edges(image, box, path)
            shorter = min(right - left, bottom - top)
            window = _decode_smaller(image, shorter // at_least_px if at_least_px else 1)
            scale = _transparency_scale(image)
            image.load()
            turn = TURNS.get(_orientation(image))
            picture = Picture(image, (width, height), window)
            if box is not None:
                picture = picture.crop(left, top, right - left, bottom - top)
            picture = Picture(_rgb(picture.pixels, scale), picture.size, picture.window)
            return picture if turn is None else picture.turned(turn)
    except Image.DecompressionBombError:
        raise DataError(f"image {path} is too large, at most {MAX_PIXELS} pixels; shrink or remove it") from None
    # Broken files make Pillow's decoders raise any of these.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError, struct.error) as error:
        reason = _reason(file, error)
        raise DataError(f"image {path} cannot be decoded ({reason}); replace or remove it") from None


def stored_size(path: Place) -> tuple[int, int]:
    """Return width and height of an encoded image as stored, before its rotation flag is followed; decode nothing.

    Raises:
        DataError: it cannot be opened.
    """
    with open_image(path) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return Image.open(file, formats=formats()).size
        except Image.DecompressionBombError:
            raise DataError(f"image {path} is too large, at most {MAX_PIXELS} pixels; shrink or remove it") from None
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error) as error:
            raise DataError(f"image {path} cannot be decoded ({_reason(file, error)}); replace or remove it") from None


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that are opened, of those that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reason(file: BinaryIO, error: Exception) -> str:
    """Return why a file cannot be decoded."""
    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split())[:200] or type(error).__name__
    try:
        file.seek(0)
        start = file.read(12)
    except (OSError, ValueError):
        start = b"?"
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
        return "it is HEIC, which Pillow does not read: convert it to JPEG"
    return "no image format that is read here"


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


def _edges(image: Image.Image, box: Box, path: Place) -> tuple[int, int, int, int]:
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


def _transparency_scale(image: Image.Image) -> float:
    """Return by what a PNG's transparent grey or colour has to be multiplied to be one of the decoded values.

    Pillow spreads 1, 2 and 4 bits to 0..255 and takes the upper byte of 16-bit colours, but leaves the transparent value of
    the file as it is. 16-bit grey keeps its values. Asked before the pixels are loaded.
    """
    rawmode = next((tile[3] for tile in getattr(image, "tile", ()) if isinstance(tile[3], str)), "")
    return {"1": 255, "L;1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(rawmode, 1)


def _rgb(image: Image.Image, transparency_scale: float = 1) -> Image.Image:
    """Return 8-bit RGB on white; 16 and 32 bits per pixel are brought to 8 from their full range."""
    transparent = image.info.get("transparency")
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip at 255
        values: np.ndarray = np.asarray(image, dtype=np.float32)
        clear = values == transparent if isinstance(transparent, (int, float)) else None
        if image.mode == "F":
            values = values * 255 if values.size and values.max() <= 1 else values
        elif image.mode != "I" or values.max() > 255:
            values = values / 257  # 0..65535 to 0..255
        if clear is not None:
            values = np.where(clear, 255, values)
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8), "L").convert("RGB")
    if transparency_scale != 1 and transparent is not None:
        colours = transparent if isinstance(transparent, tuple) else (transparent,)
        scaled = tuple(int(colour * transparency_scale) for colour in colours)
        image = image.convert("L") if image.mode == "1" else image.copy()
        image.info["transparency"] = scaled if len(scaled) > 1 else scaled[0]
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
