"""Boxes of a JSON file and of a table's columns: they come to their images, and wrong ones are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flyp_saflex.config import DataConfig
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError

NAME = "day/circle/0.png"


def load(root: Path, document: Any, tmp_path: Path) -> dict[str, Any]:
    """Return the box of every training image that has one."""
    file = tmp_path / "boxes.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    config = DataConfig(
        root=str(root), train_domains=("day",), test_domains=("night",), select_fraction=0, test_fraction=0, boxes=str(file)
    )
    dataset = load_dataset(config)
    return {sample.sample_id: sample.box for split in dataset.splits.values() for sample in split.samples if sample.box}


def coco(*boxes: Any, name: str = NAME, **more: Any) -> dict[str, Any]:
    annotations = [{"image_id": 7, "bbox": box, "score": score} for score, box in enumerate(boxes, 1)]
    return {"images": [{"id": 7, "file_name": name, "width": 48, "height": 40}], "annotations": annotations} | more


def test_the_most_confident_box_counts(tiny_images_dir: Path, tmp_path: Path) -> None:
    boxes = load(tiny_images_dir, coco([1, 2, 30, 30], [3, 4, 10, 12]), tmp_path)
    assert boxes == {NAME: (3.0, 4.0, 10.0, 12.0)}


def test_names_without_folders_count_where_they_are_unique(tiny_images_dir: Path, tmp_path: Path) -> None:
    (tiny_images_dir / "day" / "circle" / "0.png").rename(tiny_images_dir / "day" / "circle" / "alone.png")
    assert load(tiny_images_dir, coco([1, 2, 3, 4], name="elsewhere\\alone.png"), tmp_path) == {
        "day/circle/alone.png": (1.0, 2.0, 3.0, 4.0)
    }
    with pytest.raises(DataError, match="none of its 1 images"):
        load(tiny_images_dir, coco([1, 2, 3, 4], name="1.png"), tmp_path)


def test_fractions_of_a_detector_become_pixels(tiny_images_dir: Path, tmp_path: Path) -> None:
    detections = [{"category": "1", "conf": 0.2, "bbox": [0, 0, 1, 1]}, {"conf": 0.9, "bbox": [0.25, 0.5, 0.5, 0.25]}]
    document = {"images": [{"file": NAME, "detections": detections}, {"file": "x.png", "detections": None}]}
    assert load(tiny_images_dir, document, tmp_path) == {NAME: (12.0, 20.0, 24.0, 10.0)}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is no JSON"),
        ([], "expected images with id and file_name"),
        (
            {"images": [{}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]},
            "KeyError 'id' in a row; expected",
        ),
        (coco([50, 0, 5, 5]), r"lies outside of its 48 x 40 pixels; correct or remove it"),
        (coco([0, 0, 5]), r"is not four numbers left, top, width, height"),
        (coco([0, 0, 0, 5]), r"is empty; correct or remove it"),
        (coco([0, 0, "x", 5]), r"is not four numbers"),
        ({"images": [{"file": NAME, "detections": [{"bbox": [1.5, 0, 1, 1]}]}]}, "lies outside of its 1 x 1 image"),
        (
            coco([0, 0, 5, 5], name="elsewhere.png"),
            r"none of its 1 images with a box \(first: elsewhere.png\) is an image",
        ),
    ],
)
def test_wrong_files_are_one_line(document: Any, message: str, tiny_images_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tiny_images_dir, document, tmp_path)
    assert "boxes.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tiny_images_dir: Path) -> None:
    with pytest.raises(DataError, match=r"data.boxes = nowhere.json cannot be read: No such file"):
        load_dataset(DataConfig(root=str(tiny_images_dir), train_domains=("day",), test_domains=("night",), boxes="nowhere.json"))


def table(root: Path, rows: str, **options: Any) -> dict[str, Any]:
    (root / "table.csv").write_text("path,label,split,x,y,w,h\n" + rows, encoding="utf-8")
    names = {"box_columns": ("x", "y", "w", "h"), "split_column": "split"} | options
    dataset = load_dataset(DataConfig(name="table", table=str(root / "table.csv"), root=str(root), **names))
    return {sample.sample_id: sample.box for sample in dataset.train.samples}


def test_columns_of_a_table_are_boxes(tiny_images_dir: Path) -> None:
    rows = f"{NAME},circle,train,1,2.5,3,4\nday/square/0.png,square,train,,,,\nday/square/1.png,square,val,1,1,2,2\n"
    assert table(tiny_images_dir, rows) == {NAME: (1.0, 2.5, 3.0, 4.0), "day/square/0.png": None}
    with pytest.raises(DataError, match=r"table.csv row 2, column 'x': the box .* is not four numbers"):
        table(tiny_images_dir, rows.replace("2.5", ""))
    with pytest.raises(DataError, match=r"row 2, column 'x': the box .* is empty"):
        table(tiny_images_dir, rows.replace("3,4", "0,4"))
    with pytest.raises(DataError, match=r"data.box_columns names 2 columns, expected four: left, top, width, height"):
        table(tiny_images_dir, rows, box_columns=("x", "y"))
