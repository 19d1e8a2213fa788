"""Image whose pixels may be fewer than the file's, in the file's own coordinates.

A JPEG can be decoded at half its size for a third of the price, and a resized copy is cheaper still; but half of 1023
pixels is 511.5, not 512. A `Picture` keeps the exact place of the whole image among the pixels at hand, so that every crop,
flip and resize means the same, to a fraction of a pixel, whatever was decoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

Turn = Image.Transpose
Window = tuple[float, float, float, float]

BICUBIC = Image.Resampling.BICUBIC
NEARLY = 1e-6
"""An edge this close to a pixel's border is meant to lie on it: products of fractions are not exact."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image, perhaps at a lower resolution than its file.

    Attributes:
        pixels: what was decoded.
        size: width and height of the image at full size; every other coordinate is in these units.
        window: left, top, right and bottom edge of the image in `pixels`, not always whole numbers.
    """

    pixels: Image.Image
    size: tuple[int, int]
    window: Window

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """Return an image at its full size."""
        return cls(image, image.size, (0, 0, *image.size))

    @property
    def whole(self) -> bool:
        """True if every pixel of the image is at hand."""
        return self.pixels.size == self.size and self.window == (0, 0, *self.size)

    def image(self) -> Image.Image:
        """Return the pixels of an image that is there at full size."""
        assert self.whole, "the full-size pixels of an image that was decoded smaller were asked for"
        return self.pixels

    def crop(self, left: int, top: int, width: int, height: int) -> Picture:
        """Return a part of the image; it has to lie within."""
        window = self._within(
            left / self.size[0], top / self.size[1], (left + width) / self.size[0], (top + height) / self.size[1]
        )
        x, y = (math.floor(edge + NEARLY) for edge in window[:2])
        x2, y2 = (math.ceil(edge - NEARLY) for edge in window[2:])
        # Pixels beyond the crop are cut away: a resize of the part would otherwise mix them in.
        pixels = self.pixels.crop((x, y, x2, y2))
        place = [edge - origin for edge, origin in zip(window, (x, y, x, y), strict=True)]
        near = tuple(round(edge) if abs(edge - round(edge)) < NEARLY else edge for edge in place)
        return Picture(pixels, (width, height), _inside(near, pixels.size))

    def turned(self, turn: Turn) -> Picture:
        """Return the image flipped or turned by a multiple of 90 degrees."""
        left, top, right, bottom = self.window
        width, height = self.pixels.size
        window = {
            Turn.FLIP_LEFT_RIGHT: (width - right, top, width - left, bottom),
            Turn.FLIP_TOP_BOTTOM: (left, height - bottom, right, height - top),
            Turn.ROTATE_180: (width - right, height - bottom, width - left, height - top),
            Turn.TRANSPOSE: (top, left, bottom, right),
            Turn.ROTATE_90: (top, width - right, bottom, width - left),
            Turn.ROTATE_270: (height - bottom, left, height - top, right),
            Turn.TRANSVERSE: (height - bottom, width - right, height - top, width - left),
        }[turn]
        lies = turn in (Turn.TRANSPOSE, Turn.TRANSVERSE, Turn.ROTATE_90, Turn.ROTATE_270)
        return Picture(self.pixels.transpose(turn), (self.size[1], self.size[0]) if lies else self.size, window)

    def resized(
        self,
        width: int,
        height: int,
        part: tuple[int, int, int, int] | None = None,
        *,
        resample: Image.Resampling = BICUBIC,
    ) -> Image.Image:
        """Return the image resized to `width` x `height`, or only a part of that.

        Args:
            width: of the whole result.
            height: of the whole result.
            part: (left, top, width, height) of the result that is wanted. Unless the image is whole, the rest is not
                calculated; a whole one gives what Pillow's resize and crop give, to the last bit.
            resample: how.
        """
        left, top, wide, high = part or (0, 0, width, height)
        if self.whole:
            image = self.pixels if self.size == (width, height) else self.pixels.resize((width, height), resample)
            return image.crop((left, top, left + wide, top + high))
        box = self._within(left / width, top / height, (left + wide) / width, (top + high) / height)
        return self.pixels.resize((wide, high), resample, box=_inside(box, self.pixels.size))

    def _within(self, left: float, top: float, right: float, bottom: float) -> Window:
        """Return edges given as fractions of the image in the coordinates of `pixels`."""
        x, y, x2, y2 = self.window
        width, height = x2 - x, y2 - y
        return x + left * width, y + top * height, x + right * width, y + bottom * height


def _inside(window: tuple[float, ...], size: tuple[int, int]) -> Window:
    """Return the window without what rounding puts beyond the pixels, which Pillow refuses."""
    left, top, right, bottom = window
    return max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
