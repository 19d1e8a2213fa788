"""Tables of images: columns, roles, and errors that name file, row and column."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from flyp_saflex.config import DataConfig
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for index in range(8):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(root / f"{index}.png")
    return root


def write(images: Path, text: str, name: str = "table.csv") -> DataConfig:
    (images / name).write_text(text, encoding="utf-8")
    return DataConfig(name="table", root=str(images), table=str(images / name), select_fraction=0, test_fraction=0)


SPLIT = "path,label,split\n0.png,cat,train\n1.png,dog,train\n2.png,cat,val\n3.png,dog,test\n4.png,dog,ood_night\n"


def with_split(config: DataConfig, **changes) -> DataConfig:
    import dataclasses

    return dataclasses.replace(config, split_column="split", **changes)


def test_split_column_gives_roles(images: Path):
    dataset = load_dataset(with_split(write(images, SPLIT)))
    assert {name: (split.role, split.shift, len(split)) for name, split in dataset.splits.items()} == {
        "train": ("train", "id", 2),
        "val": ("select", "id", 1),
        "test": ("test", "id", 1),
        "ood_night": ("test", "ood", 1),
    }
    assert dataset.class_names == ("cat", "dog")


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_other_formats_read_the_same(images: Path, kind: str):
    expected = load_dataset(with_split(write(images, SPLIT)))
    if kind == "tsv":
        config = write(images, SPLIT.replace(",", "\t"), "table.tsv")
    else:
        pd.read_csv(images / "table.csv").to_parquet(images / "table.parquet")
        config = DataConfig(name="table", root=str(images), table="table.parquet")
    assert load_dataset(with_split(config)).splits == expected.splits


def test_domains_captions_and_numbers(images: Path):
    text = "file,y,site,words\n" + "".join(f"{i}.png,{i % 2},{'ab'[i // 4]},{'a red one' if i == 0 else ''}\n" for i in range(8))
    write(images, text)
    config = DataConfig(
        name="table",
        table=str(images / "table.csv"),  # without data.root, paths are relative to the table's folder
        path_column="file",
        label_column="y",
        domain_column="site",
        caption_column="words",
        train_domains=("a",),
        test_domains=("b",),
        select_fraction=0,
        test_fraction=0,
    )
    dataset = load_dataset(config)
    assert (len(dataset.train), len(dataset.splits["b"]), dataset.splits["b"].shift) == (4, 4, "ood")
    assert dataset.train.samples[0].caption == "a red one"
    assert dataset.train.samples[1].caption is None
    assert dataset.class_names == ("0", "1")


def test_indices_go_with_a_class_file(images: Path, tmp_path: Path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "templates.txt").write_text("a {}\n")
    (prompts / "classes.txt").write_text("cat\ndog\n")
    import dataclasses

    config = dataclasses.replace(write(images, "path,label\n0.png,1\n1.png,0\n"), prompts=str(prompts))
    dataset = load_dataset(config)
    assert [sample.label for sample in dataset.train.samples] == [1, 0]
    config = dataclasses.replace(write(images, "path,label\n0.png,1\n1.png,0\n2.png,2\n"), prompts=str(prompts))
    with pytest.raises(DataError, match=r"row 4, column 'label' is 2, but there are 2 classes \(0\.\.1\)"):
        load_dataset(config)


def test_labels_written_as_fractions_are_indices_and_told(images: Path):
    dataset = load_dataset(write(images, "path,label\n0.png,0.0\n1.png,1.0\n2.png,2.0\n"))
    assert dataset.class_names == ("0", "1", "2")
    assert any("read as whole numbers (0.0 as 0)" in note for note in dataset.notes)
    assert any("3 of 3 class names are only numbers" in note for note in dataset.notes)
    assert load_dataset(write(images, "path,label\n0.png,1.5T\n1.png,3.0T\n")).class_names == ("1.5T", "3.0T")


@pytest.mark.parametrize("labels", ["1234", "123", "2134"])
def test_labels_that_run_from_1_are_refused_as_such(images: Path, tmp_path: Path, labels: str):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "templates.txt").write_text("a {}\n")
    (prompts / "classes.txt").write_text("cat\ndog\nfox\nowl\n")
    text = "path,label\n" + "".join(f"{index}.png,{label}\n" for index, label in enumerate(labels))
    config = write(images, text)
    with pytest.raises(
        DataError, match=f"labels run from 1 to {len(labels)} and there are 4 classes .* counted from 1; subtract 1"
    ):
        load_dataset(DataConfig(name="table", root=config.root, table=config.table, prompts=str(prompts)))


def test_labels_in_two_unicode_forms_are_one_class(images: Path):
    nfc, nfd = (unicodedata.normalize(form, "Köter") for form in ("NFC", "NFD"))
    dataset = load_dataset(write(images, f"path,label\n0.png,{nfc}\n1.png,{nfd}\n2.png,dog\n"))
    assert dataset.class_names == (nfc, "dog")
    assert [sample.label for sample in dataset.train.samples] == [0, 0, 1]


def test_a_file_in_another_spelling_is_named(images: Path):
    with pytest.raises(DataError, match=r"are missing .*0\.PNG \(there is '0\.png', the name in another case\)"):
        load_dataset(write(images, "path,label\n0.PNG,cat\n"))


def test_very_long_cells_are_quoted_short(images: Path):
    for text in (f"path,label\n{'../' * 5000}x,cat\n", f"path,label\n0.png,{'9' * 5000},x\n"):
        config = write(images, text)
        with pytest.raises(DataError) as caught:
            load_dataset(config)
        assert len(str(caught.value)) < 600


BAD = {
    "no column": ("file,label\n0.png,cat\n", "no column 'path'.*columns: file, label"),
    "column twice": ("path,label,label\n0.png,cat,dog\n", "column 'label' is there 2 times"),
    "empty path": ("path,label\n0.png,cat\n,cat\n", "row 3, column 'path' is empty"),
    "empty label": ("path,label\n0.png,cat\n1.png,\n", "row 3, column 'label' is empty"),
    "outside": ("path,label\n../secret.png,cat\n", "row 2, column 'path' is '../secret.png', a path outside"),
    "outside in disguise": ("path,label\nx/../../secret.png,cat\n", "a path outside"),
    "absolute": ("path,label\n/etc/secret.png,cat\n", "a path outside"),
    "twice": ("path,label\n0.png,cat\n./0.png,cat\n", "row 3, column 'path': './0.png' is already in row 2"),
    "no row": ("path,label\n", "has a header but no row"),
    "ragged": ("path,label\n0.png,cat\n1.png,cat,dog,bird\n", "row 3: 4 cells where the header has 2"),
    "missing image": ("path,label\n0.png,cat\nnope.png,cat\n", r"are missing \(1 of 2 in train\), first: .*nope.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused_in_one_line(case: str, images: Path):
    text, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(write(images, text))
    assert "\n" not in str(caught.value)
    assert "table" in str(caught.value)


def test_bad_splits(images: Path):
    unseen = SPLIT + "5.png,brid,test\n"
    with pytest.raises(DataError, match="row 7, column 'label' is 'brid', a class that no training row"):
        load_dataset(with_split(write(images, unseen)))
    with pytest.raises(DataError, match=r"'0\.png' is already in row 2; an image belongs to one row and one split"):
        load_dataset(with_split(write(images, SPLIT + "0.png,cat,test\n")))
    with pytest.raises(DataError, match="row 7, column 'split' is empty"):
        load_dataset(with_split(write(images, SPLIT + "5.png,cat,\n")))
    with pytest.raises(DataError, match=r"no row has 'train' in column 'split' \(found: test\)"):
        load_dataset(with_split(write(images, "path,label,split\n0.png,cat,test\n")))
    with pytest.raises(DataError, match="set one of them"):
        load_dataset(with_split(write(images, SPLIT), train_domains=("a",)))
    with pytest.raises(DataError, match=r"need data\.domain_column"):
        load_dataset(DataConfig(name="table", table=str(images / "table.csv"), train_domains=("a",)))


def test_bad_files(images: Path):
    with pytest.raises(DataError, match=r"data\.table is empty"):
        load_dataset(DataConfig(name="table", root=str(images)))
    with pytest.raises(DataError, match="no such file"):
        load_dataset(DataConfig(name="table", root=str(images), table="nope.csv"))
    with pytest.raises(DataError, match=r"the ending '\.xlsx' is unknown"):
        load_dataset(write(images, "x", "table.xlsx"))
    (images / "latin.csv").write_bytes("path,label\n0.png,h\xe4mster\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        load_dataset(DataConfig(name="table", root=str(images), table="latin.csv"))
    (images / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(DataConfig(name="table", root=str(images), table="broken.parquet"))


def test_groups_are_values_of_columns_the_label_among_them(images: Path):
    rows = "".join(f"{n}.png,{n % 2},{n // 2 % 2}.0,{'train' if n < 4 else 'test'}\n" for n in range(8))
    config = with_split(write(images, f"path,y,place,split\n{rows}"), label_column="y", group_columns=("y", "place"))
    groups = ["y=0, place=0", "y=1, place=0", "y=0, place=1", "y=1, place=1"]
    for split in load_dataset(config).splits.values():
        assert [sample.group for sample in split.samples] == groups
    assert {sample.domain for sample in load_dataset(config).train.samples} == {""}
    with pytest.raises(DataError, match="no column 'plaec'; did you mean 'place'"):
        load_dataset(with_split(config, group_columns=("plaec",)))
