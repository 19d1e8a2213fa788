"""Delimited and Parquet files: every row has the header's shape or is named; other dialects work or get one line."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pandas as pd
import pytest

from flyp_saflex.data import table_text
from flyp_saflex.data.table import load_columns
from flyp_saflex.data.table_file import Table, without_fractions
from flyp_saflex.errors import DataError

WANTED = ["path", "label", "caption"]
ROWS = [("0.png", "cat", "a cat"), ("1.png", "dog", "a dog"), ("2.png", "cat", "a cat, running")]


def load(tmp_path: Path, text: str, name: str = "t.csv", wanted: list[str] = WANTED) -> Table:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return load_columns(tmp_path / name, wanted)


def rows_of(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*table.columns.values(), strict=True))


BODY = '0.png,cat,a cat\n1.png,dog,a dog\n2.png,cat,"a cat, running"\n'
WORKS = {
    "plain": "path,label,caption\n" + BODY,
    "byte order mark": "\ufeffpath,label,caption\n" + BODY,
    "windows": ("path,label,caption\n" + BODY).replace("\n", "\r\n"),
    "old mac": ("path,label,caption\n" + BODY).replace("\n", "\r"),
    "spaces before cells and quotes": "path, label, caption\n" + BODY.replace(",", ", ").replace("t,  r", "t, r"),
    "semicolons": "path;label;caption\n0.png;cat;a cat\n1.png;dog;a dog\n2.png;cat;a cat, running\n",
    "tabs in a .csv": "path\tlabel\tcaption\n0.png\tcat\ta cat\n1.png\tdog\ta dog\n2.png\tcat\ta cat, running\n",
    "sep line": "sep=;\npath;label;caption\n0.png;cat;a cat\n1.png;dog;a dog\n2.png;cat;a cat, running\n",
    "comments": "# made by hand, by me\n\npath,label,caption\n" + BODY + "# the end\n",
    "blank first line": "\npath,label,caption\n" + BODY,
    "blank and empty lines": "path,label,caption\n" + BODY.replace("1.png", "\n,,\n1.png") + "\n\n",
    "pandas' index column": ",path,label,caption\n" + "".join(f"{n},{line}\n" for n, line in enumerate(BODY.splitlines())),
    "trailing commas": "path,label,caption\n" + BODY.replace("\n", ",,\n"),
    "trailing comma in the header only": "path,label,caption,\n" + BODY,
    "no last line end": "path,label,caption\n" + BODY.rstrip(),
}


@pytest.mark.parametrize("case", WORKS)
def test_dialects_that_work_read_the_same(case: str, tmp_path: Path):
    table = load(tmp_path, WORKS[case])
    assert rows_of(table) == ROWS
    shown = WORKS[case].lstrip("\ufeff").splitlines()
    assert ["2.png" in shown[table.row(index) - 1] for index in range(3)] == [False, False, True]


REFUSED = {
    "unquoted comma in the first row": (
        "path,label,caption\n0.png,a cat, running,cat\n",
        "row 2: 4 cells where the header has 3",
    ),
    "unquoted comma later": ("path,label,caption\n" + BODY + "3.png,cat,a, b\n", "row 5: 4 cells .* the surplus begins with 'b'"),
    "missing cell": ("path,label,caption\n0.png,cat\n", "row 2: 2 cells where the header has 3"),
    "row numbers without a name": ("path,label,caption\n1,0.png,cat,x\n", "or name the column of row numbers in the header"),
    "open quote to the end": (
        "path,label,caption\n" + BODY + '3.png,cat,"a\n4.png,cat,b\n',
        "row 5: a quotation mark is opened and not closed",
    ),
    "open quote, closed in text": (
        'path,label,caption\n0.png,cat,"a\n1.png,cat,"b\n',
        "row 2: a quotation mark is opened in this row and closed before text that is not ','",
    ),
    "open quote, closed at a cell's end": (
        'path,label,caption\n0.png,cat,"a\n1.png,cat,b\n2.png,cat,c"\n',
        "row 2: the cell 'a.*' runs over 3 rows; close the quotation mark",
    ),
    "open quote in the middle": (
        'path,label,caption\n0.png,"cat,a\n1.png,cat",b\n',
        "row 2: the cell 'cat,a.*' runs over 2 rows",
    ),
    "text behind a quote": ('path,label,caption\n0.png,cat,"a" b\n', "row 2: a quotation mark"),
    "no header": (BODY, r"row 1: there is no column 'path'.*columns: 0\.png, cat, a cat"),
    "empty": ("", "is empty"),
    "a NUL": ("path,label,caption\n0.png,ca\0t,x\n", "row 2, column 'label' holds a NUL character"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_of_another_shape_are_named(case: str, tmp_path: Path):
    text, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_quoted_text_over_several_lines_stays_text(tmp_path: Path):
    rows = [("0.png", "cat", "a cat,\nrunning, fast"), ("1.png", "dog", 'a "dog"\r\n\r\nsits'), ("2.png", "cat", "end")]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([WANTED, *rows])
    (tmp_path / "t.csv").write_bytes(buffer.getvalue().encode())
    table = load_columns(tmp_path / "t.csv", WANTED)
    assert rows_of(table) == rows
    assert [table.row(index) for index in range(3)] == [2, 4, 7]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_text_a_writer_quotes_comes_back(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    rows = [
        (f"{n}.png", rng.choice(["cat", "dog"]), "x" + "".join(rng.choice('ab ,;"|\t#') for _ in range(rng.randrange(20))) + "x")
        for n in range(50)
    ]
    for name, delimiter in (("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")):
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([WANTED, *rows])
        assert rows_of(load_columns(tmp_path / name, WANTED)) == rows


@pytest.mark.parametrize("seed", range(60))
def test_damaged_quotes_and_commas_lose_no_row(seed: int, tmp_path: Path):
    """A file with a surplus quotation mark or comma is refused, or every path of it is there in order."""
    rng = random.Random(seed)
    lines = [f'{n}.png,{rng.choice(["cat", "dog"])},"a {n}, b"\n' if n % 3 else f"{n}.png,cat,a {n}\n" for n in range(30)]
    for _ in range(rng.randrange(1, 3)):
        row = rng.randrange(30)
        place = rng.randrange(len(lines[row]))
        lines[row] = lines[row][:place] + rng.choice('",') + lines[row][place:]
    try:
        table = load(tmp_path, "path,label,caption\n" + "".join(lines))
    except DataError as error:
        message = str(error)
    else:
        message, paths = "", table.columns["path"]
        assert len(paths) == 30
        assert sum(cell == f"{n}.png" for n, cell in enumerate(paths)) >= 28
    assert not message or "row " in message


def test_a_tsv_has_quoted_cells_or_none(tmp_path: Path):
    text = 'path\tlabel\tcaption\n0.png\tcat\t"Good boy, said the owner\n1.png\tdog\ta dog\n2.png\tcat\t"Stay, said he\n'
    table = load(tmp_path, text, "t.tsv")
    assert rows_of(table) == [
        ("0.png", "cat", '"Good boy, said the owner'),
        ("1.png", "dog", "a dog"),
        ("2.png", "cat", '"Stay, said he'),
    ]
    assert "read as text without quoting" in table.notes[0]
    table = load(tmp_path, 'path\tlabel\tcaption\n"0.png"\t"cat"\t"a\ttab"\n', "t.tsv")
    assert rows_of(table) == [("0.png", "cat", "a\ttab")]
    assert table.notes == []


def test_files_that_are_not_utf8_name_the_line(tmp_path: Path):
    (tmp_path / "t.csv").write_bytes("path,label,caption\n0.png,cat,x\n1.png,h\xe4,y\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"is not UTF-8 text \(line 3\); save it as UTF-8"):
        load_columns(tmp_path / "t.csv", WANTED)
    (tmp_path / "t.csv").write_text("path,label\n", encoding="utf-16")
    with pytest.raises(DataError, match="is UTF-16 text"):
        load_columns(tmp_path / "t.csv", WANTED)


def test_numbers_written_as_fractions_are_whole_only_if_all_are():
    assert without_fractions(["0.0", "1.0", "10.00", "2"]) == ["0", "1", "10", "2"]
    for cells in (["0.5", "1.0"], ["1.5T", "1.0"], ["a", "b"], ["1", "2"], ["1.0", "cat"]):
        assert without_fractions(cells) == cells


PARQUET = {
    "list": ([["a", "b"]], "row 1, column 'caption' holds a list, expected text; write one text per row"),
    "struct": ([{"bytes": b"x", "path": "a.png"}], r"holds \{bytes, path\}, expected text; write the images to files"),
    "bytes": ([b"\xff\xfe"], "holds bytes, expected text"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet_cells_that_are_no_text_are_refused(case: str, tmp_path: Path):
    cells, message = PARQUET[case]
    pd.DataFrame({"path": ["0.png"], "label": ["cat"], "caption": cells}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        load_columns(tmp_path / "t.parquet", WANTED)


def test_parquet_numbers_categories_and_gaps(tmp_path: Path):
    frame = pd.DataFrame({"path": ["0.png", "1.png", "2.png"], "label": [0.0, 1.0, None], "caption": [1.5, 2.0, None]})
    frame["kind"] = pd.Categorical(["a", "b", "a"])
    frame["old"] = [b"x", b"y", None]
    frame.to_parquet(tmp_path / "t.parquet")
    table = load_columns(tmp_path / "t.parquet", [*WANTED, "kind", "old"])
    assert table.columns["label"] == ["0", "1", ""]
    assert table.columns["caption"] == ["1.5", "2.0", ""]
    assert (table.columns["kind"], table.columns["old"]) == (["a", "b", "a"], ["x", "y", ""])
    frame.set_index("path").to_parquet(tmp_path / "t.parquet")
    assert load_columns(tmp_path / "t.parquet", ["path", "label"]).columns["path"] == ["0.png", "1.png", "2.png"]


def test_a_large_table_keeps_every_row_and_equal_cells_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table_text, "BLOCK_ROWS", 7)
    monkeypatch.setattr(table_text, "MOST_KNOWN", 40)
    rows = [(f"train/{n}.jpg", f"class {n % 3}", f"a photo, number {n}") for n in range(100)]
    lines = "".join(f'{path}, {label} ,"{caption}"\n' for path, label, caption in rows)
    table = load(tmp_path, "path,label,caption\n" + lines)
    assert rows_of(table) == rows
    assert len({id(cell) for cell in table.columns["label"]}) == 3
    assert table.row(99) == 101
