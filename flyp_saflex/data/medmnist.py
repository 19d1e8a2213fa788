"""Reader of MedMNIST's npz files (`data.name = "medmnist"`), checked against medmnist's own table.

A file holds `{train,val,test}_{images,labels}`: uint8 images [N, S, S] or [N, S, S, 3], labels [N] or [N, 1].

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flyp_saflex.config import DataConfig
from flyp_saflex.data.duplicates import duplicate_notes
from flyp_saflex.data.published import Problems, few_notes
from flyp_saflex.data.splitting import split_by_name
from flyp_saflex.data.text import listed, shown
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Dataset, Sample
from flyp_saflex.storage.files import hash_stream

PARTS = ("train", "val", "test")
KEYS = tuple(f"{part}_{kind}" for part in PARTS for kind in ("images", "labels"))
MULTI_LABEL = "multi-label"
"""Class column of a set whose images have several labels."""


@dataclass(frozen=True)
class Published:
    """One set of medmnist's table: md5 of its file, channels, images per split, class names."""

    name: str
    md5: str
    channels: int
    sizes: tuple[int, int, int]
    class_names: tuple[str, ...]


def published_sets() -> dict[str, Published]:
    """Return medmnist's table by name of the set (`breast`)."""
    text = (resources.files("flyp_saflex.assets") / "medmnist.tsv").read_text(encoding="utf-8")
    sets = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, md5, channels, train, val, test, classes = line.split("\t")
            sets[name] = Published(name, md5, int(channels), (int(train), int(val), int(test)), tuple(classes.split("|")))
    return sets


def read_medmnist(config: DataConfig) -> Dataset:
    """Read and check the npz file of a set.

    Raises:
        DataError: no file, no such set, several labels per image, or another content than the published one.
    """
    path, known = _file(config)
    if known.class_names == (MULTI_LABEL,):
        raise DataError(f"data.card = {known.name}: its images have several labels each, expected a set with one label per image")
    problems = Problems(config.accept_altered)
    if (digest := _md5(path)) != known.md5:
        problems.found(f"{path} has the md5 {digest}, expected {known.md5}: other bytes than medmnist's '{known.name}'")
    arrays = _arrays(path, problems)
    parts: list[str] = []
    samples: list[Sample] = []
    rows, start = [], 0
    for part, size in zip(PARTS, known.sizes, strict=True):
        images = _images(path, part, arrays[f"{part}_images"], known.channels)
        labels = _labels(path, part, arrays[f"{part}_labels"], len(images), known)
        if len(images) != size:
            problems.found(f"{path}: {part} has {len(images):,} images, expected {size:,}")
        parts += [part] * len(images)
        samples += _samples(part, images, labels, start)
        rows.append(images)
        start += len(images)
    if len({images.shape[1:] for images in rows}) > 1:
        shapes = listed([str(images.shape[1:]) for images in rows])
        raise DataError(f"{path}: images of train, val and test have the shapes {shapes}, expected one; get the published file")
    everything = np.concatenate(rows)
    splits = split_by_name(parts, samples)
    notes = [*problems.notes, *few_notes(splits, known.class_names)]
    notes += duplicate_notes(splits, lambda sample: everything[sample.item].tobytes(), "images")  # type: ignore[index]
    return Dataset(
        name=f"medmnist-{known.name}",
        root=path.parent,
        class_names=known.class_names,
        splits=splits,
        templates=("a medical image of {}.",),
        notes=tuple(notes),
        rows=everything,
    )


def _file(config: DataConfig) -> tuple[Path, Published]:
    sets, root = published_sets(), Path(config.root)
    name = (config.card or root.stem).lower().removesuffix("mnist")
    if name not in sets:
        raise DataError(
            f"data.card = '{shown(config.card)}': expected one of medmnist's sets ({', '.join(sets)}){nearest(name, sets)}"
        )
    path = root / f"{name}mnist.npz" if root.is_dir() else root
    if not config.root or not path.is_file():
        raise DataError(
            f"data.root = '{shown(config.root)}': there is no file '{name}mnist.npz'; get it from medmnist.com and set "
            "data.root to its folder or to the file"
        )
    return path, sets[name]


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hash_stream(file, hashlib.md5(usedforsecurity=False))


def _arrays(path: Path, problems: Problems) -> dict[str, NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = set(stored.files)
            arrays = {key: stored[key] for key in KEYS if key in found}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as an npz file of arrays ({shown(str(error))}); get the published file") from None
    if missing := [key for key in KEYS if key not in found]:
        raise DataError(f"{path} has no {listed(missing)} (it has: {listed(sorted(found))}); get the published file")
    if extra := sorted(found - set(KEYS)):
        problems.found(f"{path} has arrays that medmnist's file has not: {listed(extra)}")
    return arrays


def _images(path: Path, part: str, images: NDArray[np.generic], channels: int) -> NDArray[np.uint8]:
    """Return uint8 images [N, S, S] or [N, S, S, 3]."""
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    expected = (3,) if channels == 1 else (4,)
    square = images.ndim in (3, 4) and images.shape[1] == images.shape[2] and images.shape[3:] in ((), (3,))
    if images.dtype != np.uint8 or images.ndim not in expected or not square or not len(images):
        shape = "[N, S, S]" if channels == 1 else "[N, S, S, 3]"
        raise DataError(
            f"{path}: {part}_images is {images.dtype} of the shape {list(images.shape)}, expected uint8 of the shape {shape}; "
            "get the published file"
        )
    return images  # type: ignore[return-value]


def _labels(path: Path, part: str, labels: NDArray[np.generic], num_images: int, known: Published) -> list[int]:
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.shape != (num_images,) or not np.issubdtype(flat.dtype, np.integer):
        raise DataError(
            f"{path}: {part}_labels is {labels.dtype} of the shape {list(labels.shape)}, expected whole numbers of the shape "
            f"[{num_images}] or [{num_images}, 1]; get the published file"
        )
    found = [int(label) for label in flat.tolist()]
    if odd := sorted({label for label in found if not 0 <= label < len(known.class_names)}):
        raise DataError(
            f"{path}: {part}_labels has the label {odd[0]}, but '{known.name}' has the classes 0..{len(known.class_names) - 1}; "
            "get the published file"
        )
    return found


def _samples(part: str, images: NDArray[np.uint8], labels: list[int], start: int) -> list[Sample]:
    """Return samples whose ids depend on their pixels alone: an image more or less renames no other."""
    seen: Counter[str] = Counter()
    samples = []
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).hexdigest()
        seen[digest] += 1
        name = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        samples.append(Sample(sample_id=f"{part}/{name}", item=start + place, label=label))
    return samples
