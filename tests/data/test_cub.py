"""CUB-200-2011 by ALIA's rule, on the real metadata and on a small copy with images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from flyp_saflex.config import DataConfig
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import read_image


@pytest.fixture
def small_cub(tmp_path: Path) -> Path:
    """200 classes with 7 training and 2 test images each, drawn; only metadata for most of them."""
    folder = tmp_path / "CUB_200_2011"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (40, 30), (0, 0, 0)).save(tmp_path / "one.jpg")
    lines: dict[str, list[str]] = {
        name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes", "classes")
    }
    number = 0
    for label in range(1, 201):
        name = f"{label:03d}.Some_Bird{label}"
        lines["classes"].append(f"{label} {name}")
        (folder / "images" / name).mkdir()
        for index in range(9):
            number += 1
            shutil.copy(tmp_path / "one.jpg", folder / "images" / name / f"{index}.jpg")
            lines["images"].append(f"{number} {name}/{index}.jpg")
            lines["image_class_labels"].append(f"{number} {label}")
            lines["train_test_split"].append(f"{number} {int(index < 7)}")
            lines["bounding_boxes"].append(f"{number} 10.0 5.0 20.0 10.0")
    for name, rows in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_counts_on_the_real_metadata(shared_dir: Path):
    dataset = load_dataset(DataConfig(name="cub", root=str(shared_dir / "reference" / "cub")), check_files=False)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 4994, "val": 1000, "test": 5794}
    assert set(dataset.splits["val"].class_counts().values()) == {5}
    assert {name: (split.role, split.shift) for name, split in dataset.splits.items()} == {
        "train": ("train", "id"),
        "val": ("select", "id"),
        "test": ("test", "id"),
    }
    assert (len(dataset.class_names), dataset.class_names[2]) == (200, "Sooty Albatross")
    # The last five official training images of class 1, in file order, as images.txt and train_test_split.txt have them.
    folder = shared_dir / "reference" / "cub"
    is_train = dict(line.split() for line in (folder / "train_test_split.txt").read_text().splitlines())
    names = [line.split() for line in (folder / "images.txt").read_text().splitlines()]
    official = [name for number, name in names if name.startswith("001.") and is_train[number] == "1"]
    assert [sample.sample_id for sample in dataset.splits["val"].samples if sample.label == 0] == official[-5:]


def test_root_may_be_the_folder_or_its_parent_and_boxes_crop(small_cub: Path):
    above = load_dataset(DataConfig(name="cub", root=str(small_cub), box_crop=True))
    inside = load_dataset(DataConfig(name="cub", root=str(small_cub / "CUB_200_2011")))
    assert above.splits == inside.splits
    sample = above.train.samples[0]
    assert sample.sample_id == "001.Some_Bird1/0.jpg"
    assert sample.box == (10.0, 5.0, 20.0, 10.0)
    assert read_image(sample.path, box=sample.box).size == (20, 10)


def edit(folder: Path, name: str, old: str, new: str) -> None:
    path = folder / "CUB_200_2011" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


BAD = {
    "no file": (lambda f: (f / "CUB_200_2011" / "images.txt").unlink(), "images.txt not found"),
    "class out of range": (
        lambda f: edit(f, "image_class_labels.txt", "1 1\n", "1 201\n"),
        "image 1 has the class '201', expected 1..200",
    ),
    "short line": (lambda f: edit(f, "images.txt", "1 001.Some_Bird1/0.jpg\n", "1\n"), "line 1: '1' has 0 values"),
    "id twice": (lambda f: edit(f, "images.txt", "2 001", "1 001"), "line 2: the id 1 is there twice"),
    "no split": (lambda f: edit(f, "train_test_split.txt", "1 1\n", ""), "image 1 has 'none', expected 0 or 1"),
    "no boxes": (lambda f: (f / "CUB_200_2011" / "bounding_boxes.txt").unlink(), "box_crop is true"),
    "a bad box": (lambda f: edit(f, "bounding_boxes.txt", "1 10.0", "1 ten"), "image 1 has the box ten"),
    "classes missing": (lambda f: edit(f, "classes.txt", "200 200.Some_Bird200\n", ""), "has 199 classes"),
    "not UTF-8": (
        lambda f: (f / "CUB_200_2011" / "images.txt").write_bytes(b"1 caf\xe9.jpg\n"),
        r"images.txt is not UTF-8 text \(line 1\)",
    ),
    "a huge class": (
        lambda f: edit(f, "image_class_labels.txt", "1 1\n", f"1 {'9' * 5000}\n"),
        "image 1 has the class '999",
    ),
    "no image": (lambda f: (f / "CUB_200_2011/images/001.Some_Bird1/0.jpg").unlink(), "1 of 400 in train.*0.jpg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_copies_are_refused_in_one_line(case: str, small_cub: Path):
    damage, message = BAD[case]
    damage(small_cub)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(DataConfig(name="cub", root=str(small_cub), box_crop=True))
    assert "\n" not in str(caught.value)


def test_a_missing_folder_says_what_to_place_there(tmp_path: Path):
    with pytest.raises(DataError, match="CUB_200_2011 as unpacked"):
        load_dataset(DataConfig(name="cub", root=str(tmp_path / "nope")))
