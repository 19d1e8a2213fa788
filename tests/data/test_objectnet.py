"""ObjectNet: folders, labels and merged classes follow the download's mapping files; damaged files are one line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex.clip.imagenet import imagenet_classes
from flyp_saflex.config import DataConfig
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError
from flyp_saflex.evaluation.scoring import score_split
from flyp_saflex.images.decode import read_image

GROUPS = {
    "backpack": ("Backpack", ["backpack, back pack, knapsack"], [414]),
    "drill": ("Drill", ["power drill"], [740]),
    "lampshade": ("Lampshade", ["table lamp", "lampshade, lamp shade"], [846, 619]),
}
"""Folder: ObjectNet's label, texts of ImageNet's classes, and their indices."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the download's layout: three classes of ImageNet and one that it has not, PNGs with a red border."""
    random.seed(0)
    texts = [f"class {index}" for index in range(1000)]
    for _, names, indices in GROUPS.values():
        for name, index in zip(names, indices, strict=True):
            texts[index] = name
    places = random.sample(range(1000), 1000)  # ImageNet's own numbers are in another order than torchvision's
    lines = [""] * 1000
    for index, place in enumerate(places):
        lines[place] = texts[index]
    mappings = tmp_path / "mappings"
    mappings.mkdir()
    labels = {name: label for name, (label, _, _) in GROUPS.items()} | {"air_freshener": "Air freshener"}
    files = {
        "folder_to_objectnet_label.json": labels,
        "objectnet_to_imagenet_1k.json": {label: "; ".join(names) for label, names, _ in GROUPS.values()},
        "pytorch_to_imagenet_2012_id.json": {str(index): place for index, place in enumerate(places)},
    }
    for name, content in files.items():
        (mappings / name).write_text(json.dumps(content), encoding="utf-8")
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture = Image.new("RGB", (40, 30), (255, 0, 0))
    picture.paste((10, 20, 30), (2, 2, 38, 28))
    for name in labels:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            picture.save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path


def read(root: Path):
    return load_dataset(DataConfig(root=str(root)), test_set="objectnet")


def test_folders_have_the_classes_that_the_mapping_files_say(root: Path) -> None:
    dataset = read(root)
    every = list(imagenet_classes().values())
    assert dataset.class_names == tuple(every[index] for index in (414, 619, 740, 846)), "ImageNet's order"
    split = dataset.splits["test"]
    assert {Path(sample.sample_id).parent.name: sample.label for sample in split.samples} == {
        "backpack": 0, "drill": 2, "lampshade": 1,
    }  # fmt: skip
    assert set(split.merged) == {(0,), (2,), (1, 3)}
    assert (len(split), split.role, split.shift) == (6, "test", "ood")
    assert "2 images of classes that ImageNet has not" in " ".join(dataset.notes)


def test_the_red_border_is_cut_off(root: Path) -> None:
    sample = read(root).splits["test"].samples[0]
    image = np.asarray(read_image(sample.image, box=sample.box))
    assert image.shape == (26, 36, 3)
    assert np.unique(image.reshape(-1, 3), axis=0).tolist() == [[10, 20, 30]]


def test_any_of_the_classes_that_a_folder_stands_for_is_right(root: Path) -> None:
    """Columns: backpack, lampshade, drill, table lamp. Right: backpack, a lampshade taken for a table lamp, drill; 4 of 6."""
    split = read(root).splits["test"]
    logits = {
        "backpack/0.png": [9, 0, 0, 0], "backpack/1.png": [5, 0, 0, 6],
        "drill/0.png": [0, 0, 9, 0], "drill/1.png": [0, 7, 6, 0],
        "lampshade/0.png": [0, 1, 2, 3], "lampshade/1.png": [0, 4, 3, 0],
    }  # fmt: skip
    given = np.array([logits[sample.sample_id] for sample in split.samples], dtype=float)
    kept = given.copy()
    scored = score_split(split, range(6), given)
    assert scored.row["accuracy"] == pytest.approx(4 / 6)
    assert scored.row["num_classes"] == 3
    assert set(scored.predictions_N.tolist()) == {0, 1, 2}, "the first of merged classes stands for them"
    assert (given == kept).all(), "the caller's logits stay"


def damage(root: Path, name: str, change) -> None:
    path = root / "mappings" / name
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "mappings" / "imagenet_to_label_2012_v2").unlink(), "imagenet_to_label_2012_v2"),
        (lambda root: (root / "mappings" / "folder_to_objectnet_label.json").write_text("{"), "it is no JSON"),
        (lambda root: damage(root, "folder_to_objectnet_label.json", list), "found a list, expected an object"),
        (lambda root: damage(root, "objectnet_to_imagenet_1k.json", lambda m: m | {"Drill": "hammer drill"}), "'hammer drill'"),
        (lambda root: damage(root, "objectnet_to_imagenet_1k.json", lambda m: m | {"Drill": "table lamp"}), "two folders"),
        (lambda root: (root / "images" / "drill").rename(root / "images" / "drll"), r"1 of ObjectNet's 3 classes .*\(drill\)"),
        (lambda root: (root / "mappings").rename(root / "other"), "data.root is to hold the folders images and mappings"),
    ],
)
def test_a_download_that_is_not_whole_is_one_line(root: Path, spoil, words: str) -> None:
    spoil(root)
    with pytest.raises(DataError, match=words) as caught:
        read(root)
    assert "\n" not in str(caught.value)
