"""Crops, turns and resizes mean the same whether an image is there whole or smaller, with edges between pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flyp_saflex.images.picture import Picture, Turn


def ramp(width: int, height: int) -> Image.Image:
    """Brightness that says where it is: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 240 / width, y * 240 / height, 0 * x], axis=2).round().astype(np.uint8))


def halved(image: Image.Image) -> Picture:
    """Return what a decoder that halves gives: the last pixel of an odd side is half beyond the image."""
    width, height = image.size
    padded = np.pad(np.asarray(image, dtype=float), ((0, height % 2), (0, width % 2), (0, 0)), "edge")
    small = padded.reshape(len(padded) // 2, 2, -1, 2, 3).mean(axis=(1, 3))
    return Picture(Image.fromarray(small.round().astype(np.uint8)), image.size, (0, 0, width / 2, height / 2))


def difference(whole: Picture, small: Picture, width: int, height: int) -> float:
    a, b = (np.asarray(picture.resized(width, height), dtype=float) for picture in (whole, small))
    return float(abs(a - b).max())


@pytest.mark.parametrize("size", [(101, 75), (100, 77), (63, 127), (64, 64)])
@pytest.mark.parametrize("turn", [None, *Turn])
def test_halved_pixels_lie_where_the_whole_ones_do(size, turn):
    """2 of 255: rounding twice, and the outermost pixel, of which half is beyond the image. A shift by half a pixel gives 5."""
    whole, small = Picture.of(ramp(*size)), halved(ramp(*size))
    if turn is not None:
        whole, small = whole.turned(turn), small.turned(turn)
    assert small.size == whole.size
    width, height = whole.size
    assert difference(whole, small, 24, 24) <= 2
    for left, top, wide, high in ((0, 0, width - 1, height - 1), (3, 5, 41, 33), (width - 40, height - 31, 40, 31)):
        a, b = whole.crop(left, top, wide, high), small.crop(left, top, wide, high)
        assert a.size == b.size == (wide, high)
        assert difference(a, b, 16, 16) <= 2
        assert difference(a.crop(7, 9, 20, 15), b.crop(7, 9, 20, 15), 8, 8) <= 2, "a crop of a crop"


def test_a_shift_would_be_seen():
    """The tolerance above tells an exact window from the naive one."""
    small = halved(ramp(63, 63)).crop(1, 1, 40, 40)
    naive = Picture.of(halved(ramp(63, 63)).pixels.crop((0, 0, 20, 20)))
    whole = Picture.of(ramp(63, 63)).crop(1, 1, 40, 40)
    assert difference(whole, small, 16, 16) <= 2 < difference(whole, naive, 16, 16)


def test_whole_images_are_cropped_turned_and_resized_by_pillow_alone():
    image = ramp(60, 40)
    picture = Picture.of(image)
    assert picture.whole
    assert picture.image() is image
    cut = picture.crop(7, 3, 31, 20)
    assert cut.whole
    assert np.array_equal(cut.image(), image.crop((7, 3, 38, 23)))
    assert np.array_equal(cut.resized(16, 16), image.crop((7, 3, 38, 23)).resize((16, 16), Image.Resampling.BICUBIC))
    for turn in Turn:
        assert np.array_equal(picture.turned(turn).image(), image.transpose(turn))
    assert np.array_equal(picture.resized(60, 40, (10, 5, 20, 30)), image.crop((10, 5, 30, 35))), "nothing is interpolated"


@pytest.mark.parametrize("size", [(60, 40), (41, 90), (33, 33)])
def test_a_part_of_a_resize_is_that_part_of_the_whole_resize(size):
    """1 of 255 where the image is not whole: Pillow's filter weights are rounded from a start that is another fraction."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for picture, tolerance in (
        (Picture.of(noise), 0),
        (Picture(noise, (2 * size[0] - 1, size[1]), (0, 0, size[0] - 0.5, size[1])), 1),
    ):
        whole = np.asarray(picture.resized(24, 30), dtype=int)
        part = np.asarray(picture.resized(24, 30, (5, 3, 10, 20)), dtype=int)
        assert abs(whole[3:23, 5:15] - part).max() <= tolerance


def test_the_pixels_of_a_smaller_image_are_not_taken_for_its_own():
    with pytest.raises(AssertionError, match="decoded smaller"):
        halved(ramp(63, 63)).image()
