"""The index beside a manifest: edits read through it equal those read row by row, and it is used only where it fits."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.storage import manifest_index
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.edits import Edits
from flyp_saflex.storage.manifest import ManifestReader
from flyp_saflex.storage.manifest_index import INDEX


@pytest.fixture
def indexed(monkeypatch):
    """An index is made of every manifest, in blocks of a few rows."""
    monkeypatch.setattr(manifest_index, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(manifest_index, "BLOCK_BYTES", 500)


def row(number: int, **fields) -> dict:
    name = f"images/{number % 3}/{number}.png"
    values = {"file_name": name, "aug_id": name, "dataset": "folder", "source_id": f"{number // 2}.jpg", "label": number // 2 % 2}
    return {**values, "instruction": f"make it snöw {number}", "seed": number, "size": [8, 8], **fields}


def write(folder: Path, rows, *, end: str = "\n") -> AugmentCache:
    folder.mkdir(parents=True, exist_ok=True)
    for one in rows:
        if isinstance(one, dict) and not str(one["file_name"]).startswith("/"):
            path = folder / one["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + end, encoding="utf-8")
    return AugmentCache.at(folder, "folder")


def slow(folder: Path):
    """The obvious way: row by row."""
    try:
        return tuple(ManifestReader(folder).checked())
    except DataError as error:
        return str(error)


def fast(folder: Path):
    try:
        return AugmentCache.at(folder, "folder").edits
    except DataError as error:
        return str(error)


REGULAR = [row(number) for number in range(20)]
ODD = {
    "regular": REGULAR,
    "empty": [],
    "blank lines": [*REGULAR[:3], "", "  ", *REGULAR[3:]],
    "without aug_id": [{key: value for key, value in one.items() if key != "aug_id"} for one in REGULAR],
    "own aug_ids": [{**one, "aug_id": f"edit {number}"} for number, one in enumerate(REGULAR)],
    "twice": [*REGULAR, row(3)],
    "one aug_id of two files": [*REGULAR, row(30, aug_id="images/0/3.png")],
    "no JSON": [*REGULAR[:4], "{", *REGULAR[4:]],
    "a list": [*REGULAR[:4], "[1]", *REGULAR[4:]],
    "no source": [*REGULAR, row(30, source_id="")],
    "label as text": [*REGULAR, row(30, label="cat")],
    "label as fraction": [*REGULAR, row(30, label=1.0)],
    "label as truth value": [*REGULAR, row(30, label=True)],
    "huge label": [*REGULAR, row(30, label=2**70)],
    "outside": [*REGULAR, row(30, file_name="../30.png")],
    "absolute": [*REGULAR, row(30, file_name="/tmp/30.png")],
    "backslash": [*REGULAR, row(30, file_name="images\\30.png")],
    "dots": [*REGULAR, row(30, file_name="./images//30.png")],
    "dataset is no text": [*REGULAR, row(30, dataset=None)],
    "beside the images": [*REGULAR, row(30, file_name="30.png")],
}


@pytest.mark.parametrize("case", ODD)
def test_edits_by_columns_equal_edits_row_by_row(case: str, tmp_path: Path, indexed):
    write(tmp_path / "entry", list(ODD[case]))
    expected = slow(tmp_path / "entry")
    for _ in range(2):  # without and with an index
        found = fast(tmp_path / "entry")
        assert found == expected
    regular = ("regular", "empty", "blank lines", "without aug_id", "own aug_ids", "beside the images")
    assert isinstance(found, Edits) == (case in regular)
    assert (tmp_path / "entry" / INDEX).is_file() == (case in regular)


@pytest.mark.parametrize("end", ["", "\n" + json.dumps(row(40))[:30]])
def test_a_last_line_that_was_cut_off_is_read_row_by_row(end: str, tmp_path: Path, indexed):
    cache = write(tmp_path, REGULAR, end=end)
    assert cache.edits == slow(tmp_path)
    assert len(cache.notes) == (2 if end else 1)
    assert not (tmp_path / INDEX).exists()


def test_a_missing_image_is_seen_though_the_index_fits(tmp_path: Path, indexed):
    assert len(write(tmp_path, REGULAR)) == 20
    (tmp_path / "images" / "1" / "7.png").unlink()
    assert fast(tmp_path) == slow(tmp_path)
    assert "7.png is missing" in fast(tmp_path)


def test_a_small_manifest_has_no_index(tmp_path: Path):
    assert isinstance(write(tmp_path, REGULAR).edits, Edits)
    assert not (tmp_path / INDEX).exists()


def test_the_index_is_made_once_and_read_instead_of_the_rows(tmp_path: Path, indexed, monkeypatch):
    expected = tuple(write(tmp_path, REGULAR).edits)
    made = (tmp_path / INDEX).stat().st_mtime_ns
    monkeypatch.setattr(manifest_index, "_parse", lambda *args: pytest.fail("the manifest was read row by row"))
    assert fast(tmp_path) == expected
    assert (tmp_path / INDEX).stat().st_mtime_ns == made


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "tail", "other"])
def test_an_index_that_is_damaged_is_thrown_away(damage: str, tmp_path: Path, indexed):
    write(tmp_path, REGULAR).edits  # noqa: B018 - makes the index
    index = tmp_path / INDEX
    data = index.read_bytes()
    middle = data.index(b"images/1/7.png")
    damaged = {
        "empty": b"",
        "cut": data[:-40],
        "bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "tail": data + b"x",
        "other": b"not an Arrow file, but as long as it has to be to be read",
    }[damage]
    index.write_bytes(damaged)
    assert fast(tmp_path) == slow(tmp_path)
    assert index.read_bytes() == data, "a new one is made"


@pytest.mark.parametrize("same_size", [True, False])
def test_an_index_of_an_older_manifest_is_thrown_away(same_size: bool, tmp_path: Path, indexed):
    write(tmp_path, REGULAR).edits  # noqa: B018 - makes the index
    stamp = os.stat(tmp_path / "metadata.jsonl").st_mtime_ns
    rows = [*REGULAR[:-1], row(19, source_id="0.jpg")] if same_size else [*REGULAR, row(20)]
    write(tmp_path, rows)
    os.utime(tmp_path / "metadata.jsonl", ns=(stamp, stamp))
    assert fast(tmp_path) == slow(tmp_path)
    assert fast(tmp_path)[-1].source_id == ("0.jpg" if same_size else "10.jpg")


def test_kills_between_the_writes_leave_a_readable_entry(tmp_path: Path, indexed, monkeypatch):
    write(tmp_path, REGULAR)
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # after the temporary file, before it has its name
        AugmentCache.at(tmp_path).edits  # noqa: B018
    monkeypatch.undo()
    (tmp_path / f".{INDEX}.1.tmp").write_bytes(b"half")
    assert fast(tmp_path) == slow(tmp_path)
    # The manifest grew, and the process was killed before a new index was made.
    with open(tmp_path / "metadata.jsonl", "a", encoding="utf-8") as manifest:
        (tmp_path / row(21)["file_name"]).touch()
        manifest.write(json.dumps(row(21)) + "\n")
    assert fast(tmp_path) == slow(tmp_path)
    assert len(fast(tmp_path)) == 21


def test_an_entry_that_may_only_be_read_needs_no_index(tmp_path: Path, indexed, monkeypatch):
    def refuse(*args, **kwargs):
        raise manifest_index.RunError("read-only")

    monkeypatch.setattr(manifest_index, "atomic_write", refuse)
    assert write(tmp_path, REGULAR).edits == slow(tmp_path)
    assert not (tmp_path / INDEX).exists()


def test_a_manifest_that_is_changed_while_it_is_in_use_is_an_error(tmp_path: Path, indexed):
    edits = write(tmp_path, REGULAR).edits
    assert edits[19].source_id == "9.jpg"
    write(tmp_path, REGULAR[::-1])
    with pytest.raises(DataError, match="was changed while it was in use"):
        edits[19]


def test_edits_are_a_sequence_that_can_be_sent_to_another_process(tmp_path: Path, indexed):
    edits, expected = write(tmp_path, REGULAR).edits, slow(tmp_path)
    assert isinstance(edits, Edits)
    assert (edits[-1], edits[2:9:3], edits.aug_ids) == (expected[-1], expected[2:9:3], [edit.aug_id for edit in expected])
    assert edits.select([5, 3]).select([1]) == (expected[3],)
    assert edits.labels == [edit.label for edit in expected]
    assert pickle.loads(pickle.dumps(edits)) == expected
    with pytest.raises(IndexError):
        edits[20]


def dataset(train, test=(), *, label=lambda number: number % 2, name: str = "folder") -> Dataset:
    def split(split_name: str, numbers) -> Split:
        samples = tuple(Sample(sample_id=f"{n}.jpg", item=Path(f"{n}.jpg"), label=label(n)) for n in numbers)
        return Split(name=split_name, role="train" if split_name == "train" else "test", shift="id", samples=samples)

    splits = {"test": split("test", test), "train": split("train", train)}
    return Dataset(name=name, root=Path(), class_names=("a", "b"), splits=splits, templates=("{}",))


@pytest.mark.parametrize("case", ["all", "some in test", "unknown", "other labels", "too few classes", "other dataset"])
@pytest.mark.parametrize("partial", [True, False])
def test_checks_against_a_dataset_are_those_of_single_rows(case: str, partial: bool, tmp_path: Path, indexed, monkeypatch):
    data = {
        "all": dataset(range(10)),
        "some in test": dataset(range(0, 10, 2), range(1, 10, 2)),
        "unknown": dataset(range(7)),
        "other labels": dataset(range(10), label=lambda number: (number + 1) % 2),
        "too few classes": dataset(range(10), label=lambda number: number % 2 * 2),
        "other dataset": dataset(range(10), name="another"),
    }[case]

    def result():
        try:
            return tuple(AugmentCache.at(tmp_path, "folder").check_against(data, partial=partial))
        except DataError as error:
            return str(error)

    write(tmp_path, REGULAR)
    by_columns = result()
    monkeypatch.setattr("flyp_saflex.storage.augment_cache.read_edits", lambda reader: None)
    assert by_columns == result()
