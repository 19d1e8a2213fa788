"""Images listed in a CSV, TSV or Parquet file.

Columns: path, label, and optionally split, domain and caption, under the names that the recipe gives. Every row is in one
split or counted as left out.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path

from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.boxes import Box, parse_box
from flyp_saflex.data.class_names import class_list
from flyp_saflex.data.class_prompts import Prompts
from flyp_saflex.data.folder import existing_root
from flyp_saflex.data.parts import POOL, Part, domain_parts, names_domains, pooled_splits
from flyp_saflex.data.splitting import canonical_split, split_by_name, split_notes
from flyp_saflex.data.table_file import Table, without_fractions
from flyp_saflex.data.table_parquet import load_parquet
from flyp_saflex.data.table_text import load_delimited
from flyp_saflex.data.text import listed, nfc, nfc_all, not_utf8, shown
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Dataset, Samples

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
UNUSUAL = re.compile(r"^[/.]|\\|//|/\.|/$")
"""What a path has that `posixpath.normpath` might change, or that leads out of the root."""
LONGEST_INDEX = 9
"""Digits of a class index at most."""


def read_table(config: DataConfig) -> Dataset:
    """Read a table of images.

    Raises:
        DataError: names file, row and column of what is wrong: a missing or doubled column, an empty cell, a path outside of
            the root or listed twice, a label that no training row has.
    """
    file = _find(config)
    root = existing_root(config) if config.root else file.parent.absolute()
    optional = [
        column for column in (config.split_column, config.domain_column, config.caption_column, config.sequence_column) if column
    ]
    if len(config.box_columns) not in (0, 4):
        raise DataError(f"data.box_columns names {len(config.box_columns)} columns, expected four: left, top, width, height")
    named = [config.path_column, config.label_column, *optional, *config.box_columns]
    table = load_columns(file, [*named, *(column for column in config.group_columns if column not in named)])
    if config.train_domains and config.split_column:
        raise DataError(
            f"data.split_column = '{config.split_column}' and data.train_domains both say what is trained on; set one of them"
        )
    if names_domains(config) and not config.domain_column:
        raise DataError("data.train_domains, select_domains or test_domains need data.domain_column: name the table's column")

    account = Account(f"rows of {file}")
    notes = list(table.notes)
    sample_ids = _sample_ids(table, nfc(config.path_column), root)
    domains = _column(table, config.domain_column)
    parts = _parts(table, config, domains, notes)
    labels, prompts = _labels(table, config, parts, notes)
    captions = _column(table, config.caption_column, composed=False)
    groups = _groups(table, config.group_columns)
    sequences = _column(table, config.sequence_column)
    boxes = _boxes(table, config.box_columns)
    used = [part is not None for part in parts]
    account.found = used.count(True)
    account.leave_out("of domains that no data.*_domains names", used.count(False))
    for reason, count in table.left_out.items():
        account.leave_out(reason, count)

    def column(cells: Sequence[str], name: object) -> list[str] | None:
        return list(compress(cells, used)) if name else None

    samples = Samples(
        root,
        sample_ids=list(compress(sample_ids, used)),
        labels=list(compress(labels, used)),
        domains=list(compress(domains, used)),
        groups=column(groups, config.group_columns),
        captions=[caption or None for caption in compress(captions, used)] if config.caption_column else None,
        sequences=column(sequences, config.sequence_column),
        boxes=list(compress(boxes, used)) if boxes else None,
    )
    names = [part for part in parts if part is not None]
    splits = split_by_name(names, samples) if config.split_column else pooled_splits(names, samples, config, prompts.class_names)
    return Dataset(
        name="table",
        root=root,
        class_names=prompts.class_names,
        splits=splits,
        templates=prompts.templates,
        notes=(*notes, account.note(sum(len(split) for split in splits.values()))),
    )


def _find(config: DataConfig) -> Path:
    if not config.table:
        raise DataError("data.table is empty, expected a .csv, .tsv or .parquet file (data.name = table); --set data.table=FILE")
    given = Path(config.table).expanduser()
    for file in (given, Path(config.root).expanduser() / given):
        if file.is_file():
            return file
    raise DataError(f"data.table = {config.table}: there is no such file (nor below data.root = '{config.root}'); check the path")


def load_columns(file: Path, wanted: Sequence[str]) -> Table:
    """Read columns of a table.

    Args:
        file: a .csv, .tsv, .tab, .parquet or .pq file.
        wanted: columns; the first one is that of the paths.

    Raises:
        DataError: names file, row and column of what cannot be read.
    """
    suffix = file.suffix.lower()
    if suffix not in (*DELIMITERS, ".parquet", ".pq"):
        raise DataError(f"{file}: the ending '{file.suffix}' is unknown, expected .csv, .tsv or .parquet; rename or convert it")
    wanted = nfc_all(wanted)
    try:
        table = load_delimited(file, wanted, DELIMITERS[suffix]) if suffix in DELIMITERS else load_parquet(file, wanted)
    except UnicodeDecodeError:
        raise DataError(_not_utf8(file)) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error.strerror or error).split())}; check the file") from None
    if not table.num_rows:
        raise DataError(f"{file} has a header but no row; expected one row per image")
    for name, cells in table.columns.items():
        if (index := next((index for index, cell in enumerate(cells) if "\0" in cell), None)) is not None:
            raise DataError(f"{table.at(index, name)} holds a NUL character; save the file anew as UTF-8 text")
    return table


def _column(table: Table, name: str, *, composed: bool = True) -> list[str]:
    """Return a column's cells, of names in Unicode's composed form; empty ones if the recipe names no such column."""
    if not name:
        return [""] * table.num_rows
    cells = table.columns[nfc(name)]
    if not composed:
        return cells
    names = {cell: nfc(cell) for cell in set(cells)}
    return [names[cell] for cell in cells]


def _boxes(table: Table, names: Sequence[str]) -> list[Box | None]:
    """Return every row's box; None for empty cells; an empty list without columns."""
    columns = [table.columns[nfc(name)] for name in names]
    return [
        parse_box(cells, table.at(index, nfc(names[0]))) if any(cells) else None
        for index, cells in enumerate(zip(*columns, strict=True))
    ]


def _groups(table: Table, names: Sequence[str]) -> list[str]:
    """Return every row's values of some columns as `column=value, column=value`; empty ones without columns."""
    if not names:
        return [""] * table.num_rows
    columns = [without_fractions(_column(table, name)) for name in names]
    return [", ".join(f"{name}={cell}" for name, cell in zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _sample_ids(table: Table, column: str, root: Path) -> list[str]:
    """Return root-relative paths with forward slashes."""
    cells = table.columns[column]
    sample_ids = [
        cell if cell and not UNUSUAL.search(cell) else _relative(table, index, column, root) for index, cell in enumerate(cells)
    ]
    if len(set(sample_ids)) < len(sample_ids):
        rows: dict[str, int] = {}
        for index, sample_id in enumerate(sample_ids):
            if sample_id in rows:
                raise DataError(
                    f"{table.at(index, column)}: '{shown(cells[index])}' is already in row {table.row(rows[sample_id])}; "
                    "an image belongs to one row and one split, drop one of them"
                )
            rows[sample_id] = index
    return sample_ids


def _relative(table: Table, index: int, column: str, root: Path) -> str:
    """Return the root-relative path of a cell.

    Raises:
        DataError: it is empty or leads out of the root.
    """
    cell = table.columns[column][index]
    if not cell:
        raise DataError(f"{table.at(index, column)} is empty, expected an image's path relative to {root}; fill or drop the row")
    path = cell.replace("\\", "/")
    if posixpath.isabs(path):
        prefix = f"{root.as_posix().rstrip('/')}/"
        path = path.removeprefix(prefix) if path.startswith(prefix) else path
    sample_id = posixpath.normpath(path)
    if posixpath.isabs(sample_id) or sample_id == ".." or sample_id.startswith("../") or sample_id == ".":
        raise DataError(
            f"{table.at(index, column)} is '{shown(cell)}', a path outside of {root}; move the image there or set data.root"
        )
    return sample_id


def _parts(table: Table, config: DataConfig, domains: Sequence[str], notes: list[str]) -> list[Part]:
    """Return each row's part and add notes on split names."""
    if config.split_column:
        return _named_parts(table, config.split_column, notes)
    if not names_domains(config):
        return [POOL] * table.num_rows
    return domain_parts(config, domains, str(table.file))


def _named_parts(table: Table, column: str, notes: list[str]) -> list[Part]:
    cells = _column(table, column)
    if "" in cells:
        raise DataError(
            f"{table.at(cells.index(''), column)} is empty, expected train, val, test or another split's name; "
            "fill or drop the row"
        )
    names = {name: canonical_split(name) for name in sorted(set(cells))}
    if "train" not in names.values():
        raise DataError(
            f"{table.file}: no row has 'train' in column '{column}' (found: {listed(list(names))}); "
            "name the training rows' split train"
        )
    notes += split_notes(list(names))
    return [names[cell] for cell in cells]


def _labels(table: Table, config: DataConfig, parts: Sequence[Part], notes: list[str]) -> tuple[list[int], Prompts]:
    """Return the class index of every row, -1 for rows that are left out, and the prompts.

    A cell is a class's key, its name, or (where no key is a number) its index.

    Raises:
        DataError: a cell is empty or names no class.
    """
    column = config.label_column
    written = _column(table, column)
    cells = without_fractions(written)
    if cells is not written:
        notes.append(f"{table.file}, column '{column}': whole numbers written as fractions are read as whole numbers (0.0 as 0)")
    if "" in cells:
        raise DataError(f"{table.at(cells.index(''), column)} is empty, expected a class; fill or drop the row")
    trained = {cell for cell, part in zip(cells, parts, strict=True) if part in ("train", POOL)}
    numeric = all(_index(cell) is not None for cell in trained)
    by_class_file = numeric and bool(config.prompts)  # class indices: classes.txt decides
    order = (lambda cell: (_index(cell), cell)) if numeric else None
    keys, prompts = class_list(config, [] if by_class_file else sorted(trained, key=order))
    used = {cell for cell, part in zip(cells, parts, strict=True) if part is not None}
    label_of = {key: index for index, key in enumerate(keys)}
    if not any(_index(key) is not None for key in keys):
        indices = {cell: index for cell in used - set(keys) if (index := _index(cell)) is not None}
        _check_indices(table, column, cells, indices, len(keys))
        label_of |= indices
    if unknown := used - set(label_of):
        index = next(i for i, cell in enumerate(cells) if cell in unknown and parts[i] is not None)
        raise DataError(
            f"{table.at(index, column)} is '{shown(cells[index])}', a class that no training row and no class file has"
            f"{nearest(shown(cells[index]), keys)}; correct it, add training images of it, or drop the row"
        )
    return [label_of.get(cell, -1) for cell in cells], prompts


def _check_indices(table: Table, column: str, cells: Sequence[str], indices: dict[str, int], num_classes: int) -> None:
    """Refuse labels that are no index of a class, or that seem to be counted from 1."""
    if not indices:
        return
    first, last = min(indices.values()), max(indices.values())
    if first == 1 and last <= num_classes:
        raise DataError(
            f"{table.file}, column '{column}': labels run from 1 to {last} and there are {num_classes} classes "
            f"(0..{num_classes - 1}): they seem to be counted from 1; subtract 1 from each, or write the classes' names"
        )
    if last >= num_classes:
        index = next(i for i, cell in enumerate(cells) if indices.get(cell, 0) >= num_classes)
        raise DataError(
            f"{table.at(index, column)} is {cells[index]}, but there are {num_classes} classes (0..{num_classes - 1}); "
            "drop the row or update the class file"
        )


def _index(cell: str) -> int | None:
    """Return a class index; None if the cell is none."""
    return int(cell) if cell.isdecimal() and len(cell) <= LONGEST_INDEX else None


def _not_utf8(file: Path) -> str:
    """Return the message about a file that is not UTF-8, with the first line that is not."""
    start = b""
    for number, line in enumerate(_lines(file), 1):
        start = start or line[:2]
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return not_utf8(file, number, start)
    return not_utf8(file, 1, start)


def _lines(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as lines:
        yield from lines
