"""Import of ALIA's released edits as an entry of the augment cache.

    <prompt>/strength-<x>_guidance-<y>/<class>/<row>-<k>.png

`row` counts the images of ALIA's training list from 0 (arXiv 2305.16289): for iWildCam the rows of its `train_subset.csv`, for
CUB all but the last five training images of each class in the order of `images.txt`. Our readers keep these orders, so `row`
is a position in `dataset.train.samples` of `iwildcam-mini` and `cub`, read without `data.shots`, `data.add_to_train` or a limit.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import read_image
from flyp_saflex.records import Dataset, Sample
from flyp_saflex.storage.augment_cache import AugmentCache

FILE = re.compile(r"(\d+)-(\d+)\.(png|jpg)")
SETTING = re.compile(r"([a-z_]+)-(\d+(?:\.\d+)?)")
LAYOUT = "<prompt>/strength-<x>_guidance-<y>/<class>/<row>-<k>.png"


@dataclass(frozen=True, slots=True)
class _Found:
    """One file of the released folder."""

    path: Path
    sample: Sample
    prompt: str
    settings: dict[str, float]
    k: int


class _Verbatim:
    """An image file that is copied byte for byte, with the `save` method of an image."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        fp.write(self.data)


def import_alia(folder: str | Path, dataset: Dataset, cache_root: str | Path, *, key: str = "alia") -> AugmentCache:
    """Copy ALIA's released edits into `<cache_root>/<dataset.name>/<key>`; a second call continues an interrupted first one.

    Args:
        folder: the released folder; it holds one folder per prompt.
        dataset: the dataset of the sources; the module says how rows are counted.
        cache_root: the recipe's `cache.root`.
        key: name of the cache entry.

    Raises:
        DataError: another layout, rows that are not numbers of this training split, an unreadable file, or a full disk.
    """
    folder = Path(folder).expanduser()
    found = sorted(_files(folder, dataset), key=lambda file: str(file.path))
    if not found:
        raise DataError(f"{folder} holds no edits: expected {LAYOUT}; give the folder that holds the prompts' folders")
    _check_classes(found, dataset)
    cache = AugmentCache.create(Path(cache_root).expanduser() / dataset.name / key, dataset.name)
    for file in tqdm(found, unit="edit", desc="importing", disable=None):
        settings = "_".join(f"{name}-{value:g}" for name, value in file.settings.items())
        name = AugmentCache.file_name(file.sample.sample_id, f"{file.prompt}\n{settings}", file.k, file.path.suffix)
        if name in cache:
            continue
        read_image(file.path)
        data = file.path.read_bytes()
        row = {
            "file_name": name,
            "source_id": file.sample.sample_id,
            "label": file.sample.label,
            "instruction": file.prompt,
            "k": file.k,
            "kind": "alia",
            **file.settings,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        cache.append(_Verbatim(data), row)
    cache.finish()
    return cache


def _files(folder: Path, dataset: Dataset) -> Iterator[_Found]:
    samples = dataset.train.samples
    for path in folder.glob("*/*/*/*"):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            continue
        prompt, settings, _, name = path.relative_to(folder).parts
        match = FILE.fullmatch(name)
        if match is None:
            raise DataError(f"{path}: expected {LAYOUT}; rename the file or take it out of the folder")
        row, k = int(match[1]), int(match[2])
        if row >= len(samples):
            raise DataError(
                f"{path}: row {row}, but the training split of '{dataset.name}' has {len(samples)} images; use ALIA's own "
                "training list (data.name = iwildcam-mini or cub, without data.shots)"
            )
        numbers = {found[1]: float(found[2]) for found in SETTING.finditer(settings.replace("_", " "))}
        yield _Found(path, samples[row], prompt.replace("_", " "), numbers, k)


def _check_classes(found: list[_Found], dataset: Dataset) -> None:
    """Check that every class folder holds edits of one class, and of the class with its name, if any.

    ALIA may spell a class differently from our class list. A training list in another order would mix the classes.
    """
    label_of = {_plain(name): label for label, name in enumerate(dataset.class_names)}
    labels: dict[str, set[int]] = defaultdict(set)
    for file in found:
        labels[_plain(file.path.parent.name)].add(file.sample.label)
        labels_here = labels[_plain(file.path.parent.name)]
        named = label_of.get(_plain(file.path.parent.name))
        if len(labels_here) > 1 or (named is not None and labels_here != {named}):
            raise DataError(
                f"{file.path}: row {int(file.path.name.split('-')[0])} of the training split of '{dataset.name}' is "
                f"'{dataset.class_names[file.sample.label]}', but other edits in a folder '{file.path.parent.name}', or the "
                "folder's name, are of another class: the rows were counted in another training list"
            )


def _plain(name: str) -> str:
    return " ".join(re.sub(r"^\d+\.", "", name).replace("_", " ").replace("-", " ").casefold().split())
