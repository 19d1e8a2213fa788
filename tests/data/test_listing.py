"""Folders: every file is used or left out for a reason, and stray files change no layout."""

from __future__ import annotations

import os
import random
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.listing import IMAGE_SUFFIXES, Folder
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError


def make(root: Path, *folders: str, count: int = 10, start: int = 0) -> Path:
    for number, name in enumerate(folders):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(start, start + count):
            Image.new("RGB", (8, 8), (number * 9 % 256, index * 5 % 256, 7)).save(root / name / f"{index}.png")
    return root


def copy(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(root.rglob("0.png")), root / name)


def read(root: Path, **options):
    return load_dataset(DataConfig(root=str(root), **options))


def ids(dataset) -> set[str]:
    return {sample.sample_id for split in dataset.splits.values() for sample in split.samples}


SIDECARS = {
    "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg": "1 file in @eaDir folders",
    "@eaDir/x.jpg": "1 file in @eaDir folders",
    "__MACOSX/cat/x.png": "1 file in __MACOSX folders",
    "cat/$RECYCLE.BIN/x.png": "1 file in $RECYCLE.BIN folders",
    "cat/#recycle/x.png": "1 file in #recycle folders",
    ".thumbnails/x.png": "1 file in hidden folders",
    "cat/.AppleDouble/deep/x.png": "1 file in hidden folders",
    "cat/thumbs/0.png": "1 file in thumbs folders",
    "cat/.DS_Store": "1 hidden file",
    "cat/._0.png": "1 hidden file",
    "cat/Thumbs.db": "1 Thumbs.db file",
    "dog/desktop.ini": "1 desktop.ini file",
    "notes.txt": "1 .txt file",
    "cat/a movie.mp4": "1 .mp4 file",
    "cat/README": "1 file without an ending",
    "overview.png": "1 image beside the class folders",
    "cat/IMG_1.HEIC": "1 HEIC image: convert them, Pillow does not read HEIC",
}


@pytest.mark.parametrize("name", SIDECARS)
def test_what_is_no_image_of_a_class_is_left_out_and_told(name: str, tmp_path: Path):
    root = make(tmp_path / "r", "cat", "dog")
    expected = ids(read(root))
    copy(root, name)
    dataset = read(root)
    assert ids(dataset) == expected
    assert f"21 files in {root} = 20 in splits + 1 left out ({SIDECARS[name]})" in dataset.notes


def test_pipes_and_broken_links_are_left_out_and_told(tmp_path: Path):
    root = make(tmp_path / "r", "cat", "dog")
    os.mkfifo(root / "cat" / "pipe.png")
    os.symlink("nowhere", root / "cat" / "link.png")
    os.symlink("circle.png", root / "cat" / "circle.png")
    os.symlink("..", root / "cat" / "up")
    os.symlink("..", root / "up")
    (note,) = (note for note in read(root).notes if "files in" in note)
    assert note.startswith(f"25 files in {root} = 20 in splits + 5 left out (")
    assert "1 pipes, sockets or devices" in note
    assert "2 links to nothing" in note
    assert "2 links to a folder above them" in note


def test_links_to_folders_and_files_are_followed(tmp_path: Path):
    root = make(tmp_path / "r", "cat", "dog")
    store = make(tmp_path / "store", "more", "fox", count=7)
    os.symlink(store / "more", root / "cat" / "more")
    os.symlink(store / "fox", root / "fox")
    os.symlink(store / "more" / "0.png", root / "cat" / "one.png")
    dataset = read(root)
    assert sum(len(split) for split in dataset.splits.values()) == 35
    assert "cat/more/6.png" in ids(dataset)
    assert dataset.class_names == ("cat", "dog", "fox")


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_ending_that_counts_as_an_image_is_one_that_pillow_reads(suffix: str):
    Image.init()
    assert Image.registered_extensions()[suffix] in Image.OPEN or suffix in (".apng", ".jfif")


@pytest.mark.parametrize("seed", range(20))
def test_files_found_are_files_told(seed: int, tmp_path: Path):
    """Whatever lies in a tree, the number of files equals those used and those left out."""
    rng = random.Random(seed)
    root = make(tmp_path / "r", "cat", "dog", count=5)
    folders = ["", "cat", "dog", "cat/deep", "dog/deep/er", "cat/@eaDir", ".hidden", "dog/thumbs", "__MACOSX"]
    endings = [".png", ".JPG", ".jfif", ".avif", ".txt", ".HEIC", "", ".db", ".py"]
    for number in range(40):
        stem = rng.choice(["0", "a", ".b", "ä", unicodedata.normalize("NFD", "ä"), "._c"])
        path = root / rng.choice(folders) / f"{stem}{number}{rng.choice(endings)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    total = sum(len(files) for _, _, files in os.walk(root))
    account = Account("files")
    used = list(Folder.at(root).every_image(account))
    assert account.note(len(used)).startswith(f"{total} files = {len(used)} in splits")
    dataset = read(root)
    (note,) = (note for note in dataset.notes if " files in " in note)
    found = re.match(r"(\d+) files in .* = (\d+) in splits(?: \+ (\d+) left out)?", note)
    assert found is not None
    assert [int(number or 0) for number in found.groups()] == [total, len(ids(dataset)), total - len(ids(dataset))]


def test_one_stray_picture_changes_no_layout(tmp_path: Path):
    domains = make(tmp_path / "domains", *(f"{domain}/{name}" for domain in ("photo", "sketch") for name in ("cat", "dog")))
    splits = make(tmp_path / "splits", "train/cat", "train/dog", "val/cat", "val/dog")
    for root, folder in ((domains, "photo"), (splits, "train")):
        shutil.copy(root / folder / "cat" / "0.png", root / folder / "overview.png")
    with pytest.raises(
        DataError, match=r"folders of folders \(photo, sketch\) \(1 images lie directly below them\).*train_domains"
    ):
        read(domains)
    dataset = read(splits)
    assert (dataset.class_names, len(dataset.train)) == (("cat", "dog"), 20)
    assert f"41 files in {splits} = 40 in splits + 1 left out (1 image beside the class folders)" in dataset.notes
    dataset = read(domains, train_domains=("photo",), test_domains=("sketch",))
    assert "1 image beside the class folders" in dataset.notes[-1]


def test_classes_with_folders_of_their_own_stay_classes(tmp_path: Path):
    root = make(tmp_path / "r", "cat", "dog", "cat/2019", "cat/2020", "dog/attic", count=4)
    dataset = read(root)
    assert dataset.class_names == ("cat", "dog")
    assert len(ids(dataset)) == 20


def test_images_of_a_split_without_class_folders_are_named(tmp_path: Path):
    root = make(tmp_path / "r", "train/cat", "train/dog", "val/cat", "test", count=5)
    with pytest.raises(DataError, match=r"split 'test' in .* holds 5 images without class folders"):
        read(root)


def test_unused_domains_and_folders_beside_splits_are_counted(tmp_path: Path):
    root = make(tmp_path / "r", *(f"{domain}/{name}" for domain in "pqs" for name in ("cat", "dog")))
    (root / "q" / "list.csv").touch()
    dataset = read(root, train_domains=("p",), test_domains=("s",))
    assert dataset.notes[-1] == (
        f"61 files in {root} = 40 in splits + 21 left out (20 images of domains that no data.*_domains names, 1 .csv file)"
    )
    root = make(tmp_path / "t", "train/cat", "train/dog", "val/cat")
    (root / "labels").mkdir()
    (root / "labels" / "all.json").touch()
    dataset = read(root)
    assert f"folders in {root} without an image are taken for no split: labels" in dataset.notes
    assert f"31 files in {root} = 30 in splits + 1 left out (1 .json file)" in dataset.notes


def test_a_class_whose_files_cannot_be_read_says_which_they_are(tmp_path: Path):
    root = make(tmp_path / "r", "cat", "dog")
    (root / "fox").mkdir()
    for number in range(8):
        (root / "fox" / f"{number}.heic").touch()
    with pytest.raises(DataError, match=r"1 of 3 classes have no training image \('fox'\); .* 8 HEIC images: convert them"):
        read(root)


def test_names_that_differ_in_their_unicode_form_are_one(tmp_path: Path):
    nfc, nfd = (unicodedata.normalize(form, "Köter") for form in ("NFC", "NFD"))
    root = make(tmp_path / "a", f"train/{nfc}", "train/dog", f"test/{nfd}", "test/dog", count=3)
    dataset = read(root)
    assert dataset.class_names == (nfc, "dog")
    assert dataset.splits["test"].class_counts() == {0: 3, 1: 3}
    assert all(sample.path.is_file() for split in dataset.splits.values() for sample in split.samples)
    root = make(tmp_path / "b", nfc, nfd, "dog")
    dataset = read(root)
    assert dataset.class_names == (nfc, "dog")
    assert len(ids(dataset)) == 30
    assert "folders whose names differ in their Unicode form only are one: Köter" in dataset.notes
    root = make(tmp_path / "c", f"{nfd}/cat", f"{nfd}/dog", "x/cat", "x/dog")
    assert len(read(root, train_domains=("x",), test_domains=(nfc,)).splits[nfc]) == 20


def test_file_names_that_are_not_utf8_are_spelt_out_and_class_names_refused(tmp_path: Path):
    root = make(tmp_path / "r", "cat", "dog")
    strange = os.path.join(os.fsencode(root / "cat"), b"caf\xe9.png")
    try:
        os.rename(root / "cat" / "0.png", strange)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert r"cat/caf\udce9.png" in ids(read(root))
    os.rename(os.fsencode(root / "dog"), os.path.join(os.fsencode(root), b"d\xf6g"))
    with pytest.raises(DataError, match="is not UTF-8, so it can be no class; rename it"):
        read(root)
