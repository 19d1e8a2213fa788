"""Batches in order; unreadable images skipped, counted, and too many of them refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flyp_saflex.errors import DataError
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.records import Edit, Sample


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    rows = []
    for index in range(10):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (8, 8), (index * 20, 0, 0)).save(path)
        rows.append(Sample(sample_id=path.name, item=path, label=0, box=(0, 0, 4, 4)))
    return rows


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_leave_the_global_generator_alone(samples, workers):
    loader = ImageLoader(to_tensor, batch_size=4, workers=workers, max_unreadable=0.0)
    state = torch.get_rng_state()
    batches = list(loader.batches(samples))
    assert torch.equal(state, torch.get_rng_state())
    assert [positions for positions, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    images = torch.cat([batch for _, batch in batches])
    assert images.shape == (10, 3, 4, 4)
    assert images[:, 0, 0, 0].tolist() == [index * 20 for index in range(10)]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_listed(samples, workers):
    samples[1].path.write_bytes(b"")
    for index in (4, 5):
        samples[index].path.write_text("no image")
    loader = ImageLoader(to_tensor, batch_size=2, workers=workers, max_unreadable=0.3)
    for _ in range(2):  # the list belongs to one pass
        assert [positions for positions, _ in loader.batches(samples)] == [[0], [2, 3], [6, 7], [8, 9]]
        assert [path for path, _ in loader.unreadable] == [str(samples[index].path) for index in (1, 4, 5)]
        assert "the file is empty" in loader.unreadable[0][1]


def test_too_many_unreadable_images_stop_the_pass(samples):
    samples[1].path.write_bytes(b"")
    samples[2].path.write_bytes(b"")
    loader = ImageLoader(to_tensor, batch_size=4, max_unreadable=0.1)
    with pytest.raises(
        DataError, match=r"2 of 10 images cannot be read, more than data\.max_unreadable = 0\.1 allows; first: image .*1\.png"
    ):
        list(loader.batches(samples))


def test_boxes_and_edits(samples):
    sizes: list[tuple[int, int]] = []

    def note(image: Image.Image) -> torch.Tensor:
        sizes.append(image.size)
        return to_tensor(image)

    edit = Edit(aug_id="e", path=samples[0].path, source_id="s", label=0)
    list(ImageLoader(note, batch_size=4, box_crop=True).batches([samples[0], edit]))
    list(ImageLoader(note, batch_size=4).batches([samples[0]]))
    assert sizes == [(4, 4), (8, 8), (8, 8)]
    assert list(ImageLoader(note, batch_size=4).batches([])) == []
