"""The record of a run's data: the same data wherever it lies, and the first difference of any other."""

from dataclasses import replace
from pathlib import Path

import pytest

from flyp_saflex.errors import RunError
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.storage.data_record import (
    FILE,
    DataRecord,
    class_difference,
    difference,
    other_data,
    read_record,
    record_of,
)

SPLITS = {"train": ("train", range(6)), "id_val": ("select", range(6, 9)), "id_test": ("test", range(9, 15))}


def dataset(root: Path, names: tuple[str, ...] = ("cat", "dog", "fox"), *, size: int = 3, extra: int = 0) -> Dataset:
    """Fifteen files in three splits; `extra` more in id_test."""
    root.mkdir(parents=True, exist_ok=True)

    def sample(number: int) -> Sample:
        path = root / f"{number:02d}.png"
        path.write_bytes(b"x" * (size + number))
        return Sample(sample_id=path.name, item=path, label=number % 3)

    splits = {}
    for name, (role, numbers) in SPLITS.items():
        more = range(15, 15 + extra) if name == "id_test" else ()
        splits[name] = Split(name=name, role=role, shift="id", samples=tuple(sample(n) for n in (*numbers, *more)))  # type: ignore[arg-type]
    return Dataset(name="folder", root=root, class_names=names, splits=splits, templates=("a photo of a {}.",))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = record_of(dataset(tmp_path / "home"))
    assert read_record(tmp_path) is None
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    assert record.splits["id_test"].images == 6
    assert record.splits["id_test"].per_class == (2, 2, 2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": "x"}', b"\xff\xfe"])
def test_a_damaged_record_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RunError, match="is not what train writes") as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_place_order_and_cuts_do_not_count(tmp_path: Path) -> None:
    data = dataset(tmp_path / "home")
    moved = dataset(tmp_path / "elsewhere" / "deep")
    backwards = {name: replace(split, samples=split.samples[::-1]) for name, split in data.splits.items()}
    few = {"train": replace(data.train, samples=data.train.samples[:2])}
    record = record_of(data)
    for same in (moved, replace(data, splits=backwards), replace(data, splits=few, whole=data.splits)):
        assert record_of(same) == record
        assert difference(record, record_of(same)) == ""


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("dog", "cat", "fox"), {}, "class 0 was 'cat' and is 'dog'"),
        (("cat", "dog", "fox", "yak"), {}, "3 classes became 4: 'yak' is new"),
        (("cat", "dog", "fox"), {"extra": 3}, "split 'id_test': 6 images became 9"),
        (("cat", "dog", "fox"), {"size": 4}, "split 'train': files of the same names have other sizes"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, names: tuple[str, ...], options: dict[str, int], words: str) -> None:
    old = record_of(dataset(tmp_path / "home"))
    assert difference(old, record_of(dataset(tmp_path / "away", names, **options))) == words


def test_a_label_that_moved_is_a_difference(tmp_path: Path) -> None:
    data = dataset(tmp_path / "home")
    first, *others = data.train.samples
    changed = replace(data.train, samples=(replace(first, label=2), *others))
    found = record_of(replace(data, splits={**data.splits, "train": changed}))
    assert difference(record_of(data), found) == "split 'train': other images or labels"


def test_equal_classes_have_no_difference() -> None:
    assert class_difference(("cat", "dog"), ("cat", "dog")) == ""
    assert class_difference(("cat", "dog"), ("cat",)) == "2 classes became 1: 'dog' is gone"


def splits_as(record: DataRecord, **names: str) -> DataRecord:
    """Rename splits of a record."""
    return DataRecord(
        name=record.name,
        class_names=record.class_names,
        templates=record.templates,
        fingerprint="",
        images=record.images,
        splits={names.get(name, name): split for name, split in record.splits.items()},
    )


def test_a_split_that_was_added_belongs_to_the_data_and_other_splits_do_not(tmp_path: Path) -> None:
    own = record_of(dataset(tmp_path / "home"))
    away = record_of(dataset(tmp_path / "away", extra=3))
    added = record_of(dataset(tmp_path / "home"))
    added.splits["sketch"] = away.splits["id_test"]
    assert other_data(own, added, ["id_test", "sketch"], sizes=True) == ""
    assert other_data(own, away, ["id_test"], sizes=True) == "split 'id_test': 6 images became 9"
    assert other_data(own, away, ["id_val"], sizes=True) == ""
    renamed = splits_as(away, train="a", id_val="b", id_test="c")
    assert other_data(own, renamed, ["c"], sizes=True) == "it has no split of the run ('train', 'id_val', 'id_test')"
