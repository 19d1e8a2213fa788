"""Images listed in a CSV, TSV or Parquet file (floor 2).

Columns: path, label, and optionally split, domain and caption, under the names that the recipe gives. Rows are counted as
an editor shows them: the header of a CSV is row 1. A Parquet file's first row is row 1.
"""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from flyp_saflex.config import DataConfig
from flyp_saflex.data.class_prompts import Prompts
from flyp_saflex.data.folder import class_list, existing_root
from flyp_saflex.data.splitting import hold_out, in_reporting_order, split_by_name
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Dataset, Sample, Split

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Text cells of the columns that the recipe names, and how to name a row in an error."""

    file: Path
    first_row: int
    columns: dict[str, list[str]]

    def at(self, index: int, column: str) -> str:
        return f"{self.file} row {index + self.first_row}, column '{column}'"


def read_table(config: DataConfig) -> Dataset:
    """Read a table of images.

    Raises:
        DataError: names file, row and column of what is wrong: a missing or doubled column, an empty cell, a path outside of
            the root or listed twice, a label that no training row has.
    """
    file = _find(config)
    root = existing_root(config) if config.root else file.parent.absolute()
    optional = [column for column in (config.split_column, config.domain_column, config.caption_column) if column]
    table = _load(file, [config.path_column, config.label_column, *optional])
    if config.train_domains and config.split_column:
        raise DataError(
            f"data.split_column = '{config.split_column}' and data.train_domains both say what is trained on; set one of them"
        )
    if (config.train_domains or config.select_domains or config.test_domains) and not config.domain_column:
        raise DataError("data.train_domains, select_domains or test_domains need data.domain_column: name the table's column")

    sample_ids = _sample_ids(table, config.path_column, root)
    parts, notes = _parts(table, config)
    keys, prompts = _classes(table, config, parts)
    labels = _labels(table, config.label_column, keys, parts)
    domains = table.columns.get(config.domain_column) or [""] * len(sample_ids)
    captions = table.columns.get(config.caption_column) or [""] * len(sample_ids)
    rows = [
        (
            part,
            Sample(sample_id=sample_id, item=root / sample_id, label=label, domain=domain, caption=caption or None),
        )
        for part, sample_id, label, domain, caption in zip(parts, sample_ids, labels, domains, captions, strict=True)
        if part
    ]
    return Dataset(
        name="table",
        root=root,
        class_names=prompts.class_names,
        splits=_splits(rows, config, prompts.class_names),
        templates=prompts.templates,
        notes=tuple(notes),
    )


def _find(config: DataConfig) -> Path:
    if not config.table:
        raise DataError("data.table is empty, expected a .csv, .tsv or .parquet file (data.name = table); --set data.table=FILE")
    given = Path(config.table).expanduser()
    for file in (given, Path(config.root).expanduser() / given):
        if file.is_file():
            return file
    raise DataError(f"data.table = {config.table}: there is no such file (nor below data.root = '{config.root}'); check the path")


def _load(file: Path, wanted: list[str]) -> _Table:
    """Read the wanted columns as text, stripped; missing values are empty."""
    suffix = file.suffix.lower()
    if suffix not in (*DELIMITERS, ".parquet", ".pq"):
        raise DataError(f"{file}: the ending '{file.suffix}' is unknown, expected .csv, .tsv or .parquet; rename or convert it")
    try:
        if suffix in DELIMITERS:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                header = next(csv.reader(lines, delimiter=DELIMITERS[suffix]), [])
            _check_columns(file, [name.strip() for name in header], wanted)
            frame = pd.read_csv(
                file,
                sep=DELIMITERS[suffix],
                dtype=str,
                keep_default_na=False,
                encoding="utf-8-sig",
                index_col=False,
                skip_blank_lines=False,
                on_bad_lines="error",
            )
            frame.columns = [name.strip() for name in header]
        else:
            frame = pd.read_parquet(file)
            _check_columns(file, list(frame.columns), wanted)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except DataError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # pandas' and pyarrow's parsing errors are ValueErrors
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}; mend the file or save it anew") from None
    if not len(frame):
        raise DataError(f"{file} has a header but no row; expected one row per image")
    columns = {name: [_text(value) for value in frame[name].tolist()] for name in wanted}
    return _Table(file=file, first_row=2 if suffix in DELIMITERS else 1, columns=columns)


def _text(value: Any) -> str:
    if pd.isna(value):  # None, NaN and pandas' NA
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of whole numbers with gaps is read as float
    return str(value).strip()


def _check_columns(file: Path, header: list[str], wanted: list[str]) -> None:
    for name in dict.fromkeys(wanted):
        if header.count(name) > 1:
            raise DataError(
                f"{file} row 1: the column '{name}' is there {header.count(name)} times; rename or remove all but one"
            )
        if name not in header:
            raise DataError(
                f"{file} row 1: there is no column '{name}'{nearest(name, header)} (columns: {', '.join(header)}); "
                "set data.path_column, label_column, split_column, domain_column or caption_column"
            )
    doubled = [name for name in dict.fromkeys(wanted) if wanted.count(name) > 1]
    if doubled:
        raise DataError(f"the recipe uses the column '{doubled[0]}' of {file} for two things; correct the data.*_column options")


def _sample_ids(table: _Table, column: str, root: Path) -> list[str]:
    """Return root-relative paths with forward slashes."""
    sample_ids: list[str] = []
    rows: dict[str, int] = {}
    for index, cell in enumerate(table.columns[column]):
        if not cell:
            raise DataError(
                f"{table.at(index, column)} is empty, expected an image's path relative to {root}; fill or drop the row"
            )
        path = cell.replace("\\", "/")
        if posixpath.isabs(path):
            prefix = f"{root.as_posix().rstrip('/')}/"
            path = path.removeprefix(prefix) if path.startswith(prefix) else path
        sample_id = posixpath.normpath(path)
        if posixpath.isabs(sample_id) or sample_id == ".." or sample_id.startswith("../") or sample_id == ".":
            raise DataError(
                f"{table.at(index, column)} is '{cell}', a path outside of {root}; move the image there or set data.root"
            )
        if sample_id in rows:
            raise DataError(
                f"{table.at(index, column)}: '{cell}' is already in row {rows[sample_id] + table.first_row}; "
                "an image belongs to one row and one split, drop one of them"
            )
        rows[sample_id] = index
        sample_ids.append(sample_id)
    return sample_ids


def _parts(table: _Table, config: DataConfig) -> tuple[list[str], list[str]]:
    """Return each row's split name (`pool` for what is held out from, empty for rows that are not used) and notes."""
    count = len(table.columns[config.path_column])
    if config.split_column:
        for index, cell in enumerate(table.columns[config.split_column]):
            if not cell:
                raise DataError(
                    f"{table.at(index, config.split_column)} is empty, expected train, val, test or another split's name; "
                    "fill or drop the row"
                )
        found = sorted(set(table.columns[config.split_column]))
        if "train" not in found:
            raise DataError(
                f"{table.file}: no row has 'train' in column '{config.split_column}' (found: {', '.join(found[:8])}); "
                "name the training rows' split train"
            )
        return table.columns[config.split_column], []
    if not (config.train_domains or config.select_domains or config.test_domains):
        return ["pool"] * count, []
    found = sorted(set(table.columns[config.domain_column]))
    part_of: dict[str, str] = {}
    for role, domains in (("train", config.train_domains), ("select", config.select_domains), ("test", config.test_domains)):
        for domain in domains:
            if domain not in found:
                raise DataError(
                    f"data.{role}_domains: no row of {table.file} has '{domain}' in column '{config.domain_column}'"
                    f"{nearest(domain, found)} (found: {', '.join(found[:8])})"
                )
            if domain in part_of:
                raise DataError(f"data.{role}_domains: '{domain}' is named twice; a domain has one role")
            part_of[domain] = "pool" if role == "train" else domain
    parts = [part_of.get(domain, "") for domain in table.columns[config.domain_column]]
    if "pool" not in parts:
        raise DataError(
            f"data.train_domains is empty; name the domains of {table.file} to train on (found: {', '.join(found[:8])})"
        )
    unused = parts.count("")
    return parts, [f"{table.file}: {unused} rows of domains that no data.*_domains names were left out"] if unused else []


def _classes(table: _Table, config: DataConfig, parts: list[str]) -> tuple[tuple[str, ...], Prompts]:
    cells = table.columns[config.label_column]
    for index, cell in enumerate(cells):
        if not cell:
            raise DataError(f"{table.at(index, config.label_column)} is empty, expected a class; fill or drop the row")
    trained = {cell for cell, part in zip(cells, parts, strict=True) if part in ("train", "pool")}
    numeric = all(cell.isdecimal() for cell in trained)
    if numeric and config.prompts:
        trained = set()  # class indices: classes.txt decides, _labels checks the range
    return class_list(config, sorted(trained, key=(lambda cell: (int(cell), cell)) if numeric else None))


def _labels(table: _Table, column: str, keys: Sequence[str], parts: list[str]) -> list[int]:
    """Return class indices; a cell is a class's key, its name, or (where no key is a number) its index."""
    index_of = {key: index for index, key in enumerate(keys)}
    by_index = not any(key.isdecimal() for key in keys)
    labels = []
    for index, cell in enumerate(table.columns[column]):
        if cell in index_of:
            labels.append(index_of[cell])
        elif not parts[index]:
            labels.append(-1)  # a row of a domain that is not used
        elif by_index and cell.isdecimal() and int(cell) < len(keys):
            labels.append(int(cell))
        elif by_index and cell.isdecimal():
            raise DataError(
                f"{table.at(index, column)} is {cell}, but there are {len(keys)} classes (0..{len(keys) - 1}); "
                "drop the row or update the class file"
            )
        else:
            raise DataError(
                f"{table.at(index, column)} is '{cell}', a class that no training row and no class file has"
                f"{nearest(cell, keys)}; correct it, add training images of it, or drop the row"
            )
    return labels


def _splits(rows: list[tuple[str, Sample]], config: DataConfig, class_names: tuple[str, ...]) -> dict[str, Split]:
    if config.split_column:
        return split_by_name(rows)
    splits = list(
        hold_out(
            [sample for part, sample in rows if part == "pool"],
            select_fraction=config.select_fraction,
            select_per_class=config.select_per_class,
            test_fraction=config.test_fraction,
            seed=config.split_seed,
            name_of=class_names.__getitem__,
        ).values()
    )
    for domains, role in ((config.select_domains, "select"), (config.test_domains, "test")):
        for domain in domains:
            samples = tuple(sample for part, sample in rows if part == domain)
            splits.append(Split(name=domain, role=role, shift="ood", samples=samples))  # type: ignore[arg-type]
    return in_reporting_order(splits)
