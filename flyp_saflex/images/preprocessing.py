"""CLIP preprocessing, on an image that may have been decoded smaller.

open_clip describes it in a few numbers: resize (shorter side to S, or squash to S x S), centre crop, to [0, 1], normalise.
What stands here calculates the same, to the last bit for an image that is there whole. Of one that was decoded smaller it
resizes only what the crop keeps, from the exact place of the image among the pixels at hand. A description that it does not
know is left to the model's own transform, on the whole image.

Shapes: S side of the square, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flyp_saflex.images.picture import Picture

RESAMPLINGS = {"bicubic": Image.Resampling.BICUBIC, "random": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
"""open_clip's names; `random` is about its training transform and means bicubic here."""
KNOWN = frozenset(("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"))


def size_with_shorter(size: tuple[int, int], shorter_px: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side at `shorter_px`, the longer one cut to a whole number as torchvision does."""
    width, height = size
    if width <= height:
        return shorter_px, int(shorter_px * height / width)
    return int(shorter_px * width / height), shorter_px


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize, centre crop, normalise.

    Attributes:
        size_px: S.
        squash: both sides are resized to S, whatever the aspect ratio; else the shorter one, and the centre is kept.
        resample: filter of the resize.
        mean: per channel, in 0..1.
        std: per channel.
    """

    size_px: int
    squash: bool
    resample: Image.Resampling
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Preprocessing | None:
        """Return the preprocessing that open_clip's `preprocess_cfg` describes; None if something in it is not known here."""
        size, mode = settings.get("size"), settings.get("resize_mode", "shortest")
        sides = {size} if isinstance(size, int) else set(size or ())
        mean, std = (_per_channel(settings.get(name)) for name in ("mean", "std"))
        resample = RESAMPLINGS.get(settings.get("interpolation", "bicubic"))
        known = set(settings) <= KNOWN and settings.get("mode", "RGB") == "RGB" and mode in ("shortest", "squash")
        if not known or len(sides) != 1 or mean is None or std is None or resample is None:
            return None
        return cls(sides.pop(), mode == "squash", resample, mean, std)

    def square(self, picture: Picture) -> Image.Image:
        """Return the S x S pixels that the model sees."""
        side = self.size_px
        if self.squash:
            return picture.resized(side, side, resample=self.resample)
        width, height = size_with_shorter(picture.size, side)
        # The halves are rounded as torchvision's centre crop does: to even.
        left, top = round((width - side) / 2), round((height - side) / 2)
        return picture.resized(width, height, (left, top, side, side), resample=self.resample)

    def __call__(self, picture: Picture) -> Tensor:
        """Return the normalised float tensor [3, S, S]."""
        pixels_HWC = torch.from_numpy(np.array(self.square(picture)))
        image_CHW = pixels_HWC.permute(2, 0, 1).contiguous().to(torch.float32)
        # The operations of ToTensor and Normalize in their order, so the same to the last bit; in place, so in half the time.
        mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return image_CHW.div_(255).sub_(mean_C11).div_(std_C11)


def _per_channel(value: Any) -> tuple[float, float, float] | None:
    if isinstance(value, (int, float)):
        return float(value), float(value), float(value)
    return (float(value[0]), float(value[1]), float(value[2])) if isinstance(value, (list, tuple)) and len(value) == 3 else None
