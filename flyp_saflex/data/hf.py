"""Hugging Face datasets: a hub id, or a local folder of Parquet, Arrow, WebDataset tars or class folders.

The `datasets` library finds splits and columns; nothing is exported, and images are decoded by our own reader. An image is
identified by split and row.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.class_names import class_list
from flyp_saflex.data.parts import POOL, Part, domain_parts, names_domains, pooled_splits
from flyp_saflex.data.splitting import canonical_split, hold_out, in_reporting_order, split_by_name, split_notes
from flyp_saflex.data.text import listed, nfc, shown
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.extras import require
from flyp_saflex.records import Dataset, Sample, Split, StoredImage

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
NO_LABEL = -1
"""Class index of a row without a label, as the hub writes it into test splits."""
LABEL_TYPES = ("int", "uint", "bool", "string", "large_string", "null")
"""Starts of the types of `datasets` that a label may have, beside `ClassLabel`."""


class HubImages:
    """Encoded images of the splits of one dataset, by row over all of them.

    Args:
        name: of the dataset, for messages.
        parts: the splits, reduced to their image column.
        column: its name.
    """

    def __init__(self, name: str, parts: Sequence[datasets.Dataset], column: str) -> None:
        self.name, self._parts, self._column = name, list(parts), column
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def image_bytes(self, row: int) -> bytes:
        """Return a row's image as its file would be.

        Raises:
            DataError: the cell is empty, or the file that it names cannot be read.
        """
        part = bisect_right(self._starts, row) - 1
        cell = self._parts[part][row - self._starts[part]][self._column]
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None and path:
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise DataError(f"image {path} of {self.name} cannot be read: {error.strerror}; copy it again") from None
        if not isinstance(data, bytes):
            raise DataError(f"image {row - self._starts[part]} of {self.name} is empty; drop the row")
        return data


def read_hf(config: DataConfig) -> Dataset:
    """Read a dataset of the Hugging Face hub, or a local folder that the `datasets` library can load.

    Raises:
        DataError: the library or the dataset is missing, a column is unknown or of a wrong type, or a label names no class.
    """
    parts = _load(config)
    name = f"the dataset {config.root}"
    columns = next(iter(parts.values())).features
    image = _image_column(config, columns, name)
    rows = HubImages(name, [_encoded(part, image) for part in parts.values()], image)
    label_names = _label_names(_column_type(columns, config.label_column, "label_column", name), config.label_column, name)
    if config.domain_column:
        _column_type(columns, config.domain_column, "domain_column", name)

    splits = [split for split, part in parts.items() for _ in range(len(part))]
    numbers = [row for part in parts.values() for row in range(len(part))]
    labels = [_text(cell, label_names) for part in parts.values() for cell in _cells(part, config.label_column)]
    domains = _domains(config, parts, columns)
    notes: list[str] = []
    account = Account(f"rows of {name}", found=len(labels))
    part_of = _parts(config, splits, domains, name, notes)
    has_label = [label is not None for label in labels]
    account.left_out["rows without a label"] += (unlabelled := has_label.count(False))
    account.left_out["rows of domains that no data.*_domains names"] += sum(
        part is None and known for part, known in zip(part_of, has_label, strict=True)
    )
    account.left_out = +account.left_out
    if unlabelled == len(labels):
        raise DataError(f"{name}: no row has a label in the column '{config.label_column}'; name another data.label_column")
    used = [part if known else None for part, known in zip(part_of, has_label, strict=True)]
    trained = {label for label, part in zip(labels, used, strict=True) if label is not None and part in ("train", POOL)}
    keys, prompts = class_list(config, label_names or sorted(trained, key=_number_first))
    label_of = {key: index for index, key in enumerate(keys)}
    found = []
    for row, (part, label) in enumerate(zip(used, labels, strict=True)):
        if part is None or label is None:
            continue
        sample_id = f"{splits[row]}/{numbers[row]}"
        if label not in label_of:
            raise DataError(
                f"{name}, split '{splits[row]}', row {numbers[row]}: column '{config.label_column}' is '{shown(label)}', a class "
                f"that no training row has{nearest(shown(label), keys)}; correct it or drop the row"
            )
        item = StoredImage(f"{config.root}: {sample_id}", rows, row)
        found.append((part, Sample(sample_id=sample_id, item=item, label=label_of[label], domain=domains[row])))
    made = _splits(found, config, prompts.class_names, notes)
    return Dataset(
        name="hf",
        root=Path(config.root).expanduser().absolute() if Path(config.root).expanduser().exists() else Path(config.root),
        class_names=prompts.class_names,
        splits=made,
        templates=prompts.templates,
        notes=(*notes, account.note(sum(len(split) for split in made.values()))),
    )


def _load(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Return the splits by name as the `datasets` library finds them."""
    require("data.name = hf", "datasets")
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    if not config.root:
        raise DataError('data.root is empty (data.name = "hf"); --set data.root=OWNER/NAME of the hub, or PATH of a folder')
    folder = Path(config.root).expanduser()
    if not folder.is_dir() and not HUB_ID.fullmatch(config.root):
        raise DataError(f"data.root = {shown(config.root)} is neither a folder nor a hub id; expected owner/name or a path")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            loaded = datasets.load_dataset(str(folder.absolute()), config.hf_subset or None)
        else:
            loaded = datasets.load_dataset(config.root, config.hf_subset or None, revision=config.hf_revision or None)
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        cause = error.__cause__ or error
        reason = shown(" ".join(str(cause).split()), 200) or type(cause).__name__
        raise DataError(
            f"data.root = {config.root}: the datasets library cannot load it ({type(cause).__name__}: {reason}); check name, "
            "access (gated or private: log in with `hf auth login`), connection, and data.hf_subset"
        ) from None
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _image_column(config: DataConfig, columns: datasets.Features, name: str) -> str:
    """Return the column of the images: the named one, or the only one of that type.

    Raises:
        DataError: there is none, or several.
    """
    import datasets

    if config.image_column:
        kind = _column_type(columns, config.image_column, "image_column", name)
        if not isinstance(kind, datasets.Image) and getattr(kind, "dtype", "") not in ("binary", "large_binary"):
            raise DataError(
                f"data.image_column = {config.image_column}: in {name} it has the type {shown(str(kind))}, expected images or "
                "bytes; name another column"
            )
        return config.image_column
    images = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
    if len(images) == 1:
        return images[0]
    raise DataError(
        f"{name} has {len(images)} columns of images ({listed(images) or 'none'}), expected one (columns: "
        f"{listed(list(columns), 20)}); set data.image_column"
    )


def _column_type(columns: datasets.Features, column: str, option: str, name: str) -> Any:
    """Return the type of a column; `a.b` is the field b of the column a.

    Raises:
        DataError: there is no such column.
    """
    kind: Any = columns
    for key in [column] if column in columns else column.split("."):
        if not isinstance(kind, dict) or key not in kind:
            raise DataError(
                f"data.{option} = {column}: {name} has no such column{nearest(column, columns)} "
                f"(found: {listed(list(columns), 20)})"
            )
        kind = kind[key]
    if isinstance(kind, dict):
        raise DataError(
            f"data.{option} = {column}: in {name} this column has fields ({listed(list(kind))}); name one of them as "
            f"{column}.FIELD"
        )
    return kind


def _label_names(kind: Any, column: str, name: str) -> Sequence[str] | None:
    """Return the class names that the type of the label column has, if it has any.

    Raises:
        DataError: cells of this type are no labels; told before any of them is read, for images are decoded when read.
    """
    names, held = getattr(kind, "names", None), str(getattr(kind, "dtype", "")) or type(kind).__name__
    if names is None and not held.startswith(LABEL_TYPES):
        raise DataError(
            f"data.label_column = {column}: in {name} this column holds {held}, expected a class per row, a name or a whole "
            "number; name another column"
        )
    return names


def _encoded(part: datasets.Dataset, column: str) -> datasets.Dataset:
    import datasets

    part = part.select_columns([column])
    return part.cast_column(column, datasets.Image(decode=False)) if isinstance(part.features[column], datasets.Image) else part


def _cells(part: datasets.Dataset, column: str) -> list[Any]:
    """Return a column's cells; `a.b` is the field b of the column a."""
    if column in part.column_names:
        return list(part[column])
    first, *fields = column.split(".")
    cells = list(part[first])
    for key in fields:
        cells = [None if cell is None else cell.get(key) for cell in cells]
    return cells


def _text(cell: Any, names: Sequence[str] | None) -> str | None:
    """Return a label as a class key; None for a row without label.

    Raises:
        DataError: a label that is neither a text nor a whole number.
    """
    if cell is None or cell in (NO_LABEL, ""):
        return None
    if names is not None:
        return nfc(names[cell])
    if isinstance(cell, (bool, int, str)):
        return nfc(str(cell))
    raise DataError(
        f"data.label_column: found {shown(repr(cell))}, expected a class per row, a name or a whole number; name another column"
    )


def _domains(config: DataConfig, parts: dict[str, datasets.Dataset], columns: datasets.Features) -> list[str]:
    if not config.domain_column:
        return [""] * sum(len(part) for part in parts.values())
    names = getattr(_column_type(columns, config.domain_column, "domain_column", config.root), "names", None)
    cells = [cell for part in parts.values() for cell in _cells(part, config.domain_column)]
    return [nfc(names[cell] if names and isinstance(cell, int) else "" if cell is None else str(cell)) for cell in cells]


def _parts(config: DataConfig, splits: Sequence[str], domains: Sequence[str], name: str, notes: list[str]) -> list[Part]:
    """Return the part of every row and add notes on how splits are read."""
    known = list(dict.fromkeys(splits))
    if names_domains(config):
        if not config.domain_column:
            raise DataError("data.train_domains, select_domains or test_domains need data.domain_column: name the column")
        if len(known) > 1:
            notes.append(f"data.*_domains decide what is trained on, not the dataset's own splits ({listed(known)})")
        return domain_parts(config, domains, name)
    if len(known) == 1:
        return [POOL] * len(splits)
    if "train" not in map(canonical_split, known):
        raise DataError(f"{name} has the splits {listed(known)}, none of them train; rename one, or set data.train_domains")
    notes += split_notes(known)
    return [canonical_split(split) for split in splits]


def _splits(
    rows: list[tuple[str, Sample]], config: DataConfig, class_names: tuple[str, ...], notes: list[str]
) -> dict[str, Split]:
    parts, samples = [part for part, _ in rows], tuple(sample for _, sample in rows)
    if names_domains(config) or POOL in parts:
        return pooled_splits(parts, samples, config, class_names)
    splits = split_by_name(parts, samples)
    if any(split.role == "select" for split in splits.values()) or not (config.select_fraction or config.select_per_class):
        return splits
    held = hold_out(
        splits.pop("train").samples,
        select_fraction=config.select_fraction,
        select_per_class=config.select_per_class,
        test_fraction=0,
        seed=config.split_seed,
        name_of=class_names.__getitem__,
    )
    notes.append(
        f"no split selects models: {len(held['id_val'])} training images are held out as 'id_val' (data.select_fraction)"
    )
    return in_reporting_order([*held.values(), *splits.values()])


def _number_first(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if re.fullmatch(r"-?\d{1,9}", label) else (1, 0, label)
