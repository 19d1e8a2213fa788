"""The augment cache: what is written is read back, interruptions are invisible, strangers are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.storage.augment_cache import AugmentCache

SOURCES = ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg")


def fill(folder: Path, dataset: str = "folder", sources=SOURCES) -> AugmentCache:
    cache = AugmentCache.create(folder, dataset)
    for number, source in enumerate(sources):
        cache.append(
            Image.new("RGB", (8, 6), (number * 40, 0, 0)),
            {
                "file_name": f"images/snow/{number}.png",
                "source_id": source,
                "label": int(source.startswith("dog")),
                "instruction": "make it snow",
                "seed": 7 + number,
                "model": "an/editor",
            },
        )
    cache.finish()
    return cache


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return fill(tmp_path / "folder" / "snow").folder


def dataset(name: str = "folder", ids=SOURCES, held: tuple[str, ...] = ()) -> Dataset:
    def split(split_name, role, chosen):
        rows = tuple(Sample(sample_id=one, item=Path(one), label=int(one.startswith("dog"))) for one in chosen)
        return Split(name=split_name, role=role, shift="id", samples=rows)

    splits = {"train": split("train", "train", [one for one in ids if one not in held]), "test": split("test", "test", held)}
    return Dataset(name=name, root=Path("."), class_names=("cat", "dog"), splits=splits, templates=("a {}",))


def lines(entry: Path, file: str = "metadata.jsonl") -> list[str]:
    return (entry / file).read_text().splitlines()


def test_path_alone_opens_the_entry_that_it_names(entry: Path):
    assert AugmentCache.open(entry).edits == AugmentCache.open(entry.parents[1], "folder", "snow").edits


def test_what_is_written_is_read_back(entry: Path):
    cache = AugmentCache.at(entry)
    assert (cache.dataset, cache.done, len(cache), cache.notes) == ("folder", True, 3, ())
    edit = cache.edits[1]
    assert (edit.aug_id, edit.source_id, edit.label, edit.instruction) == ("images/snow/1.png", "cat/1.jpg", 0, "make it snow")
    assert edit.provenance == {"dataset": "folder", "seed": 8, "model": "an/editor"}
    with Image.open(edit.path) as image:
        assert image.getpixel((0, 0)) == (40, 0, 0)
    assert "images/snow/1.png" in cache
    assert list(json.loads(lines(entry)[0])) == [
        "file_name",
        "aug_id",
        "dataset",
        "source_id",
        "label",
        "instruction",
        "seed",
        "model",
    ]
    assert not [name for _, _, names in os.walk(entry) for name in names if name.endswith(".tmp")]


def test_open_finds_the_only_entry(tmp_path: Path, entry: Path):
    assert AugmentCache.open(tmp_path, "folder").folder == entry
    assert AugmentCache.open(str(tmp_path), "folder", "snow").folder == entry
    fill(tmp_path / "folder" / "rain")
    with pytest.raises(DataError, match=r"holds 2 entries \(rain, snow\); choose one with cache\.key"):
        AugmentCache.open(tmp_path, "folder")
    with pytest.raises(DataError, match="no entry 'snwo'; did you mean 'snow'"):
        AugmentCache.open(tmp_path, "folder", "snwo")
    with pytest.raises(DataError, match="holds no entry"):
        AugmentCache.open(tmp_path, "cub")
    with pytest.raises(DataError, match="is no augment cache entry"):
        AugmentCache.at(tmp_path)


def test_hugging_face_reads_it(entry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the package `datasets` is not installed")
    AugmentCache.at(entry).write_scores([{"aug_id": "images/snow/0.png", "keep": True}])
    rows = datasets.load_dataset("imagefolder", data_dir=str(entry), cache_dir=str(tmp_path / "hf"), split="train")
    assert len(rows) == 3
    by_source = {row["source_id"]: row for row in rows}
    assert set(by_source) == set(SOURCES)
    assert by_source["cat/1.jpg"]["image"].getpixel((0, 0)) == (40, 0, 0)
    assert by_source["dog/0.jpg"]["label"] == 1


def test_an_interrupted_row_is_left_out_and_made_again(entry: Path):
    manifest = entry / "metadata.jsonl"
    (entry / "DONE").unlink()
    manifest.write_bytes(manifest.read_bytes()[:-20])
    cache = AugmentCache.at(entry)
    assert len(cache) == 2
    assert any("line 3 was cut off" in note for note in cache.notes)
    assert any("unfinished" in note for note in cache.notes)
    again = AugmentCache.create(entry, "folder")
    assert "images/snow/1.png" in again
    assert "images/snow/2.png" not in again
    row = {"file_name": "images/snow/2.png", "source_id": "dog/0.jpg", "label": 1}
    again.append(Image.new("RGB", (8, 6)), row)
    again.finish()
    assert [edit.source_id for edit in AugmentCache.at(entry).edits] == list(SOURCES)
    assert AugmentCache.at(entry).notes == ()


def test_a_failed_image_leaves_no_row(entry: Path):
    class Unsavable:
        def save(self, fp, format=None):
            fp.write(b"half")
            raise OSError(28, "No space left on device")

    cache = AugmentCache.create(entry, "folder")
    with pytest.raises(DataError, match=r"cannot be written: .*No space left on device"):
        cache.append(Unsavable(), {"file_name": "images/new.png", "source_id": "cat/0.jpg", "label": 0})
    assert len(AugmentCache.at(entry)) == 3
    assert not (entry / "images" / "new.png").exists()
    assert not list((entry / "images").glob(".*"))


def change(entry: Path, line: int, **fields: object) -> None:
    rows = lines(entry)
    row = json.loads(rows[line - 1]) | fields
    rows[line - 1] = json.dumps({key: value for key, value in row.items() if value is not None})
    (entry / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def spoil(entry: Path, line: int) -> None:
    rows = lines(entry)
    rows[line - 1] = rows[line - 1][:-5]
    (entry / "metadata.jsonl").write_text("\n".join(rows) + "\n")


BAD = {
    "broken line": (lambda e: spoil(e, 2), "line 2: no valid JSON row"),
    "broken last line with its newline": (lambda e: spoil(e, 3), "line 3: no valid JSON row"),
    "no source": (lambda e: change(e, 2, source_id=None), "line 2: 'source_id' is None, expected text"),
    "label as text": (lambda e: change(e, 2, label="cat"), "line 2: 'label' is 'cat', expected a class index"),
    "outside": (
        lambda e: change(e, 3, file_name="../../secret.png"),
        r"line 3: file_name '\.\./\.\./secret\.png' points outside",
    ),
    "absolute": (lambda e: change(e, 3, file_name="/etc/secret.png"), "points outside"),
    "twice": (lambda e: change(e, 3, aug_id="images/snow/0.png"), "line 3: 'images/snow/0.png' is already on line 1"),
    "no image": (lambda e: (e / "images/snow/1.png").unlink(), r"line 2: the image .*1\.png is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_manifests_name_the_line(case: str, entry: Path):
    damage, message = BAD[case]
    damage(entry)
    with pytest.raises(DataError, match=message) as caught:
        _ = AugmentCache.at(entry).edits
    assert "\n" not in str(caught.value)


def test_labels_may_be_class_names(entry: Path):
    """A folder that someone made elsewhere: three columns of facts, nothing else."""
    rows = [{"file_name": f"images/snow/{n}.png", "source_id": source, "label": source[:3]} for n, source in enumerate(SOURCES)]
    (entry / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="line 1: 'label' is 'cat', expected a class index"):
        _ = AugmentCache.at(entry).edits
    assert [edit.label for edit in AugmentCache.at(entry).check_against(dataset())] == [0, 0, 1]
    cache = AugmentCache.open(entry.parent.parent, "folder", class_names=("Cat", "dog"))
    assert [edit.label for edit in cache.edits] == [0, 0, 1]
    assert cache.edits[0].provenance == {}
    with pytest.raises(DataError, match=r"line 1: label 'cat' is no class; did you mean 'cats'\? .* write the class index"):
        _ = AugmentCache.at(entry, class_names=("cats", "dog")).edits
    with pytest.raises(DataError, match="label 'cat' stands for several classes"):
        _ = AugmentCache.at(entry, class_names=("cat", "Cat", "dog")).edits


def test_rows_of_writers_under_way_are_read(entry: Path):
    """While several processes write, and when one of them was killed after its rows were merged."""
    whole = AugmentCache.at(entry).edits
    rows = lines(entry)
    part = entry / ".writers" / "1-of-2"
    part.mkdir(parents=True)
    (entry / "metadata.jsonl").write_text(rows[0] + "\n")
    (part / "rows.jsonl").write_text("\n".join(rows) + '\n{"file_na')
    cache = AugmentCache.at(entry)
    assert cache.edits == whole
    assert any("rows.jsonl line 4 was cut off" in note for note in cache.notes)
    (part / "rows.jsonl").write_text(rows[0].replace('"seed":7', '"seed":8') + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: 'images/snow/0\.png' is already on line 1 of .*metadata\.jsonl"):
        _ = AugmentCache.at(entry).edits


def test_an_aug_id_of_its_own_is_kept(entry: Path):
    change(entry, 1, aug_id="a7")
    assert AugmentCache.at(entry).edits[0].aug_id == "a7"
    change(entry, 2, aug_id=None)
    assert AugmentCache.at(entry).edits[1].aug_id == "images/snow/1.png"


def test_new_rows_are_checked(entry: Path):
    cache, image = AugmentCache.create(entry, "folder"), Image.new("RGB", (4, 4))
    for row, message in (
        ({"file_name": "images/snow/0.png", "source_id": "a", "label": 0}, "already holds"),
        ({"file_name": "images/../../a.png", "source_id": "a", "label": 0}, "points outside"),
        ({"file_name": "images/train/a.png", "source_id": "a", "label": 0}, "has the word 'train'"),
        ({"file_name": "images/cat_0_test.png", "source_id": "a", "label": 0}, "has the word 'test'"),
        ({"file_name": "a.png", "source_id": "a", "label": 0}, "below images/"),
        ({"file_name": "images/a.tiff", "source_id": "a", "label": 0}, "expected a \\.png or \\.jpg"),
        ({"file_name": "images/a.png", "label": 0}, "'source_id' is None"),
    ):
        with pytest.raises(DataError, match=message):
            cache.append(image, row)
    with pytest.raises(DataError, match="belongs to the dataset 'folder', not to 'cub'"):
        AugmentCache.create(entry, "cub")


def test_file_names_are_stable_distinct_and_free_of_split_words(tmp_path: Path):
    names = [
        AugmentCache.file_name(f"train/cat/{n}.jpg", text, k) for n in range(20) for text in ("snow", "rain") for k in (0, 1)
    ]
    assert len(set(names)) == 80
    assert names[0] == AugmentCache.file_name("train/cat/0.jpg", "snow")
    cache = AugmentCache.create(tmp_path / "folder" / "x", "folder")
    for name in names:
        cache.append(Image.new("L", (1, 1)), {"file_name": name, "source_id": "train/cat/0.jpg", "label": 0})
    assert len(AugmentCache.at(cache.folder)) == 80


def test_scores_are_keyed_by_aug_id(entry: Path):
    cache = AugmentCache.at(entry)
    with pytest.raises(DataError, match=r"scores\.jsonl: there is no such file"):
        cache.scores()
    names = [edit.aug_id for edit in cache.edits]
    cache.write_scores([{"aug_id": name, "keep": name != names[1], "margin": 0.5} for name in reversed(names)])
    assert cache.scores()[names[0]] == {"aug_id": names[0], "keep": True, "margin": 0.5}
    assert [edit.aug_id for edit in cache.kept()] == [names[0], names[2]]
    cache.write_scores([{"aug_id": names[0], "keep": True}], "other.jsonl")
    with pytest.raises(DataError, match=r"other\.jsonl: there is no row for 'images/snow/1\.png'"):
        cache.kept("other.jsonl")
    cache.write_scores([{"aug_id": name, "keep": "yes"} for name in names])
    with pytest.raises(DataError, match="'keep' is 'yes'"):
        cache.kept()
    cache.write_scores([{"aug_id": "images/else.png", "keep": True}])
    with pytest.raises(DataError, match=r"line 1: aug_id is 'images/else\.png', not in metadata\.jsonl"):
        cache.scores()


def test_only_edits_of_training_images_are_handed_out(entry: Path):
    cache = AugmentCache.at(entry)
    assert len(cache.check_against(dataset())) == 3
    assert [edit.source_id for edit in cache.check_against(dataset(held=("cat/1.jpg",)))] == ["cat/0.jpg", "dog/0.jpg"]


def test_the_cache_of_another_dataset_is_refused(entry: Path):
    cache = AugmentCache.at(entry)
    with pytest.raises(DataError, match=r"was made from the dataset 'folder', but data\.name is 'cub'"):
        cache.check_against(dataset("cub"))
    with pytest.raises(DataError, match=r"1 of 3 edits were made from images that 'folder' in .* lacks \(first: 'cat/1\.jpg'\)"):
        cache.check_against(dataset(ids=("cat/0.jpg", "dog/0.jpg")))
    assert len(cache.check_against(dataset(ids=("cat/0.jpg", "dog/0.jpg")), partial=True)) == 2
    with pytest.raises(DataError, match="3 of 3 edits"):
        cache.check_against(dataset(ids=("x/0.jpg",)), partial=True)
    change(entry, 3, label=0)
    with pytest.raises(DataError, match=r"has the label 0, but its source 'dog/0\.jpg' has 1"):
        AugmentCache.at(entry).check_against(dataset())


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        AugmentCache.create(tmp_path / "file" / "entry", "folder")


def test_scores_with_a_byte_order_mark_are_read(entry: Path):
    rows = "".join(json.dumps({"aug_id": edit.aug_id, "keep": True}) + "\n" for edit in AugmentCache.at(entry).edits)
    (entry / "scores.jsonl").write_text(rows, encoding="utf-8-sig")
    assert len(AugmentCache.at(entry).kept()) == len(SOURCES)
    manifest = entry / "metadata.jsonl"
    manifest.write_text(manifest.read_text(), encoding="utf-8-sig")
    assert len(AugmentCache.at(entry).kept()) == len(SOURCES)


@pytest.mark.parametrize(
    "row", [b"\xff\xfe", b"[" * 50_000, b'{"aug_id": ' + b"9" * 9_000 + b"}", b'{"aug_id": "' + b"x" * 9_000 + b'"}']
)
@pytest.mark.parametrize("file", ["metadata.jsonl", "scores.jsonl"])
def test_rows_of_any_content_are_named_in_one_short_line(row: bytes, file: str, entry: Path):
    (entry / file).write_bytes(row + b"\n")
    with pytest.raises(DataError, match=f"{file} line 1: ") as error:
        _ = AugmentCache.at(entry).edits if file == "metadata.jsonl" else AugmentCache.at(entry).kept()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
