"""`augment.upstream = copy-paste` in training: the same rows for any number of processes, labels of the object."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.batches import read_steps
from flyp_saflex.training.setup import prepare
from flyp_saflex.training.train import train

PASTE = ("augment.upstream=copy-paste", "train.select_split=", "augment.on_train=[]")


@pytest.fixture
def boxed(make_config: Callable[..., Config], tiny_images_dir: Path, tmp_path: Path) -> Callable[..., Config]:
    """The tiny recipe with boxes of all circles and squares, none of stripes."""
    names = [path.relative_to(tiny_images_dir).as_posix() for path in sorted(tiny_images_dir.glob("*/*/*.png"))]
    images = [{"id": number, "file_name": name, "width": 48, "height": 40} for number, name in enumerate(names)]
    boxes = [{"image_id": image["id"], "bbox": [10, 8, 26, 24]} for image in images if "stripes" not in str(image["file_name"])]
    (tmp_path / "boxes.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    return lambda *options: make_config(f"data.boxes={tmp_path / 'boxes.json'}", *options)


def rows(config: Config, *, num_processes: int = 1) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Return augmented inputs, their labels and the plain images of two steps, in the order of one process."""
    setup = prepare(config)
    parts = [[step[0] for step in read_steps(setup, None, 0, 2, rank, num_processes)] for rank in range(num_processes)]
    found = [
        (row.index, batch.inputs[place])
        for step in zip(*parts, strict=True)
        for batch in step
        for place, row in enumerate(batch.rows)
        if row.kind == "augmented"
    ]
    found.sort(key=lambda pair: (pair[0], float(pair[1].sum())))
    samples = setup.dataset.train.samples
    plain = torch.stack([setup.source.tensor(setup.source.read(samples[index])) for index, _ in found])
    return torch.stack([image for _, image in found]), [samples[index].label for index, _ in found], plain


def test_rows_are_the_same_for_any_number_of_processes(boxed: Callable[..., Config]) -> None:
    one, labels, plain = rows(boxed(*PASTE))
    two, same, _ = rows(boxed(*PASTE), num_processes=2)
    assert torch.equal(one, two)
    assert labels == same
    changed = (one != plain).flatten(1).any(dim=1).tolist()
    assert changed == [label != 2 for label in labels], "an image without a box stays as it is"
    assert not torch.equal(one, rows(boxed(*PASTE, "augment.paste=same-class"))[0])
    assert not torch.equal(one, rows(boxed(*PASTE, "seed=4"))[0])


def test_saflex_weighs_pasted_rows(boxed: Callable[..., Config], tmp_path: Path) -> None:
    options = ("saflex.enabled=true", "saflex.preset=robust", "train.log_augmented=true", "train.steps=2")
    train(boxed(*PASTE[:2], *options), tmp_path / "run")
    told = RunDir(tmp_path / "run", lock=False).read_rows("augmented.jsonl")
    assert len(told) == 12
    assert all(math.isfinite(row["gain"]) for row in told)
    names = ("circle", "square", "stripes")
    assert all(names[row["label"]] in row["id"] for row in told), "the label is that of the pasted object"


def test_an_image_without_a_box_is_told(boxed: Callable[..., Config]) -> None:
    notes = prepare(boxed(*PASTE)).notes
    assert any(
        "4 of 12 training images have no box: augment.upstream = copy-paste leaves them as they are" in note for note in notes
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("data.box_crop=true",), r"needs what is around the boxes: set data\.box_crop=false"),
        (("augment.upstream=['flip', 'copy-paste']",), '"copy-paste" must come first'),
        (("data.boxes=",), "no training image has one: set data.boxes"),
    ],
)
def test_refusals_are_one_line(options: tuple[str, ...], message: str, boxed: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(boxed(*PASTE, *options))
    assert "\n" not in str(caught.value)
