"""The usual preprocessing equals open_clip's transform; what it does not know it does not claim to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms

from flyp_saflex.images.picture import Picture
from flyp_saflex.images.preprocessing import Preprocessing, size_with_shorter

USUAL = {"size": 32, "mode": "RGB", "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "interpolation": "bicubic"}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": (32, 32), "resize_mode": "shortest", "fill_color": 0},
        {"resize_mode": "squash"},
        {"interpolation": "bilinear"},
        {"interpolation": "random", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ],
)
def test_it_equals_the_models_own_transform_to_the_last_bit(changes):
    settings = USUAL | changes
    own = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    usual = Preprocessing.of(settings)
    assert usual is not None
    for size in ((32, 32), (33, 32), (32, 57), (101, 75), (75, 101), (60, 40), (320, 33), (20, 28), (64, 64), (47, 333)):
        expected, found = own(noise(*size)), usual(Picture.of(noise(*size)))
        assert found.is_contiguous()
        assert torch.equal(found, expected), size


def test_every_value_becomes_the_same_number():
    own = image_transform_v2(PreprocessCfg(**USUAL), is_train=False)
    every_value = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint16).astype(np.uint8).reshape(32, 32, 3))
    assert torch.equal(Preprocessing.of(USUAL)(Picture.of(every_value)), own(every_value))


def test_sizes_are_torchvisions():
    resize = transforms.Resize(32)
    for width, height in ((33, 32), (32, 33), (1, 100), (747, 1024), (1920, 1080), (31, 30), (32, 32), (99, 98)):
        assert size_with_shorter((width, height), 32) == resize(Image.new("L", (width, height))).size


@pytest.mark.parametrize(
    "changes",
    [
        {"resize_mode": "longest"},
        {"size": (32, 48)},
        {"size": None},
        {"interpolation": "nearest"},
        {"mode": "L"},
        {"mean": None},
        {"std": (0.1, 0.2)},
        {"something_new": 1},
    ],
)
def test_what_is_not_known_is_refused(changes):
    assert Preprocessing.of(USUAL | changes) is None
    assert Preprocessing.of({}) is None
