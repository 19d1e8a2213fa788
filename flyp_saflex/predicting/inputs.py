"""Images to predict: folders, tables and single files as the user names them, unlabelled or with labels as text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.class_names import readable, readable_names
from flyp_saflex.data.listing import Folder
from flyp_saflex.data.table import DELIMITERS, LONGEST_INDEX, load_columns
from flyp_saflex.data.text import listed, nfc, shown
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Sample

TABLES = (*DELIMITERS, ".parquet", ".pq")


@dataclass
class Inputs:
    """Images in the order given.

    Attributes:
        names: path of every image as the user writes it: a table's cell, or FOLDER/...; one may be there twice.
        samples: the same images; their class index is unknown and 0.
        labels: label of every image as text: the cell of a table, the folder of a file; empty if labels were not asked for.
        notes: what a person should know.
    """

    names: list[str]
    samples: list[Sample]
    labels: list[str]
    notes: list[str]

    def label_indices(self, class_names: Sequence[str]) -> list[int]:
        """Return the class index of every image from its label.

        A label is a class name (`polar bear`), a folder name that reads like one (`polar-bear`, `003.Sooty_Albatross`), or
        the index of a class.

        Args:
            class_names: of the run.

        Raises:
            DataError: a label is no class of the run.
        """
        texts = list(dict.fromkeys(self.labels))
        index = {nfc(name).casefold(): k for k, name in enumerate(class_names)}
        found = {}
        for text, words in zip(texts, readable_names(texts), strict=True):
            keys = (text, readable(text), words)
            k = next((index[key] for key in (nfc(key).casefold() for key in keys) if key in index), None)
            if k is None and text.isdecimal() and len(text) <= LONGEST_INDEX and int(text) < len(class_names):
                k = int(text)
            if k is None:
                raise DataError(
                    f"image {self.names[self.labels.index(text)]} has the label '{shown(text)}', which is no class of the run"
                    f"{nearest(text, class_names)} (classes: {listed(class_names)}); correct the label, or leave --issues out"
                )
            found[text] = k
        return [found[text] for text in self.labels]


def collect(arguments: Sequence[Path], data: DataConfig, *, labelled: bool = False, limit: int | None = None) -> Inputs:
    """Return the images that arguments name: all of a folder, those that a table lists, or files.

    Args:
        arguments: paths.
        data: names of the columns of tables: `path_column`, and `label_column` with `labelled`.
        labelled: whether every image has a label: in the column of a table, else by the name of its folder.
        limit: the first images only.

    Raises:
        DataError: nothing is there, a table cannot be read, or there is no image.
    """
    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit}: expected at least 1 image")
    inputs = Inputs([], [], [], [])
    for path in arguments:
        if path.is_dir():
            _add_folder(inputs, path, labelled)
        elif path.suffix.lower() in TABLES:
            _add_table(inputs, path, data, labelled)
        elif path.exists():
            _add(inputs, str(path), path, path.absolute().parent.name if labelled else None)
        else:
            raise DataError(f"{path}: there is no such folder, table or image; give a folder, a .csv, .tsv or .parquet, or files")
    if not inputs.samples:
        raise DataError(f"{', '.join(map(str, arguments))}: found no image, expected at least one; give a folder with images")
    if limit is not None and limit < len(inputs.samples):
        inputs.notes.append(f"--limit {limit}: the first {limit} of {len(inputs.samples)} images")
        del inputs.names[limit:], inputs.samples[limit:], inputs.labels[limit:]
    return inputs


def _add(inputs: Inputs, name: str, path: Path, label: str | None) -> None:
    name = os.fsencode(name).decode("utf-8", "backslashreplace")  # a name of other bytes can be told, and written to a table
    inputs.names.append(name)
    inputs.samples.append(Sample(sample_id=name, item=path, label=0))
    if label is not None:
        inputs.labels.append(label)


def _add_folder(inputs: Inputs, root: Path, labelled: bool) -> None:
    account = Account(f"files of {root}")
    for path in Folder.at(root).every_image(account):
        _add(inputs, str(path), path, path.parent.name if labelled else None)
    if account.left_out:
        inputs.notes.append(f"{root}: {account.reasons()} left out")


def _add_table(inputs: Inputs, file: Path, data: DataConfig, labelled: bool) -> None:
    if not file.is_file():
        raise DataError(f"{file}: there is no such table; check the path")
    columns = [nfc(data.path_column), *([nfc(data.label_column)] if labelled else [])]
    table = load_columns(file, columns)
    inputs.notes += table.notes
    inputs.notes += [f"{file}: {count} {reason} left out" for reason, count in table.left_out.items()]
    for index, cell in enumerate(table.columns[columns[0]]):
        if not cell:
            raise DataError(f"{table.at(index, columns[0])} is empty, expected the path of an image; fill it or drop the row")
        label = table.columns[columns[1]][index] if labelled else None
        if label == "":
            raise DataError(f"{table.at(index, columns[1])} is empty, expected a class; fill it or leave --issues out")
        _add(inputs, cell, file.absolute().parent / cell, label)
