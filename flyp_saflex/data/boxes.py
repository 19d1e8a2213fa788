"""Boxes of objects from a JSON file, put on the images of a dataset.

    COCO       {"images": [{"id", "file_name", "width", "height"}], "annotations": [{"image_id", "bbox", "score"}]}
    detector   {"images": [{"file", "detections": [{"conf", "bbox"}]}]}, as MegaDetector writes, in fractions of the image

A `bbox` is left, top, width, height.

Of several boxes of an image the most confident one counts, of equal ones the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import stored_size
from flyp_saflex.records import Dataset, Sample, sample_ids_of

Box = tuple[float, float, float, float]
COCO = "images with id and file_name, and annotations with image_id and bbox (COCO), or images with file and detections"


def with_boxes(dataset: Dataset, file: str) -> Dataset:
    """Return the dataset with the boxes of a JSON file.

    Raises:
        DataError: the file cannot be read, a box is none or lies outside of its image, or no box belongs to an image.
    """
    path = Path(file).expanduser()
    found, relative = _read(path)
    own = [sample_id for split in dataset.splits.values() for sample_id in sample_ids_of(split.samples)]
    unique = _by_base_name(own)
    short = {base: name for base, name in _by_base_name(found).items() if base in unique}

    def boxed(sample: Sample) -> Sample:
        name = sample.sample_id if sample.sample_id in found else short.get(PurePosixPath(sample.sample_id).name, "")
        box = found.get(name)
        if box is None:
            return sample
        if relative:
            try:
                width, height = stored_size(sample.image)
            except DataError:  # told where images are read
                return sample
            box = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        return replace(sample, box=box)

    splits = {name: replace(split, samples=tuple(map(boxed, split.samples))) for name, split in dataset.splits.items()}
    counts = {name: sum(sample.box is not None for sample in split.samples) for name, split in splits.items()}
    if not sum(counts.values()):
        example = next(iter(found), "none")
        raise DataError(
            f"data.boxes = {file}: none of its {len(found)} images with a box (first: {example}) is an image of the dataset: "
            "their names have to be relative to data.root, or unique file names"
        )
    told = ", ".join(f"{name} {count} of {len(splits[name])}" for name, count in counts.items())
    return replace(dataset, splits=splits, notes=(*dataset.notes, f"images with a box (data.boxes): {told}"))


def parse_box(values: Any, where: str) -> Box:
    """Return a box of four numbers.

    Raises:
        DataError: it is none, or is empty; `where` names the place.
    """
    try:
        left, top, width, height = map(float, values)
    except (TypeError, ValueError):
        raise DataError(f"{where}: the box {values} is not four numbers left, top, width, height; correct it") from None
    if not all(map(math.isfinite, (left, top, width, height))) or width <= 0 or height <= 0:
        raise DataError(f"{where}: the box {list(values)} (left, top, width, height) is empty; correct or remove it")
    return left, top, width, height


def _read(path: Path) -> tuple[dict[str, Box], bool]:
    """Return the box of every image by name, and whether boxes are fractions of the image."""
    try:
        document = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"data.boxes = {path} cannot be read: {error.strerror}; correct the path") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"data.boxes = {path} is no JSON ({error}); expected {COCO}") from None
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise DataError(f"data.boxes = {path}: expected {COCO}")
    relative = "annotations" not in document
    best: dict[str, tuple[float, float, Box]] = {}
    for name, size, values, confidence in _detections(document, images, relative, path):
        box = parse_box(values, f"{path}, image {name}")
        if box[0] >= size[0] or box[1] >= size[1] or box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
            raise DataError(
                f"{path}, image {name}: the box {list(values)} (left, top, width, height) lies outside of its {size[0]:g} x "
                f"{size[1]:g} {'image' if relative else 'pixels'}; correct or remove it"
            )
        if name not in best or (confidence, box[2] * box[3]) > best[name][:2]:
            best[name] = (confidence, box[2] * box[3], box)
    return {name: box for name, (_, _, box) in best.items()}, relative


def _detections(
    document: Mapping[str, Any], images: list[dict[str, Any]], relative: bool, path: Path
) -> list[tuple[str, tuple[float, float], Any, float]]:
    """Return name of the image, its size, box and confidence of every detection."""
    try:
        if relative:
            return [
                (image["file"].replace("\\", "/"), (1.0, 1.0), found["bbox"], float(found.get("conf", 1.0)))
                for image in images
                for found in image.get("detections") or ()
            ]
        known = {image["id"]: image for image in images}
        return [
            (
                (image := known[found["image_id"]])["file_name"].replace("\\", "/"),
                (float(image.get("width", math.inf)), float(image.get("height", math.inf))),
                found["bbox"],
                float(found.get("score", 1.0)),
            )
            for found in document["annotations"]
            if found.get("bbox")
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"data.boxes = {path}: {type(error).__name__} {error} in a row; expected {COCO}") from None


def _by_base_name(found: Iterable[str]) -> dict[str, str]:
    """Return names by the last part of them, where that is unique."""
    names: dict[str, list[str]] = {}
    for name in found:
        names.setdefault(PurePosixPath(name).name, []).append(name)
    return {short: owners[0] for short, owners in names.items() if len(owners) == 1}
