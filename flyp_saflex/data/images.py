"""Reading an image from disk, and the random operations on it (floor 2).

Whatever the file holds (CMYK, 16 bit, palette, transparency, a rotation flag) comes out as upright 8-bit RGB. A random
operation is a function of (image, seed): it asks no global generator and leaves none changed.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import transforms

from flyp_saflex.errors import DataError, nearest

Operation = Literal["randaugment", "autoaugment", "augmix", "trivialaugment", "random-crop", "flip"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
Box = tuple[float, float, float, float]
Augmentation = Callable[[Image.Image, int], Image.Image]

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
    try:
        with open(path, "rb") as file:
            return decode_image(file, path, box=box)
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror or error}; check the path and its permissions") from None


def decode_image(file: BinaryIO, path: Path, *, box: Box | None = None) -> Image.Image:
    """Do what `read_image` does with an open file; `path` names it in errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are checked below; odd metadata is no concern of training
            image: Image.Image = Image.open(file)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"image {path} is too large: {width} x {height} pixels, at most {MAX_PIXELS}; shrink or remove it"
                )
            image.load()
            turn = TURNS.get(_orientation(image))
            if box is not None:
                image = _crop(image, box, path)
            image = _rgb(image)
            return image if turn is None else image.transpose(turn)
    except Image.DecompressionBombError:
        raise DataError(f"image {path} is too large, at most {MAX_PIXELS} pixels; shrink or remove it") from None
    # Broken files make Pillow's decoders raise any of these.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError, struct.error) as error:
        size = Path(path).stat().st_size if Path(path).exists() else 0
        told = "" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        reason = "the file is empty" if size == 0 else told or "no image format that Pillow knows"
        raise DataError(f"image {path} cannot be decoded ({reason}); replace or remove it") from None


def augmentation(name: str, image_size_px: int) -> Augmentation:
    """Return a random operation as a function of (image, seed).

    The operations other than `flip` bring large images down first, as the model's own preprocessing would (shorter side
    to `image_size_px`, bicubic), so that they cost and mean the same for every source size. `random-crop` is a crop of
    90..100 % of the area with an aspect ratio of 3/4..4/3, resized to a square of `image_size_px`.

    Raises:
        DataError: there is no operation of this name.
    """
    if name not in OPERATIONS:
        raise DataError(f"unknown operation '{name}'{nearest(name, OPERATIONS)} (known: {', '.join(OPERATIONS)})")
    bicubic = transforms.InterpolationMode.BICUBIC
    make: dict[str, Callable[[], Callable[[Image.Image], Image.Image]]] = {
        "randaugment": transforms.RandAugment,
        "autoaugment": transforms.AutoAugment,
        "augmix": transforms.AugMix,
        "trivialaugment": transforms.TrivialAugmentWide,
        "random-crop": lambda: transforms.RandomResizedCrop(
            image_size_px, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), interpolation=bicubic
        ),
        "flip": transforms.RandomHorizontalFlip,
    }
    operation = make[name]()
    shrink = transforms.Resize(image_size_px, interpolation=bicubic)

    def apply(image: Image.Image, seed: int) -> Image.Image:
        if name not in ("random-crop", "flip") and min(image.size) > image_size_px:
            image = cast(Image.Image, shrink(image))
        with _torch_seed(seed):
            return operation(image)

    return apply


@contextmanager
def _torch_seed(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, which torchvision draws from, and put it back; no GPU generator is touched."""
    generator = torch.random.default_generator
    state = generator.get_state()
    generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        generator.set_state(state)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1  # broken EXIF is no reason to lose the image


def _crop(image: Image.Image, box: Box, path: Path) -> Image.Image:
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
    return image.crop(edges)


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
