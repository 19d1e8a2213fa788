"""ObjectNet's images of the 113 classes that ImageNet has, as its download is unpacked: `images/` and `mappings/`.

ObjectNet (Barbu et al., NeurIPS 2019) is for testing only. The download's own mapping files say which of ImageNet's classes a
folder stands for; where several do, the highest of their scores counts, as in the evaluations of CLIP and WiSE-FT. Every image
has a red border, which is to be cut off before a model sees it; 2 pixels are cut off, as there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flyp_saflex.clip.imagenet import imagenet_classes
from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.class_prompts import load_prompts
from flyp_saflex.data.folder import existing_root
from flyp_saflex.data.listing import Folder
from flyp_saflex.data.text import listed, spelt
from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import stored_size
from flyp_saflex.records import Dataset, Sample, Split

BORDER_PX = 2
FOLDERS = "folder_to_objectnet_label.json"
TO_IMAGENET = "objectnet_to_imagenet_1k.json"
TO_PLACE = "pytorch_to_imagenet_2012_id.json"
TEXTS = "imagenet_to_label_2012_v2"


def read_objectnet(config: DataConfig) -> Dataset:
    """Read `root/images/<class>/*` by the files of `root/mappings`; every image is of the split `test`.

    Raises:
        DataError: a mapping file is missing or of another form, or a class has no folder.
    """
    root = existing_root(config, "the unpacked ObjectNet: the folders images and mappings")
    groups = imagenet_of_folder(root / "mappings")
    images = Folder.at(root / "images")
    if missing := [name for name in groups if name not in images.folders]:
        raise DataError(
            f"data.root = {config.root}: {len(missing)} of ObjectNet's {len(groups)} classes that ImageNet has are no folder of "
            f"images/ ({listed(missing, 3)}); unpack every part of the download, or correct data.root"
        )
    chosen = sorted(index for group in groups.values() for index in group)
    names, label_of = list(imagenet_classes().values()), {index: label for label, index in enumerate(chosen)}
    account = Account(f"files in {images}")
    samples = []
    for name, group in groups.items():
        for path in images.folders[name].every_image(account):
            sample_id = spelt(Path(path).relative_to(images.paths[0]).as_posix())
            samples.append(Sample(sample_id=sample_id, item=path, label=label_of[group[0]], box=_within_border(path)))
    for name, folder in images.folders.items():
        if name not in groups:
            folder.leave_out(account, "images of classes that ImageNet has not")
    merged = tuple(tuple(label_of[index] for index in group) for group in groups.values())
    split = Split(name="test", role="test", shift="ood", samples=tuple(samples), merged=merged)
    return Dataset(
        name="objectnet",
        root=images.paths[0],
        class_names=tuple(names[index] for index in chosen),
        splits={"test": split},
        templates=load_prompts("default").templates,
        notes=(account.note(len(samples)),),
    )


def imagenet_of_folder(mappings: Path) -> dict[str, tuple[int, ...]]:
    """Return the indices of ImageNet's classes that a folder of images stands for, by folder; folders without are left out.

    Args:
        mappings: folder of the four mapping files.

    Raises:
        DataError: a file is missing, of another form, or names a class that another does not know.
    """
    folder_to_label, to_imagenet, to_place = (_mapping(mappings / name) for name in (FOLDERS, TO_IMAGENET, TO_PLACE))
    lines = _text(mappings / TEXTS).splitlines()
    folder_of = {label: name for name, label in folder_to_label.items()}
    try:
        class_at = {int(place): int(index) for index, place in to_place.items()}
        index_of = {line.strip(): class_at[place] for place, line in enumerate(lines) if line.strip()}
        found = {
            folder_of[label]: tuple(sorted(index_of[text.strip()] for text in str(texts).split(";")))
            for label, texts in to_imagenet.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{mappings}: the files do not fit each other ({error} is in one and not in the next); copy the folder from "
            "ObjectNet's download again"
        ) from None
    classes = [index for group in found.values() for index in group]
    if len(set(classes)) < len(classes) or not set(classes) <= set(range(1000)):
        raise DataError(f"{mappings}: a class of ImageNet belongs to two folders; copy it from ObjectNet's download again")
    return found


def _mapping(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path}: it is no JSON ({error}); copy it from ObjectNet's download again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: found a {type(found).__name__}, expected an object; copy it from ObjectNet's download again")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; data.root is to hold the folders images and mappings of ObjectNet") from None


def _within_border(path: Path) -> tuple[float, float, float, float] | None:
    """Return the box inside of the red border; None where the file cannot be read, which decoding then tells."""
    try:
        width, height = stored_size(path)
    except DataError:
        return None
    return (BORDER_PX, BORDER_PX, width - 2 * BORDER_PX, height - 2 * BORDER_PX)
