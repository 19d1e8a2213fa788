"""Random translation beyond the border, and the visible fraction of the image that Soft-Augmentation goes by (arXiv 2211.04625).

The shift along each side is a normal draw around zero, drawn again while it would move the image out of sight. It depends on
the seed alone, so the visible fraction of a row is known without its image.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from flyp_saflex.errors import ConfigError
from flyp_saflex.images.picture import Picture
from flyp_saflex.images.preprocessing import size_with_shorter


def draw_shift(sigma: float, seed: int) -> tuple[float, float]:
    """Return the shift to the right and downwards as fractions of the sides, each within -1 .. 1.

    Args:
        sigma: standard deviation, as a fraction of a side.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)

    def one() -> float:
        while abs(shift := float(generator.normal(0, sigma))) >= 1:
            pass
        return shift

    return one(), one()


def visible_fraction(sigma: float, seed: int) -> float:
    """Return v, the part of the image's area that the translation of this seed leaves within the frame."""
    right, down = draw_shift(sigma, seed)
    return (1 - abs(right)) * (1 - abs(down))


class Translation:
    """Shift of the image; what comes into view is black.

    Args:
        image_size_px: side of the square that the model takes.
        sigma: standard deviation of the shift, as a fraction of a side.
    """

    def __init__(self, image_size_px: int, sigma: float) -> None:
        if not image_size_px:
            raise ConfigError(
                "augment.upstream: translate and soft-crop shift images, but train.method takes rows of numbers: "
                "use mixup or cutmix"
            )
        self.image_size_px, self.sigma = image_size_px, sigma

    def on(self, picture: Picture, seed: int) -> Picture:
        """Return a shifted copy, brought down to the model's size first."""
        size = size_with_shorter(picture.size, self.image_size_px)
        large = min(picture.size) > self.image_size_px
        image = picture.resized(*size) if large else picture.image()
        right, down = draw_shift(self.sigma, seed)
        shifted = Image.new(image.mode, image.size)
        shifted.paste(image, (round(right * image.width), round(down * image.height)))
        return Picture.of(shifted)
