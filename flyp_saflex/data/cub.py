"""CUB-200-2011 with ALIA's held-out images.

`train` is all official training images but the last five of each class in file order, `val` is those five (ALIA's
`extra`, used here to select), `test` is the official test set.
"""

from __future__ import annotations

from pathlib import Path

from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.class_prompts import load_prompts
from flyp_saflex.data.folder import existing_root
from flyp_saflex.data.text import read_text, shown
from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset, Sample, Split

HELD_OUT = 5
FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def read_cub(config: DataConfig) -> Dataset:
    """Read `CUB_200_2011` (`data.root` is that folder or the one that holds it).

    Raises:
        DataError: a metadata file is missing or a line of it cannot be used.
    """
    root = existing_root(config, f"CUB_200_2011 as unpacked from its archive ({', '.join(FILES)}, bounding_boxes.txt, images/)")
    folder = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"data.root = {config.root}: {', '.join(missing)} not found in {folder}; expected CUB-200-2011 as unpacked from "
            f"CUB_200_2011.tgz: {', '.join(FILES)}, bounding_boxes.txt and images/"
        )
    keys = list(_columns(folder / "classes.txt", 1).values())
    prompts = load_prompts(config.prompts or "cub")
    if len(prompts.class_names) != len(keys):
        raise DataError(
            f"{folder / 'classes.txt'} has {len(keys)} classes, but {prompts.folder / 'classes.txt'} has "
            f"{len(prompts.class_names)}; set data.prompts to a folder that fits"
        )
    paths = _columns(folder / "images.txt", 1)
    labels = _columns(folder / "image_class_labels.txt", 1)
    is_train = _columns(folder / "train_test_split.txt", 1)
    boxes = _boxes(folder / "bounding_boxes.txt", needed=config.box_crop)

    train: dict[int, list[Sample]] = {}
    test: list[Sample] = []
    for image, (path,) in paths.items():
        label = _index(folder / "image_class_labels.txt", image, labels, len(keys))
        flag = is_train.get(image, ("none",))[0]
        if flag not in ("0", "1"):
            raise DataError(
                f"{folder / 'train_test_split.txt'}: image {image} has '{shown(flag)}', expected 0 or 1; unpack the archive again"
            )
        sample = Sample(sample_id=path, item=folder / "images" / path, label=label, box=boxes.get(image))
        if flag == "1":
            train.setdefault(label, []).append(sample)
        else:
            test.append(sample)
    held = {sample.sample_id for samples in train.values() for sample in samples[-HELD_OUT:]}
    in_order = [sample for samples in train.values() for sample in samples]
    splits = (
        Split(name="train", role="train", shift="id", samples=tuple(s for s in in_order if s.sample_id not in held)),
        Split(name="val", role="select", shift="id", samples=tuple(s for s in in_order if s.sample_id in held)),
        Split(name="test", role="test", shift="id", samples=tuple(test)),
    )
    return Dataset(
        name="cub",
        root=folder / "images",
        class_names=prompts.class_names,
        splits={split.name: split for split in splits},
        templates=prompts.templates,
        notes=(Account(f"rows of {folder / 'images.txt'}", found=len(paths)).note(sum(len(split) for split in splits)),),
    )


def _columns(path: Path, count: int) -> dict[str, tuple[str, ...]]:
    """Read `id value ...` lines into values by id.

    Raises:
        DataError: a line with another number of values, or an id twice.
    """
    rows: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        identity, *values = line.split() or [""]
        if len(values) != count:
            raise DataError(
                f"{path} line {number}: '{shown(line)}' has {len(values)} values after the id, expected {count}; unpack it again"
            )
        if identity in rows:
            raise DataError(f"{path} line {number}: the id {identity} is there twice; unpack the archive again")
        rows[identity] = tuple(values)
    return rows


def _index(path: Path, image: str, labels: dict[str, tuple[str, ...]], num_classes: int) -> int:
    text = labels.get(image, ("none",))[0]
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= num_classes:
        raise DataError(
            f"{path}: image {image} has the class '{shown(text)}', expected 1..{num_classes}; unpack the archive again"
        )
    return int(text) - 1


def _boxes(path: Path, *, needed: bool) -> dict[str, tuple[float, float, float, float]]:
    if not path.is_file():
        if needed:
            raise DataError(f"data.box_crop is true, but {path} is missing; unpack the archive again or set data.box_crop=false")
        return {}
    boxes = {}
    for image, values in _columns(path, 4).items():
        try:
            left, top, width, height = (float(value) for value in values)
        except ValueError:
            raise DataError(
                f"{path}: image {image} has the box {shown(' '.join(values))}, expected four numbers; unpack the archive again"
            ) from None
        boxes[image] = (left, top, width, height)
    return boxes
