"""WILDS beyond iWildCam: Waterbirds, FMoW and Camelyon17, with their official splits and evaluators.

One reader; a table says what differs. Nothing is downloaded and nothing is written into the dataset's folder.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.class_names import class_list
from flyp_saflex.data.folder import existing_root
from flyp_saflex.data.text import shown
from flyp_saflex.errors import DataError
from flyp_saflex.extras import require
from flyp_saflex.records import Dataset, Role, Sample, Shift, Split


@dataclass(frozen=True, kw_only=True)
class WildsSet:
    """Reader of one of WILDS' image datasets.

    Attributes:
        name: value of `data.name`, which is WILDS' name.
        version: of the release that the `wilds` package expects.
        files: metadata that the package reads.
        splits: role and shift by official name.
        groups: metadata fields that make a sample's domain, so that worst-group accuracy is over them.
        classes: the names of the classes by index.
        file_of: path of an image below the dataset's folder.
        notes: what a person should know.
    """

    name: str
    version: str
    files: tuple[str, ...]
    splits: Mapping[str, tuple[Role, Shift]]
    groups: tuple[str, ...]
    classes: Callable[[], Sequence[str]]
    file_of: Callable[[Any, int], str]
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Name of the dataset's folder as WILDS unpacks it."""
        return f"{self.name}_v{self.version}"

    def __call__(self, config: DataConfig) -> Dataset:
        """Read the dataset through the `wilds` package.

        Raises:
            DataError: metadata or images are missing, or the package refuses the metadata.
        """
        require(f"data.name = {self.name}", "wilds")
        root = existing_root(config, f"{self.folder} as WILDS unpacks it ({', '.join(self.files)} and the images)")
        folder = root / self.folder if (root / self.folder).is_dir() else root
        if missing := [name for name in self.files if not (folder / name).is_file()]:
            raise DataError(
                f"data.root = {config.root}: no {' and no '.join(missing)} in {folder}; expected WILDS' {self.folder} as "
                "unpacked from its archive, or the folder that holds it"
            )
        official = self._open(folder)
        names = list(self.classes())
        keys, prompts = class_list(replace(config, prompts=config.prompts or self.name), names)
        label_of = [keys.index(name) for name in names]
        labels, domains = official.y_array.tolist(), self._domains(official)
        rows: dict[str, int] = {}
        splits = {}
        for name, (role, shift) in self.splits.items():
            indices = official.get_subset(name).indices.tolist()
            files = [self.file_of(official, index) for index in indices]
            rows.update(zip(files, indices, strict=True))
            splits[name] = Split(
                name=name,
                role=role,
                shift=shift,
                samples=tuple(
                    Sample(sample_id=file, item=folder / file, label=label_of[labels[index]], domain=domains[index])
                    for file, index in zip(files, indices, strict=True)
                ),
            )
        account = Account(f"rows of {folder / self.files[0]}", found=len(official.metadata_array))
        used = sum(len(split) for split in splits.values())
        account.left_out["rows in no official split"] += len(labels) - used
        account.left_out = +account.left_out
        return Dataset(
            name=self.name,
            root=folder,
            class_names=prompts.class_names,
            splits=splits,
            templates=prompts.templates,
            notes=(*self.notes, account.note(used)),
            evaluator=Evaluator(official, rows, label_of),
        )

    def _domains(self, official: Any) -> list[str]:
        """Return the group of every row in words, for example `background: water, y: landbird`."""
        columns = []
        for field in self.groups:
            values = official.metadata_array[:, official.metadata_fields.index(field)].tolist()
            words = (official.metadata_map or {}).get(field)
            columns.append([f"{field}: {str(words[value]).strip() if words is not None else value}" for value in values])
        return [", ".join(parts) for parts in zip(*columns, strict=True)]

    def _open(self, folder: Path) -> Any:
        """Open the folder with the `wilds` package, through links to its metadata in a temporary folder."""
        from wilds import get_dataset

        with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
            shadow = Path(temporary) / self.folder
            shadow.mkdir()
            for name in self.files:
                os.symlink(folder / name, shadow / name)
            (shadow / f"RELEASE_v{self.version}.txt").touch()
            try:
                warnings.simplefilter("ignore")  # remarks on groups that have no image
                return get_dataset(self.name, root_dir=temporary, download=False, version=self.version)
            except (AssertionError, AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
                reason = shown(" ".join(str(error).split()), 200) or type(error).__name__
                raise DataError(
                    f"{folder / self.files[0]}: the wilds package refuses it ({type(error).__name__}: {reason}); copy WILDS' own "
                    "files again"
                ) from None


@contextmanager
def group_means() -> Iterator[None]:
    """Give WILDS' evaluator the one function that it wants of torch_scatter, where that package is not installed.

    torch_scatter has to be compiled for each version of torch, and wilds does not require it.
    """
    if find_spec("torch_scatter") is not None:
        yield
        return
    stand_in = ModuleType("torch_scatter")
    stand_in.scatter = _scatter  # type: ignore[attr-defined]
    sys.modules["torch_scatter"] = stand_in
    try:
        yield
    finally:
        del sys.modules["torch_scatter"]


def _scatter(*, src: Tensor, index: Tensor, dim_size: int, reduce: str) -> Tensor:
    """Return the mean of the values of every group; 0 for a group without values."""
    assert reduce == "mean", f"torch_scatter.scatter with reduce = {reduce}"
    return torch.zeros(dim_size, dtype=src.dtype).scatter_reduce(0, index, src, reduce="mean", include_self=False)


class Evaluator:
    """WILDS' official evaluator of predictions on samples that we read.

    Args:
        official: dataset of the `wilds` package.
        rows: its row of every sample id.
        label_of: our class index of every official one.
    """

    def __init__(self, official: Any, rows: Mapping[str, int], label_of: Sequence[int]) -> None:
        self._official, self._rows = official, rows
        self._official_label = {ours: theirs for theirs, ours in enumerate(label_of)}

    def __call__(self, samples: Sequence[Sample], predictions_N: Sequence[int]) -> dict[str, float]:
        """Return the official summary numbers, fractions in 0..1, without the ones of single groups.

        Args:
            samples: of one split.
            predictions_N: predicted classes, in our order of classes.
        """
        index_N = torch.tensor([self._rows[sample.sample_id] for sample in samples])
        found_N = torch.tensor([self._official_label[int(label)] for label in predictions_N])
        with group_means():
            results, _ = self._official.eval(found_N, self._official.y_array[index_N], self._official.metadata_array[index_N])
        numbers = {name: float(value) for name, value in results.items() if ":" not in name}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _fmow_classes() -> list[str]:
    from wilds.datasets.fmow_dataset import categories

    return list(categories)


def _listed_file(official: Any, index: int) -> str:
    return str(official._input_array[index])


def _fmow_file(official: Any, index: int) -> str:
    return f"images/rgb_img_{official.full_idxs[index]}.png"


SHIFTED: dict[str, tuple[Role, Shift]] = {
    "train": ("train", "id"),
    "id_val": ("select", "id"),
    "val": ("select", "ood"),
    "id_test": ("test", "id"),
    "test": ("test", "ood"),
}
WATERBIRDS = WildsSet(
    name="waterbirds",
    version="1.0",
    files=("metadata.csv",),
    splits={"train": ("train", "id"), "val": ("select", "id"), "test": ("test", "id")},
    groups=("background", "y"),
    classes=lambda: ("landbird", "waterbird"),
    file_of=_listed_file,
    notes=("worst group: of background and class together; adj_acc_avg weighs the groups as the training split has them",),
)
FMOW = WildsSet(
    name="fmow",
    version="1.1",
    files=("rgb_metadata.csv", "country_code_mapping.csv"),
    splits=SHIFTED,
    groups=("region",),
    classes=_fmow_classes,
    file_of=_fmow_file,
    notes=("WILDS' acc_worst_region leaves the region 'Other' out, our worst-group accuracy counts it",),
)
CAMELYON17 = WildsSet(
    name="camelyon17",
    version="1.0",
    files=("metadata.csv",),
    splits={name: use for name, use in SHIFTED.items() if name != "id_test"},
    groups=("slide",),
    classes=lambda: ("normal tissue", "tumor tissue"),
    file_of=_listed_file,
    notes=("domains are slides, as in WILDS' evaluator; every split of role test or shift ood is a hospital of its own",),
)
