"""Captions of training images, and samples of images that are balanced over classes."""

from __future__ import annotations

import csv
import posixpath
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """A caption and the `sample_id` of its image; the empty string if that is unknown."""

    sample_id: str
    text: str


def draw(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Draw at most `count` samples, balanced over classes; the draw depends on `seed` and not on the order of `samples`."""
    rng = random.Random(seed)
    classes: dict[int, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: (sample.label, sample.sample_id)):
        classes[sample.label].append(sample)
    for group in classes.values():
        rng.shuffle(group)
    order = list(classes.values())
    rng.shuffle(order)  # so that the last, incomplete round prefers no class
    longest = max(map(len, order), default=0)
    return [group[turn] for turn in range(longest) for group in order if turn < len(group)][:count]


def read_captions(path: Path, dataset: Dataset) -> list[Caption]:
    """Read a CSV with the columns `path` (relative to the dataset's root) and `caption`, or with `caption` alone.

    Captions of images outside of the training split are left out and counted.

    Raises:
        DataError: an unreadable file, or a wrong line or cell; the message names file, line and column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
            line = reader.line_num
    except OSError as error:
        raise DataError(f"prompts.captions = '{path}' cannot be read: {error.strerror}; correct the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; correct the line (quotes come in pairs)") from None
    if header.count("caption") != 1 or header.count("path") > 1:
        raise DataError(
            f"{path} line 1 has the columns {', '.join(header) or 'none'}; expected path and caption, or caption alone"
        )
    train = {sample.sample_id for sample in dataset.train.samples}
    captions: list[Caption] = []
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{path} line {line} has {len(row)} cells, expected {len(header)} ({', '.join(header)}); "
                "put a caption with commas into double quotes"
            )
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        for column in ("caption", "path"):
            if column in cells and not cells[column]:
                raise DataError(f"{path} line {line}, column '{column}' is empty; fill the cell or remove the line")
        name = posixpath.normpath(cells["path"].replace("\\", "/")) if "path" in cells else ""
        if name and name not in train and not (dataset.root / name).is_file():
            raise DataError(
                f"{path} line {line}, column 'path': there is no image '{cells['path']}' in {dataset.root}; correct or remove it"
            )
        captions.append(Caption(sample_id=name, text=" ".join(cells["caption"].split())))
    used = [caption for caption in captions if not caption.sample_id or caption.sample_id in train]
    if len(used) < len(captions):
        print(f"{len(captions) - len(used)} of {len(captions)} captions in {path} are of no training image and are left out")
    if not used:
        raise DataError(f"{path} has no caption of a training image; add lines below the header")
    return used


def draw_captions(captions: Sequence[Caption], dataset: Dataset, count: int, seed: int) -> list[Caption]:
    """Draw at most `count` captions: balanced over classes where the images are known, otherwise at random."""
    if not captions[0].sample_id:
        chosen = random.Random(seed).sample(range(len(captions)), min(count, len(captions)))
        return [captions[number] for number in sorted(chosen)]
    texts = {caption.sample_id: caption for caption in captions}
    known = [sample for sample in dataset.train.samples if sample.sample_id in texts]
    return [texts[sample.sample_id] for sample in draw(known, count, seed)]
