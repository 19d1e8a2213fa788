"""Hugging Face datasets: Parquet, Arrow, class folders and tars, read in place; and every way to name them wrongly."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex.cli import main
from flyp_saflex.config import DataConfig
from flyp_saflex.data.describe import describe
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.images.decode import read_image
from flyp_saflex.recipe import load

datasets = pytest.importorskip("datasets", reason="the package `datasets` is not installed")

NAMES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), shade, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def rows(count: int, start: int = 0, *, names: bool = True):
    """`count` rows, classes in turn, every image of another shade."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(NAMES)) if names else datasets.Value("string"),
            "place": datasets.Value("string"),
        }
    )
    values = {
        "image": [{"bytes": png(start + row), "path": None} for row in range(count)],
        "label": [row % 3 if names else NAMES[row % 3] for row in range(count)],
        "place": ["north" if row // 3 % 2 else "south" for row in range(count)],
    }
    return datasets.Dataset.from_dict(values, features=features)


def parquet(root: Path, **splits) -> Path:
    root.mkdir()
    for name, part in splits.items():
        part.to_parquet(root / f"{name}-00000-of-00001.parquet")
    return root


def sizes(dataset):
    return {name: (split.role, split.shift, len(split)) for name, split in dataset.splits.items()}


def shade_of(sample) -> int:
    return int(np.asarray(read_image(sample.image))[0, 0, 0])


def test_parquet_files_are_splits_and_images_are_read_from_them(tmp_path: Path):
    root = parquet(tmp_path / "d", train=rows(12), validation=rows(6, 100), test=rows(9, 200))
    dataset = load_dataset(DataConfig(name="hf", root=str(root)))
    assert sizes(dataset) == {
        "train": ("train", "id", 12),
        "validation": ("select", "id", 6),
        "test": ("test", "id", 9),
    }
    assert dataset.class_names == NAMES
    sample = dataset.splits["test"].samples[4]
    assert (sample.sample_id, sample.label, shade_of(sample)) == ("test/4", 1, 204)
    assert [shade_of(sample) for sample in dataset.train.samples] == list(range(12))
    assert dataset.notes[-1].endswith("27 rows of the dataset " + str(root) + " = 27 in splits")


def test_a_saved_arrow_folder_equals_its_parquet_files(tmp_path: Path):
    parts = {"train": rows(12), "test": rows(6, 100)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "arrow")
    arrow = load_dataset(DataConfig(name="hf", root=str(tmp_path / "arrow")))
    other = load_dataset(DataConfig(name="hf", root=str(parquet(tmp_path / "p", **parts))))
    assert sizes(arrow) == sizes(other)
    for split in arrow.splits:
        ours, theirs = arrow.splits[split].samples, other.splits[split].samples
        assert [(s.sample_id, s.label, shade_of(s)) for s in ours] == [(s.sample_id, s.label, shade_of(s)) for s in theirs]


def test_training_images_are_held_out_where_no_split_selects(tmp_path: Path):
    root = parquet(tmp_path / "d", train=rows(30), test=rows(6, 100))
    dataset = load_dataset(DataConfig(name="hf", root=str(root), select_fraction=0.2))
    assert sizes(dataset) == {"train": ("train", "id", 24), "id_val": ("select", "id", 6), "test": ("test", "id", 6)}
    assert any("6 training images are held out as 'id_val'" in note for note in dataset.notes)


def test_one_split_is_held_out_or_split_by_domain(tmp_path: Path):
    root = parquet(tmp_path / "d", train=rows(30, names=False))
    pooled = load_dataset(DataConfig(name="hf", root=str(root)))
    assert {name: len(split) for name, split in pooled.splits.items()} == {"train": 21, "id_val": 3, "id_test": 6}
    config = DataConfig(name="hf", root=str(root), domain_column="place", train_domains=("south",), test_domains=("north",))
    dataset = load_dataset(config)
    assert sizes(dataset)["north"] == ("test", "ood", 15)
    assert {sample.domain for sample in dataset.train.samples} == {"south"}


def test_rows_without_a_label_are_left_out_and_counted(tmp_path: Path):
    test = rows(6, 100).map(lambda row, i: {"label": -1 if i < 2 else row["label"]}, with_indices=True)
    dataset = load_dataset(DataConfig(name="hf", root=str(parquet(tmp_path / "d", train=rows(30), test=test))))
    assert [sample.sample_id for sample in dataset.splits["test"].samples] == [f"test/{row}" for row in (2, 3, 4, 5)]
    assert any("2 left out (2 rows without a label)" in note for note in dataset.notes)


def test_class_folders_are_read_through_the_library(tmp_path: Path):
    for split, count in (("train", 10), ("test", 2)):
        for label, name in enumerate(NAMES):
            folder = tmp_path / "d" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(png(40 * label + number))
    dataset = load_dataset(DataConfig(name="hf", root=str(tmp_path / "d")))
    assert dataset.class_names == NAMES
    assert sizes(dataset)["test"] == ("test", "id", 6)
    assert {(sample.label, shade_of(sample) // 40) for sample in dataset.train.samples} == {(0, 0), (1, 1), (2, 2)}


def test_tars_of_webdataset_are_read_with_their_labels(tmp_path: Path):
    (tmp_path / "d").mkdir()
    for split, count in (("train", 30), ("test", 6)):
        with tarfile.open(tmp_path / "d" / f"{split}-00000.tar", "w") as tar:
            for row in range(count):
                extra = json.dumps({"species": NAMES[row % 3]}).encode()
                for ending, data in (("png", png(row)), ("cls", str(row % 3).encode()), ("json", extra)):
                    info = tarfile.TarInfo(f"{row:04d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    config = DataConfig(name="hf", root=str(tmp_path / "d"), label_column="cls")
    dataset = load_dataset(config)
    assert dataset.class_names == ("0", "1", "2")
    assert sizes(dataset)["test"] == ("test", "id", 6)
    assert [shade_of(sample) for sample in dataset.splits["test"].samples] == list(range(6))
    named = load_dataset(DataConfig(name="hf", root=str(tmp_path / "d"), label_column="json.species"))
    assert named.class_names == NAMES
    with pytest.raises(DataError, match=r"data\.label_column = json: .* has fields \(species\); name one"):
        load_dataset(DataConfig(name="hf", root=str(tmp_path / "d"), label_column="json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"label_column": "lable"},
            r"data\.label_column = lable: .* has no such column; did you mean 'label'\? \(found: im",
        ),
        ({"image_column": "label"}, r"data\.image_column = label: .* expected images or bytes"),
        ({"label_column": "image"}, r"data\.label_column = image: .* holds PIL\.Image\.Image, expected a class per row"),
        ({"train_domains": ("south",)}, r"need data\.domain_column"),
        (
            {"domain_column": "place", "train_domains": ("sout",)},
            r"no row of .* has 'sout' in column 'place'; did you mean 'so",
        ),
        ({"hf_subset": "other"}, r"cannot load it \(ValueError: BuilderConfig 'other' not found"),
    ],
)
def test_a_wrong_column_is_told_in_one_line(tmp_path: Path, options: dict, message: str):
    root = parquet(tmp_path / "d", train=rows(12))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(DataConfig(name="hf", root=str(root), **options))
    assert "\n" not in str(caught.value)


def test_labels_that_are_measurements_or_lists_are_told_before_they_are_read(tmp_path: Path):
    for name, values, held in (("score", [0.5], "float"), ("tags", [[1, 2]], "List|Sequence")):
        part = rows(12).add_column(name, values * 12)
        root = parquet(tmp_path / name, train=part)
        message = rf"data\.label_column = {name}: in .* holds ({held}).*; name another column"
        with pytest.raises(DataError, match=message) as caught:
            load_dataset(DataConfig(name="hf", root=str(root), label_column=name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("", r"data\.root is empty \(data\.name = \"hf\"\); --set data\.root=OWNER/NAME"),
        ("no/such/place", r"is neither a folder nor a hub id"),
        ("nobody/no-such-dataset", r"data\.root = nobody/no-such-dataset: the datasets library cannot load it .*hf auth login"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_told_in_one_line(root: str, message: str):
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(DataConfig(name="hf", root=root))
    assert "\n" not in str(caught.value)


def test_a_label_that_no_training_row_has_is_refused(tmp_path: Path):
    test = rows(6, 100, names=False).map(lambda row: {"label": "cow" if row["label"] == "owl" else row["label"]})
    root = parquet(tmp_path / "d", train=rows(30, names=False), test=test)
    with pytest.raises(DataError, match=r"split 'test', row 2: column 'label' is 'cow', a class that no training row has"):
        load_dataset(DataConfig(name="hf", root=str(root)))


def test_without_the_library_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'flyp-saflex\[hf\]'"):
        load_dataset(DataConfig(name="hf", root="a/b"))


def test_the_command_data_reads_every_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    test = rows(5, 200)
    values = [{"bytes": png(0), "path": None}, {"bytes": b"no image", "path": None}] + [{"bytes": png(9), "path": None}] * 3
    test = test.remove_columns("image").add_column("image", values).cast_column("image", datasets.Image())
    root = parquet(tmp_path / "d", train=rows(30), test=test)
    numbers = describe(load("folder", ["data.name=hf", f"data.root={root}"]))
    assert numbers["sizes"]["train"] == {"width": (12, 12, 12), "height": (10, 10, 10)}
    assert [row["path"] for row in numbers["unreadable"]] == [f"{root}: test/1"]
    assert "cannot be decoded (no image format that is read here)" in numbers["unreadable"][0]["reason"]


def test_a_run_trains_and_evaluates_on_parquet(tmp_path: Path, tiny_options: list[str]):
    root = parquet(tmp_path / "d", train=rows(30), test=rows(6, 100))
    options = [option for option in tiny_options if not option.startswith("data.")]
    sets = [f"--set={option}" for option in (*options, "data.name=hf", f"data.root={root}")]
    assert main(["train", "folder", *sets, f"--run-dir={tmp_path / 'run'}"]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert {row["split"]: row["n"] for row in found["results"]} == {"id_val": 3, "test": 6}
