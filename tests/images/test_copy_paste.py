"""Copy-paste: the object's pixels on another image, in size and place as drawn, from sample and seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.images.copy_paste import CopyPaste, feathered
from flyp_saflex.images.reader import ImageReader
from flyp_saflex.records import Sample

SIZE = 64


def reader() -> ImageReader:
    return ImageReader(lambda image: image)  # type: ignore[arg-type, return-value]


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Four images of 100 x 80 px: grounds of 40, 80, 120 and 160 grey, and a red box of 20 x 20 px in the first two."""
    found = []
    for number in range(4):
        pixels = np.full((80, 100, 3), 40 * (number + 1), dtype=np.uint8)
        box = (10.0, 50.0, 20.0, 20.0) if number < 2 else None
        if box:
            pixels[50:70, 10:30] = (255, 0, 0)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        found.append(Sample(sample_id=f"{number}.png", item=tmp_path / f"{number}.png", label=number % 2, box=box))
    return found


def red(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image).astype(int)
    return (pixels[:, :, 0] > 200) & (pixels[:, :, 1] < 60)


def test_the_object_lies_on_another_background_in_its_own_size(samples: list[Sample]) -> None:
    paste = CopyPaste(samples, reader(), SIZE, same_class=False)
    grounds = set()
    for seed in range(40):
        image = paste.read(samples[0], seed).image()
        assert image.size == (80, SIZE)
        ground = int(np.asarray(image)[0, 0, 1])
        grounds.add(ground)
        if ground != 80:  # that one has an object of its own, to be covered
            share = red(image).sum() / (image.width * image.height)
            assert 0.6 < share / (20 * 20 / (100 * 80)) < 1.3, "the feathered rim is not red enough to count"
        assert red(image)[:, 8:72].sum() == red(image).sum(), "within the central square, which the model sees"
    assert grounds == {80, 120, 160}, "never its own"


def test_backgrounds_of_the_same_class_are_of_that_class(samples: list[Sample]) -> None:
    paste = CopyPaste(samples, reader(), SIZE, same_class=True)
    grounds = {int(np.asarray(paste.read(samples[0], seed).image())[0, 0, 1]) for seed in range(20)}
    assert grounds == {120}
    with pytest.raises(ConfigError, match=r"class 0 has one training image.*augment.paste=any"):
        CopyPaste(samples[:3:3] + samples[1:2] + samples[3:], reader(), SIZE, same_class=True)


def test_another_object_is_covered(samples: list[Sample], tmp_path: Path) -> None:
    blue = np.full((80, 100, 3), 200, dtype=np.uint8)
    blue[30:60, 40:80] = (0, 0, 255)
    Image.fromarray(blue).save(tmp_path / "blue.png")
    other = Sample(sample_id="blue.png", item=tmp_path / "blue.png", label=0, box=(40.0, 30.0, 40.0, 30.0))
    paste = CopyPaste([samples[0], other], reader(), SIZE, same_class=False)
    pixels = np.asarray(paste.read(samples[0], 5).image()).astype(int)
    left = (pixels[:, :, 2] > 200) & (pixels[:, :, 0] < 60)
    assert left.sum() == 0


def test_a_row_depends_on_sample_and_seed_alone(samples: list[Sample]) -> None:
    one, other = (CopyPaste(samples, reader(), SIZE, same_class=False) for _ in range(2))
    other.read(samples[1], 3)
    assert np.array_equal(np.asarray(one.read(samples[0], 9).image()), np.asarray(other.read(samples[0], 9).image()))
    assert any(
        not np.array_equal(np.asarray(one.read(samples[0], 9).image()), np.asarray(one.read(samples[0], seed).image()))
        for seed in range(3)
    )


def test_a_sample_without_a_box_stays_as_it_is(samples: list[Sample]) -> None:
    paste = CopyPaste(samples, reader(), SIZE, same_class=False)
    assert paste.num_without == 2
    assert paste.read(samples[2], 0).size == (100, 80)


def test_the_edge_is_feathered() -> None:
    mask = np.asarray(feathered(60, 40))
    assert mask[20, 30] == 255
    assert mask[20, 0] < 128 > mask[0, 30]
    assert (np.diff(mask[20, :10].astype(int)) >= 0).all()
    assert set(np.asarray(feathered(2, 2)).ravel()) == {255}


def test_boxes_outside_and_missing_images_are_one_line(samples: list[Sample], tmp_path: Path) -> None:
    outside = Sample(sample_id="0.png", item=tmp_path / "0.png", label=0, box=(200.0, 0.0, 5.0, 5.0))
    paste = CopyPaste([outside, *samples[1:]], reader(), SIZE, same_class=False)
    with pytest.raises(DataError, match=r"lies outside of its 100 x 80 pixels") as caught:
        paste.read(outside, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"copy-paste needs the objects' boxes, but no training image has one: set data.boxes"):
        CopyPaste(samples[2:], reader(), SIZE, same_class=False)
    for number in (1, 2, 3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no background for 0.png can be read: image .*png"):
        CopyPaste(samples, reader(), SIZE, same_class=False).read(samples[0], 0)
