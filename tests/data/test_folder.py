"""Folders of images: layouts, splits, names, and every way to get them wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from flyp_saflex.config import DataConfig
from flyp_saflex.data.class_names import readable, readable_names
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError


def make(root: Path, *folders: str, count: int = 4) -> Path:
    for number, name in enumerate(folders):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (number * 9 % 256, index * 20, 7)).save(root / name / f"{index}.png")
    return root


def sizes(dataset):
    return {name: (split.role, split.shift, len(split)) for name, split in dataset.splits.items()}


def test_domains_give_held_out_id_splits_and_ood_splits(tiny_images_dir: Path):
    config = DataConfig(
        root=str(tiny_images_dir), train_domains=("day",), test_domains=("night",), select_per_class=2, test_fraction=0.25
    )
    dataset = load_dataset(config)
    assert sizes(dataset) == {
        "train": ("train", "id", 12),
        "id_val": ("select", "id", 6),
        "id_test": ("test", "id", 6),
        "night": ("test", "ood", 24),
    }
    assert dataset.class_names == ("circle", "square", "stripes")
    assert dataset.templates == ("a photo of a {}.",)
    assert all(dataset.splits[name].class_counts() == {0: 2, 1: 2, 2: 2} for name in ("id_val", "id_test"))
    sample = dataset.splits["night"].samples[0]
    assert (sample.sample_id, sample.domain, sample.label) == ("night/circle/0.png", "night", 0)
    assert sample.path == tiny_images_dir / "night/circle/0.png"
    ids = [sample.sample_id for split in dataset.splits.values() for sample in split.samples]
    assert len(ids) == len(set(ids)) == 48


def test_select_domains_may_select_and_are_ood(tmp_path: Path):
    root = make(tmp_path / "r", *(f"{domain}/{name}" for domain in "pqs" for name in ("cat", "dog")))
    dataset = load_dataset(DataConfig(root=str(root), train_domains=("p",), select_domains=("s",)))
    assert sizes(dataset)["s"] == ("select", "ood", 8)
    assert any("q" in note for note in dataset.notes)


def test_split_folders_keep_their_names(tmp_path: Path):
    root = make(tmp_path, *(f"{split}/{name}" for split in ("train", "val", "test", "sketch") for name in ("cat", "dog")))
    dataset = load_dataset(DataConfig(root=str(root)))
    assert sizes(dataset) == {
        "train": ("train", "id", 8),
        "val": ("select", "id", 8),
        "test": ("test", "id", 8),
        "sketch": ("test", "ood", 8),
    }


def test_plain_class_folders_are_one_domain(tmp_path: Path):
    dataset = load_dataset(DataConfig(root=str(make(tmp_path, "cat", "dog", count=10))))
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 14, "id_val": 2, "id_test": 4}


def test_train_may_be_a_class_but_not_a_split_without_classes(tmp_path: Path):
    root = make(tmp_path, "train", "bus", count=10)
    assert load_dataset(DataConfig(root=str(root))).class_names == ("bus", "train")
    make(tmp_path, "test")
    with pytest.raises(DataError, match="holds images without class folders"):
        load_dataset(DataConfig(root=str(root)))


def test_held_out_parts_depend_on_split_seed_only_and_survive_a_new_image(tmp_path: Path):
    root = make(tmp_path, "cat", "dog", count=20)

    def test_ids(**options):
        split = load_dataset(DataConfig(root=str(root), **options), seed=options.pop("seed", 0)).splits["id_test"]
        return {sample.sample_id for sample in split.samples}

    before = test_ids()
    assert before == test_ids()
    assert before != test_ids(split_seed=1)
    assert before == {s.sample_id for s in load_dataset(DataConfig(root=str(root)), seed=5).splits["id_test"].samples}
    Image.new("RGB", (8, 8)).save(root / "cat" / "a new one.png")
    assert len(before - test_ids()) <= 1


def test_names_are_made_readable():
    assert readable_names(("003.Sooty_Albatross", "004.Groove-billed_Ani")) == ("Sooty Albatross", "Groove billed Ani")
    assert readable("polar-bear") == "polar bear"
    assert readable("300") == "300"


def test_class_file_gives_names_and_order(tmp_path: Path):
    root = make(tmp_path / "images", "n01", "n02")
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "templates.txt").write_text("a drawing of a {}.\n")
    (prompts / "classes.txt").write_text("n02\ttench\nn01\tgoldfish\n")
    dataset = load_dataset(DataConfig(root=str(root), prompts=str(prompts), select_fraction=0, test_fraction=0))
    assert dataset.class_names == ("tench", "goldfish")
    assert {sample.sample_id.split("/")[0]: sample.label for sample in dataset.train.samples} == {"n01": 1, "n02": 0}
    assert dataset.templates == ("a drawing of a {}.",)


def test_shipped_prompts_fit_pacs(shared_dir: Path):
    root = shared_dir / "data" / "pacs160"
    config = DataConfig(root=str(root), train_domains=("photo",), test_domains=("art_painting", "cartoon"), prompts="pacs")
    dataset = load_dataset(config)
    assert dataset.class_names == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    assert sum(len(dataset.splits[name]) for name in ("train", "id_val", "id_test")) == 1670
    assert (len(dataset.splits["art_painting"]), len(dataset.splits["cartoon"])) == (2048, 2344)


def test_other_files_are_left_out_with_a_note(tmp_path: Path):
    root = make(tmp_path, "cat", "dog")
    (root / "cat" / "readme.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    dataset = load_dataset(DataConfig(root=str(root)))
    assert f"10 files in {root} = 8 in splits + 2 left out (1 hidden file, 1 .txt file)" in dataset.notes


def break_nothing(root):
    pass


BAD = {
    "missing root": (shutil.rmtree, {}, "not there"),
    "no image": (lambda root: [shutil.rmtree(root / name) for name in ("day", "night")], {}, "no image found"),
    "unknown domain": (break_nothing, {"train_domains": ("dya",)}, "no folder 'dya'.*did you mean 'day'"),
    "domain in two roles": (
        break_nothing,
        {"train_domains": ("day",), "test_domains": ("day",)},
        "already in data.train_domains",
    ),
    "no training domain": (break_nothing, {"test_domains": ("night",)}, "data.train_domains is empty"),
    "domains not named": (break_nothing, {}, r'set data.train_domains=\["day"\]'),
    "class without training images": (
        lambda root: [path.unlink() for path in (root / "day" / "square").iterdir()],
        {"train_domains": ("day",)},
        "1 of 3 classes have no training image.*'square'",
    ),
    "class unseen in training": (
        lambda root: shutil.rmtree(root / "day" / "square"),
        {"train_domains": ("day",), "test_domains": ("night",)},
        "8 images of the class 'square', which has no folder in the training part",
    ),
    "empty split": (
        lambda root: [path.unlink() for path in (root / "night").rglob("*.png")],
        {"train_domains": ("day",), "test_domains": ("night",)},
        "split 'night' of 'folder' is empty",
    ),
    "held out too much": (
        break_nothing,
        {"train_domains": ("day",), "select_per_class": 8},
        "class 'circle' has 8 images.*leaves none to train on",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_in_one_line(case: str, tiny_images_dir: Path):
    damage, options, message = BAD[case]
    damage(tiny_images_dir)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(DataConfig(root=str(tiny_images_dir), **options))
    assert "\n" not in str(caught.value)


def test_a_file_or_an_empty_option_is_no_root(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="a file, not a folder"):
        load_dataset(DataConfig(root=str(tmp_path / "file")))
    with pytest.raises(DataError, match=r"data\.root is empty"):
        load_dataset(DataConfig())


def test_a_class_missing_in_the_class_file_is_named(tmp_path: Path):
    root = make(tmp_path / "images", "cat", "dog")
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "templates.txt").write_text("a {}\n")
    (prompts / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match="no line for the class 'dog'"):
        load_dataset(DataConfig(root=str(root), prompts=str(prompts)))
