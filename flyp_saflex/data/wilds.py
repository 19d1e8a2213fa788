"""iWildCam: WILDS' official five splits, and ALIA's seven-class subset of it.

The official splits come from the `wilds` package itself, which also holds the official evaluator. Nothing is downloaded and
nothing is written into the dataset's folder.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.class_prompts import load_prompts
from flyp_saflex.data.text import listed, shown
from flyp_saflex.data.wilds_archive import MIRROR
from flyp_saflex.errors import DataError
from flyp_saflex.extras import require
from flyp_saflex.records import Dataset, Role, Sample, Samples, Shift, Split

FOLDER = "iwildcam_v2.0"
COLUMNS = ("split", "filename", "y", "location_remapped", "sequence_remapped", "datetime")
NUMBERS = ("y", "location_remapped", "sequence_remapped")
DATE = "%Y-%m-%d %H:%M:%S.%f"
OFFICIAL: dict[str, tuple[Role, Shift]] = {
    "train": ("train", "id"),
    "id_val": ("select", "id"),
    "val": ("select", "ood"),
    "id_test": ("test", "id"),
    "test": ("test", "ood"),
}
# ALIA validates on rows of WILDS' id_test. Nine in ten of its locations are not among the 15 that this subset trains on,
# so by the rule "id shares the training split's domains" it is OOD here.
MINI: dict[str, tuple[Role, Shift]] = {
    "train": ("train", "id"),
    "val": ("select", "ood"),
    "test": ("test", "ood"),
    "extra": ("train", "ood"),
}
MINI_SUFFIX = "-21bc-11ea-a13a-137349068a90"


def read_iwildcam(config: DataConfig) -> Dataset:
    """Read WILDS iWildCam v2.0: the splits of its metadata, in its order, as the `wilds` package reads them.

    The package itself takes every date apart, row by row, which takes longer than all the rest; it serves the evaluation.

    `data.root` holds `iwildcam_v2.0`, or is that folder under any name, with `metadata.csv` and the images in `train/` or
    `images/` (flat or in folders, as on LILA).

    Raises:
        DataError: metadata or images are missing, or a row of the metadata cannot be used.
    """
    require("data.name = iwildcam", "wilds")  # for its evaluator, at the end
    folder = _folder(config, needed="metadata.csv")
    prompts = load_prompts(config.prompts or "iwildcam")
    table = _metadata(folder / "metadata.csv", len(prompts.class_names))
    account = Account(f"rows of {folder / 'metadata.csv'}", found=len(table))
    names = table["filename"].tolist()
    root, homes = _locate(folder, names)
    locations, sequences, labels = (table[column].tolist() for column in ("location_remapped", "sequence_remapped", "y"))

    def samples(rows: list[int]) -> Sequence[Sample]:
        columns = Samples(
            root,
            sample_ids=[names[row] for row in rows],
            labels=[labels[row] for row in rows],
            domains=[str(locations[row]) for row in rows],
            sequences=[str(sequences[row]) for row in rows],
        )
        if not homes:
            return columns
        return tuple(replace(sample, item=homes.get(sample.sample_id, root) / sample.sample_id) for sample in columns)

    splits = {
        name: Split(
            name=name,
            role=role,
            shift=shift,
            samples=samples(table.index[table["split"] == name].tolist()),
        )
        for name, (role, shift) in OFFICIAL.items()
    }
    return Dataset(
        name="iwildcam",
        root=root,
        class_names=prompts.class_names,
        splits=splits,
        templates=prompts.templates,
        evaluator=lambda samples, predictions: official_metrics(predictions, [sample.label for sample in samples]),
        notes=(account.note(sum(len(split) for split in splits.values())),),
    )


def read_iwildcam_mini(config: DataConfig) -> Dataset:
    """Read ALIA's subset of iWildCam: seven classes, 15 training locations, two test locations.

    Only the images are needed; which ones, and their labels, is in the package. The split `extra` (images of further
    locations, ALIA's upper baseline) is trained on only if `data.add_to_train` names it.

    Raises:
        DataError: no folder of images is there.
    """
    folder = _folder(config, needed="")
    prompts = load_prompts(config.prompts or "iwildcam-mini")
    rows = mini_rows()
    label_of = {y: label for label, y in enumerate(sorted({y for _, y, _, _ in rows}))}
    if len(prompts.class_names) != len(label_of):
        raise DataError(
            f"{prompts.folder / 'classes.txt'} has {len(prompts.class_names)} classes, but iwildcam-mini has {len(label_of)}; "
            "correct the file or leave data.prompts empty"
        )
    root, homes = _locate(folder, [name for name, *_ in rows])
    samples: dict[str, list[Sample]] = {name: [] for name in MINI}
    for name, y, split, location in rows:
        samples[split].append(Sample(sample_id=name, item=homes.get(name, root) / name, label=label_of[y], domain=location))
    splits = {
        name: Split(name=name, role=role, shift=shift, samples=tuple(samples[name])) for name, (role, shift) in MINI.items()
    }
    return Dataset(
        name="iwildcam-mini",
        root=root,
        class_names=prompts.class_names,
        splits=splits,
        templates=prompts.templates,
        notes=("val has rows of WILDS' id_test, 80 % of them from locations that this subset does not train on",),
    )


def mini_rows() -> list[tuple[str, int, str, str]]:
    """Return (file name, WILDS' class index y, split, location) of ALIA's subset, in ALIA's order."""
    data = gzip.decompress((resources.files("flyp_saflex.data") / "iwildcam_mini.csv.gz").read_bytes()).decode()
    lines = (line for line in data.splitlines() if not line.startswith("#"))
    return [
        (f"{row['image_id']}{MINI_SUFFIX}.jpg", int(row["y"]), row["split"], row["location"]) for row in csv.DictReader(lines)
    ]


def official_metrics(predictions: Tensor | Sequence[int], labels: Tensor | Sequence[int]) -> dict[str, float]:
    """Return what WILDS reports for iWildCam, computed by WILDS' own evaluator.

    Macro averages run over the classes that are present in `labels`, not over all 182.

    Args:
        predictions: class indices, one per image.
        labels: true class indices, as many.

    Returns:
        `accuracy`, `macro_recall` and `macro_f1`, fractions in 0..1.
    """
    from wilds.datasets.iwildcam_dataset import IWildCamDataset

    # The evaluator reads nothing of its dataset object, so it can be used without the images.
    results, _ = IWildCamDataset.eval(cast(Any, None), torch.as_tensor(predictions), torch.as_tensor(labels), None)
    return {
        "accuracy": float(results["acc_avg"]),
        "macro_recall": float(results["recall-macro_all"]),
        "macro_f1": float(results["F1-macro_all"]),
    }


def _folder(config: DataConfig, *, needed: str) -> Path:
    """Return the folder with the dataset's files."""
    help_text = (
        f"place WILDS' {FOLDER} there: metadata.csv and train/*.jpg, from its archive (11 GB; its download host is often down; a "
        f"third party's copy is {MIRROR} on the Hugging Face hub, check it with `flyp-saflex data iwildcam --verify FILE`); the "
        "images may also be LILA's iWildCam 2020 in images/, beside WILDS' metadata.csv"
    )
    if not config.root:
        raise DataError(f"data.root is empty (data.name = {config.name}); --set data.root=PATH and {help_text}")
    root = Path(config.root).expanduser().absolute()
    for folder in (root / FOLDER, root):
        if folder.is_dir() and (not needed or (folder / needed).is_file()):
            return folder
    found = f"no {needed} in it or in its {FOLDER}" if root.is_dir() else "there is no such folder"
    raise DataError(f"data.root = {config.root}: {found}; {help_text}")


def _metadata(path: Path, num_classes: int) -> pd.DataFrame:
    """Read metadata.csv and check what the `wilds` package takes on trust."""
    try:
        table = pd.read_csv(path, low_memory=False)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); copy WILDS' file again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {shown(' '.join(str(error).split()), 200)}; copy it again") from None
    found = [str(name) for name in table.columns]
    for column in COLUMNS:
        if column not in table:
            raise DataError(f"{path} row 1: there is no column '{column}' (found: {listed(found, 20)}); copy WILDS' file again")
        empty = table[column].isna()
        if empty.any():
            raise DataError(
                f"{path} row {int(empty.argmax()) + 2}: column '{column}' is empty; drop the row or copy the file again"
            )
    if not len(table):
        raise DataError(f"{path} has a header but no row; copy WILDS' file again")
    unknown = ~table["split"].isin(OFFICIAL)
    if unknown.any():
        row = int(unknown.argmax())
        raise DataError(
            f"{path} row {row + 2}: column 'split' is '{shown(str(table['split'][row]))}', expected one of {', '.join(OFFICIAL)}"
        )
    for column in NUMBERS:
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = ~(numbers.ge(0) & numbers.eq(numbers.round()))
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"{path} row {row + 2}: column '{column}' is '{shown(str(table[column][row]))}', expected a whole number from 0; "
                "drop the row or copy the file again"
            )
        table[column] = numbers.astype("int64")
    wrong = ~table["y"].between(0, num_classes - 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{path} row {row + 2}: column 'y' is {table['y'][row]}, but prompts/iwildcam has {num_classes} classes "
            f"(0..{num_classes - 1}). Drop the row or update the class file."
        )
    _check_as_wilds(path, table)
    return table


def _check_as_wilds(path: Path, table: pd.DataFrame) -> None:
    """Refuse what the `wilds` package refuses: numbers with gaps, and dates that are none."""
    for column in NUMBERS:
        found = table[column].sort_values().unique()
        missing = (found != range(len(found))).argmax() if found[-1] >= len(found) else None
        if missing is not None:
            raise DataError(
                f"{path}: column '{column}' runs to {found[-1]}, but has no {missing}; the wilds package refuses "
                "numbers with gaps; copy WILDS' own file again"
            )
    wrong = pd.to_datetime(table["datetime"], format=DATE, errors="coerce").isna()
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{path} row {row + 2}: column 'datetime' is '{shown(str(table['datetime'][row]))}', expected a time such as "
            "2013-06-01 15:40:00.000; the wilds package refuses it; drop the row or copy WILDS' own file again"
        )


def _locate(folder: Path, names: Sequence[str]) -> tuple[Path, dict[str, Path]]:
    """Return the folder of the images, and the subfolder of every name that lies in one."""
    wanted = frozenset(names)
    for base in (folder / "train", folder / "images", folder):
        if base.is_dir():
            found = {current: wanted.intersection(files) for current, _, files in os.walk(base)}
            if any(found.values()):
                return base, {name: Path(home) for home, here in found.items() if home != str(base) for name in here}
    return folder / "train", {}
