"""Tables: published counts, altered copies named, encoding by training rows alone, one line for every wrong card or file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import fields

from flyp_saflex import recipe
from flyp_saflex.config import DataConfig
from flyp_saflex.data.published import Problems
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.data.tabular import read_tabular
from flyp_saflex.data.tabular_card import Card, read_card, shipped_cards
from flyp_saflex.data.tabular_encoding import encode
from flyp_saflex.data.tabular_file import RawTable, read_cells
from flyp_saflex.errors import DataError
from flyp_saflex.user_text import parse_toml

CARD = """
title = "Toy"
file = "toy.csv"
separator = ";"
target = "ill"
missing = ["?"]
ignore = ["id"]
categorical = ["town"]
[classes]
healthy = ["0"]
ill = ["1", "2"]
[expected]
rows = 120
features = 4
positives = 40
missing = 3
"""


def toy_rows(number: int = 120) -> list[list[str]]:
    """id, a number, a number with missing cells, a town (two rare ones), a column of one value, the target."""
    rng = np.random.default_rng(0)
    rows = []
    for place in range(number):
        town = ["Bern", "Rome"][place % 2] if place > 3 else f"village {place}"
        size = "?" if place < 3 else f"{rng.normal():.4f}"
        rows.append([str(1000 + place), f"{rng.normal():.4f}", size, town, "5", str((0, 0, 0, 0, 1, 2)[place % 6])])
    return rows


def written(folder: Path, rows: list[list[str]], card: str = CARD, separator: str = ";") -> DataConfig:
    header = ["id", "age", "size", "town", "same", "ill"]
    folder.mkdir(exist_ok=True)
    (folder / "toy.csv").write_text("\n".join(separator.join(row) for row in [header, *rows]) + "\n", encoding="utf-8")
    (folder / "toy.toml").write_text(card, encoding="utf-8")
    return DataConfig(name="tabular", root=str(folder), card=str(folder / "toy.toml"), select_fraction=0.15, test_fraction=0.2)


@pytest.mark.parametrize("name", ["qsar", "shrutime", "click", "arrhythmia"])
def test_real_tables_have_the_published_counts(shared_dir: Path, name: str) -> None:
    options = DataConfig(name="tabular", root=str(shared_dir / "data/tracks"), card=name, select_fraction=0.15, test_fraction=0.2)
    dataset = load_dataset(options)
    card = read_card(name)
    assert card.paper is not None
    counts = [split.class_counts() for split in dataset.splits.values()]
    assert sum(map(len, dataset.splits.values())) == card.paper.rows == card.expected.rows
    assert sum(count[1] for count in counts) == card.paper.positives
    assert [split.role for split in dataset.splits.values()] == ["train", "select", "test"]
    share = [len(split) / card.paper.rows for split in dataset.splits.values()]
    assert share == pytest.approx([0.65, 0.15, 0.20], abs=2 / card.paper.rows)
    assert not any("altered" in note for note in dataset.notes)
    assert len(dataset.fields) == dataset.rows.shape[1]
    assert len(set(dataset.fields)) == card.expected.features
    assert np.isfinite(dataset.rows).all()


def test_every_shipped_card_reads_and_the_seven_have_the_papers_row() -> None:
    seven = {"appetency", "arrhythmia", "click", "credit", "qsar", "shrutime", "volkert"}
    assert set(shipped_cards()) == {*seven, "my-table"}
    for name in seven:
        card = read_card(name)
        assert card.paper is not None
        assert card.expected.rows == card.paper.rows
        assert card.expected.positives == card.paper.positives
    assert read_card("my-table").paper is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[:-1], "119 rows, expected 120"),
        (lambda rows: [[*row[:5], "0"] for row in rows[:12]] + rows[12:], "36 rows of the class 'ill', expected 40"),
        (lambda rows: [[*row[:2], "1.5", *row[3:]] for row in rows], "0 missing cells, expected 3"),
        (lambda rows: [*rows[:-1], [rows[-1][0], "doe", *rows[-1][2:]]], "line 121, column 'age' has 'doe', expected a number"),
        (lambda rows: [*rows, ["7", "1"]], "line 122 has 2 cells, expected 6"),
    ],
)
def test_altered_copies_are_named_and_go_on_only_if_accepted(tmp_path: Path, change: Callable, told: str) -> None:
    options = written(tmp_path / "toy", change(toy_rows()))
    with pytest.raises(DataError, match=told) as error:
        read_tabular(options)
    assert "\n" not in str(error.value)
    assert "accept_altered=true" in str(error.value) or "mend" in str(error.value)
    dataset = read_tabular(replace(options, accept_altered=True))
    assert any(told in note and note.startswith("altered copy") for note in dataset.notes)
    assert np.isfinite(dataset.rows).all()


def raw(folder: Path, rows: list[list[str]]) -> RawTable:
    options = written(folder, rows)
    return read_cells(folder / "toy.csv", read_card(options.card), Problems(accepted=False))


def test_the_encoding_knows_the_training_rows_alone(tmp_path: Path) -> None:
    train = range(80)
    changed = [[row[0], "99999", "-7", "Atlantis", *row[4:]] if place >= 80 else row for place, row in enumerate(toy_rows())]
    before, after = (encode(raw(tmp_path / "toy", rows), train) for rows in (toy_rows(), changed))
    assert before.fields == after.fields
    assert np.array_equal(before.rows_NF[:80], after.rows_NF[:80])
    assert before.rows_NF[:80, 0].mean() == pytest.approx(0, abs=1e-5)
    assert before.rows_NF[:80, 0].std() == pytest.approx(1, abs=1e-5)
    assert after.rows_NF[80, 0] > 100


def test_a_category_that_no_training_row_has_counts_as_a_rare_one(tmp_path: Path) -> None:
    rows = [[*row[:3], "Atlantis", *row[4:]] if place == 100 else row for place, row in enumerate(toy_rows())]
    encoded = encode(raw(tmp_path / "toy", rows), range(80))
    assert encoded.notes[-1] == "column 'town': 1 rows have categories that no training row has; taken as rare ones"
    towns = [column for column, field in enumerate(encoded.fields) if field == "town"]
    assert len(towns) == 3, "Bern, Rome, and the villages together"
    assert np.array_equal(encoded.rows_NF[100, towns], encoded.rows_NF[0, towns])
    assert encoded.rows_NF[:, towns].sum(axis=1).tolist() == [1.0] * 120


def test_odd_columns_and_small_splits_are_told(tmp_path: Path) -> None:
    rows = [[*row[:2], "?", *row[3:]] for row in toy_rows()]
    dataset = read_tabular(written(tmp_path / "toy", rows, CARD.replace("missing = 3", "missing = 120")))
    notes = "\n".join(dataset.notes)
    assert "1 columns have no value in the training rows and are left out: size" in notes
    assert "1 columns have one value in the training rows and tell nothing: same" in notes
    assert "warning: split 'id_val' has fewer than 10 rows of 'ill' (6)" in notes
    assert "size" not in dataset.fields


def test_adding_a_row_renames_no_other(tmp_path: Path) -> None:
    few = read_tabular(replace(written(tmp_path / "few", toy_rows()[1:]), accept_altered=True))
    more = read_tabular(written(tmp_path / "more", toy_rows()))
    ids = [{sample.sample_id for split in d.splits.values() for sample in split.samples} for d in (few, more)]
    assert ids[0] < ids[1]
    assert len(ids[1]) == 120


def test_equal_rows_in_two_splits_are_counted_and_named(tmp_path: Path) -> None:
    rows = toy_rows()
    twins = [[row[0] + "0", *row[1:]] for row in rows]
    card = CARD.replace("120", "240").replace("positives = 40", "positives = 80").replace("missing = 3", "missing = 6")
    notes = read_tabular(written(tmp_path / "toy", rows + twins, card)).notes
    assert any("rows of equal features are in two splits (first: train: " in note for note in notes)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (('separator = ";"', 'separator = ","'), "line 1 has one cell with the separator ',', but 6 with ';'"),
        (('target = "ill"', 'target = "il"'), "has no column 'il', the target in the card.*did you mean 'ill'"),
        (('"town"', '"twon"'), "has no column 'twon', the categorical in the card.*did you mean 'town'"),
        (('categorical = ["town"]', ""), "column 'town' has 'village 0', expected a number"),
        (('ill = ["1", "2"]', 'ill = ["1"]'), r"has values that belong to no class \(2\), expected 0, 1"),
        (('ill = ["1", "2"]', 'ill = ["*"]\nother = ["*"]'), "at most one with"),
        (('file = "toy.csv"', 'file = "tyo.csv"'), "there is no file 'tyo.csv' of 'Toy'"),
        (('title = "Toy"', 'titel = "Toy"'), "toy.toml: Object contains unknown field `titel`|missing required field `title`"),
        (('separator = ";"', 'separator = ""'), "expected one character"),
    ],
)
def test_one_line_for_a_wrong_card(tmp_path: Path, change: tuple[str, str], line: str) -> None:
    with pytest.raises(DataError, match=line) as error:
        read_tabular(written(tmp_path / "toy", toy_rows(), CARD.replace(*change)))
    assert "\n" not in str(error.value)


def test_the_template_reads_a_table_with_all_that_it_mentions(tmp_path: Path) -> None:
    text = (resources.files("flyp_saflex.assets") / "tabular/my-table.toml").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert all(line.startswith("# ") for line in lines if line.startswith("#"))
    whole = "\n".join([lines[0], *(line.removeprefix("# ") for line in lines[1:])])
    for key, value in (("rows", 60), ("features", 2), ("positives", 20), ("missing", 3)):
        whole = re.sub(rf"^{key} = \d+$", f"{key} = {value}", whole, flags=re.MULTILINE)
    (tmp_path / "mine.toml").write_text(whole, encoding="utf-8")
    rng = np.random.default_rng(0)
    size = ["NA", "?", "", *(f"{value:.3f}" for value in rng.normal(size=57))]
    rows = [f"{rng.normal():.3f},{size[place]},{int(place % 3 == 0)}" for place in range(60)]
    (tmp_path / "my_table.csv").write_text("\n".join(["age,size,label", *rows]), encoding="utf-8")
    options = DataConfig(name="tabular", root=str(tmp_path), card=str(tmp_path / "mine.toml"), select_fraction=0.2)
    assert load_dataset(options).class_names == ("healthy", "ill")
    assert {field.name for field in fields(Card) if field.name != "paper"} == set(parse_toml(whole, "the template", DataError))


def test_no_card_and_an_unknown_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs data.card"):
        read_tabular(DataConfig(name="tabular", root=str(tmp_path)))
    with pytest.raises(DataError, match=r"data.card = 'qsr'.*did you mean 'qsar'"):
        read_tabular(DataConfig(name="tabular", root=str(tmp_path), card="qsr"))
    with pytest.raises(DataError, match=r"no file 'biodeg.csv' of 'QSAR' \(Table 6 of the paper links to https"):
        read_tabular(DataConfig(name="tabular", root=str(tmp_path), card="qsar"))


@pytest.mark.parametrize("name", [name for name in recipe.shipped() if name.startswith("tabular-")])
def test_a_recipe_per_card_has_the_papers_settings(name: str) -> None:
    config = recipe.load(name)
    assert config.data.card in shipped_cards()
    assert (config.data.select_fraction, config.data.test_fraction) == (0.15, 0.2)
    assert (config.saflex.temperature, config.saflex.penalty) == (0.01, 1.0)
