"""Random operations on an image, as functions of image and seed.

No operation asks a global generator or leaves one changed. They act in the coordinates of the full-size image: from the same
seed the same crop is drawn whether the image was decoded whole, decoded smaller or read from a resized copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, get_args

import torch
from PIL import Image
from torchvision import transforms

from flyp_saflex.errors import ConfigError, DataError, nearest
from flyp_saflex.images.picture import Picture, Turn
from flyp_saflex.images.preprocessing import size_with_shorter

Operation = Literal[
    "randaugment",
    "autoaugment",
    "autoaugment-cifar10",
    "autoaugment-svhn",
    "augmix",
    "trivialaugment",
    "random-crop",
    "flip",
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

CROP_AREA, CROP_RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
POLICIES: dict[str, Callable[[], Callable[[Image.Image], Image.Image]]] = {
    "randaugment": transforms.RandAugment,
    "autoaugment": transforms.AutoAugment,
    "autoaugment-cifar10": partial(transforms.AutoAugment, transforms.AutoAugmentPolicy.CIFAR10),
    "autoaugment-svhn": partial(transforms.AutoAugment, transforms.AutoAugmentPolicy.SVHN),
    "augmix": transforms.AugMix,
    "trivialaugment": transforms.TrivialAugmentWide,
}
"""Published ones; AutoAugment's three were learned on ImageNet, CIFAR-10 and SVHN (arXiv 1805.09501)."""


class Augmentation:
    """One random operation.

    The operations other than `flip` bring large images down first, as the model's own preprocessing would (shorter side
    to `image_size_px`, bicubic), so that they cost and mean the same for every source size. `random-crop` is a crop of
    90..100 % of the area with an aspect ratio of 3/4..4/3, resized to a square of `image_size_px`.

    Args:
        name: one of `OPERATIONS`.
        image_size_px: side of the square that the model takes.
    """

    def __init__(self, name: str, image_size_px: int) -> None:
        self.name, self.image_size_px = name, image_size_px
        self._policy = POLICIES[name]() if name in POLICIES else None

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """Return a changed copy of an image."""
        return self.on(Picture.of(image), seed).image()

    def on(self, picture: Picture, seed: int) -> Picture:
        """Return a changed copy of a picture; what it draws depends on the full size and the seed only."""
        with _torch_seed(seed):
            if self.name == "flip":
                return picture.turned(Turn.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else picture
            if self.name == "random-crop":
                return self._random_crop(picture)
            assert self._policy is not None, self.name
            large = min(picture.size) > self.image_size_px
            size = size_with_shorter(picture.size, self.image_size_px)
            return Picture.of(self._policy(picture.resized(*size) if large else picture.image()))

    def _random_crop(self, picture: Picture) -> Picture:
        width, height = picture.size
        shape_only = torch.empty(1, height, width, device="meta")
        top, left, high, wide = transforms.RandomResizedCrop.get_params(shape_only, list(CROP_AREA), list(CROP_RATIO))
        side = self.image_size_px
        return Picture.of(picture.crop(left, top, wide, high).resized(side, side))


def augmentation(name: str, image_size_px: int) -> Augmentation:
    """Return a random operation by name.

    Raises:
        DataError: there is no operation of this name.
        ConfigError: the model takes no images.
    """
    if not image_size_px:
        raise ConfigError(
            f"the operation '{name}' of augment.on_train or augment.upstream changes images, but train.method takes rows of "
            "numbers: set augment.on_train=[], and augment.upstream to mixup or cutmix"
        )
    if name not in OPERATIONS:
        raise DataError(f"unknown operation '{name}'{nearest(name, OPERATIONS)} (known: {', '.join(OPERATIONS)})")
    return Augmentation(name, image_size_px)


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
