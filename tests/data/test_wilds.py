"""iWildCam through the real `wilds` package, and ALIA's subset of it."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from flyp_saflex.config import DataConfig
from flyp_saflex.data import wilds as wilds_module
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.data.wilds import mini_rows, official_metrics
from flyp_saflex.errors import DataError

SPLITS = ("train", "id_val", "id_test", "val", "test")


@pytest.fixture
def iwildcam(tmp_path: Path) -> Path:
    """A folder as WILDS has it: 182 classes, 8 locations, one black image under every name."""
    folder = tmp_path / "iwildcam_v2.0"
    (folder / "train").mkdir(parents=True)
    rows = []
    for y in range(182):
        rows.append(("train", y, y % 4))
    for number in range(40):
        split = SPLITS[1:][number % 4]
        location = {"val": 4, "test": 6}.get(split, 0) + number // 4 % 2
        rows.append((split, number % 11, location))
    Image.new("RGB", (16, 12)).save(tmp_path / "black.jpg")
    data = (tmp_path / "black.jpg").read_bytes()
    table = []
    for number, (split, y, location) in enumerate(rows):
        name = f"{number:08x}-21bc.jpg"
        (folder / "train" / name).write_bytes(data)
        table.append(
            {
                "split": split,
                "location_remapped": location,
                "location": 100 + location,
                "sequence_remapped": number,
                "seq_id": f"s{number}",
                "y": y,
                "category_id": 500 + y,
                "datetime": "2013-06-01 15:40:00.000",
                "filename": name,
                "image_id": name.removesuffix(".jpg"),
            }
        )
    pd.DataFrame(table).to_csv(folder / "metadata.csv")
    (folder / "RELEASE_v2.0.txt").touch()
    return tmp_path


def read(root: Path, **options):
    return load_dataset(DataConfig(name="iwildcam", root=str(root), **options))


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_official_splits_roles_and_shifts(iwildcam: Path):
    dataset = read(iwildcam)
    assert {name: (split.role, split.shift, len(split)) for name, split in dataset.splits.items()} == {
        "train": ("train", "id", 182),
        "id_val": ("select", "id", 10),
        "val": ("select", "ood", 10),
        "id_test": ("test", "id", 10),
        "test": ("test", "ood", 10),
    }
    table = pd.read_csv(iwildcam / "iwildcam_v2.0" / "metadata.csv")
    for name, split in dataset.splits.items():
        rows = table[table["split"] == name]
        assert [s.sample_id for s in split.samples] == rows["filename"].tolist()
        assert [s.label for s in split.samples] == rows["y"].tolist()
        assert [s.domain for s in split.samples] == rows["location_remapped"].astype(str).tolist()
    assert dataset.templates == ("a photo of {}.", "{} in the wild.")


def test_class_names_are_the_182_english_ones(iwildcam: Path, shared_dir: Path):
    with open(shared_dir / "reference" / "iwildcam_labels.csv", encoding="utf-8", newline="") as file:
        expected = [row["english"] for row in csv.DictReader(file) if row["y"] != "99999"]
    dataset = read(iwildcam)
    assert list(dataset.class_names) == expected
    assert len(expected) == 182
    assert any("'unknown bird' (82, 178)" in note for note in dataset.notes)


def test_root_may_be_the_folder_itself(iwildcam: Path):
    assert read(iwildcam).splits == read(iwildcam / "iwildcam_v2.0").splits


@pytest.mark.parametrize("rename", [False, True])
def test_without_release_file_nothing_is_written(iwildcam: Path, rename: bool):
    expected = {name: [s.sample_id for s in split.samples] for name, split in read(iwildcam).splits.items()}
    folder = iwildcam / "iwildcam_v2.0"
    (folder / "RELEASE_v2.0.txt").unlink()
    if rename:
        folder = folder.rename(iwildcam / "my copy")
    before = listing(iwildcam)
    dataset = read(folder)
    assert {name: [s.sample_id for s in split.samples] for name, split in dataset.splits.items()} == expected
    assert listing(iwildcam) == before


def test_rows_are_those_that_the_wilds_package_reads(iwildcam: Path):
    from wilds import get_dataset

    path = iwildcam / "iwildcam_v2.0" / "metadata.csv"
    pd.read_csv(path, index_col=0, dtype=object).sample(frac=1, random_state=0).to_csv(path)
    official = get_dataset("iwildcam", root_dir=str(iwildcam), download=False)
    for name, split in read(iwildcam).splits.items():
        rows = official.get_subset(name)
        metadata = rows.metadata_array[:, :2].tolist()
        assert split.sample_ids == [official._input_array[row] for row in rows.indices]
        assert split.labels == rows.y_array.tolist()
        assert [[int(s.domain), int(s.sequence or -1)] for s in split.samples] == metadata


@pytest.mark.parametrize("nested", [False, True])
def test_images_as_on_lila(iwildcam: Path, nested: bool):
    folder = iwildcam / "iwildcam_v2.0"
    (folder / "train").rename(folder / "images")
    if nested:
        for path in list((folder / "images").iterdir()):
            home = folder / "images" / path.name[-10]
            home.mkdir(exist_ok=True)
            path.rename(home / path.name)
    dataset = read(iwildcam)
    assert all(sample.path.is_file() for split in dataset.splits.values() for sample in split.samples)


def change(path: Path, row: int, column: str, value: object) -> None:
    table = pd.read_csv(path, dtype=object)
    table.loc[row - 2, column] = value
    table.to_csv(path, index=False)


BAD = {
    "label out of range": (
        lambda p: change(p, 183, "y", 182),
        "row 183: column 'y' is 182, but prompts/iwildcam has 182 classes",
    ),
    "unknown split": (lambda p: change(p, 5, "split", "trian"), "row 5: column 'split' is 'trian'"),
    "empty cell": (lambda p: change(p, 5, "filename", None), "row 5: column 'filename' is empty"),
    "no column": (lambda p: pd.read_csv(p).drop(columns="y").to_csv(p, index=False), "no column 'y'"),
    "header only": (lambda p: p.write_text(p.read_text().splitlines()[0] + "\n"), "has a header but no row"),
    "text for a location": (
        lambda p: change(p, 7, "location_remapped", "north"),
        "row 7: column 'location_remapped' is 'north', expected a whole number",
    ),
    "a fraction for a sequence": (lambda p: change(p, 7, "sequence_remapped", 1.5), "row 7: column 'sequence_remapped' is '1.5'"),
    "text for a label": (lambda p: change(p, 7, "y", "deer"), "row 7: column 'y' is 'deer', expected a whole number"),
    "not UTF-8": (lambda p: p.write_bytes(p.read_bytes() + b"\xe9"), "is not UTF-8 text"),
    "gaps": (lambda p: change(p, 150, "y", 0), "column 'y' runs to 181, but has no 148; the wilds package refuses"),
    "a huge number": (
        lambda p: change(p, 150, "sequence_remapped", 10**12),
        "column 'sequence_remapped' runs to 1000000000000, but has no 148; the wilds package refuses",
    ),
    "bad date": (lambda p: change(p, 3, "datetime", "yesterday"), "row 3: column 'datetime' is 'yesterday', expected a time"),
    "empty file": (lambda p: p.write_text(""), "cannot be read"),
    "missing images": (
        lambda p: (p.parent / "train" / "00000000-21bc.jpg").unlink(),
        r"\(1 of 182 in train\), first: .*00000000-21bc.jpg",
    ),
    "image in two splits": (
        lambda p: change(p, 200, "filename", "00000000-21bc.jpg"),
        "'00000000-21bc.jpg' is there twice, in 'train' and",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metadata_is_refused_in_one_line(case: str, iwildcam: Path):
    damage, message = BAD[case]
    damage(iwildcam / "iwildcam_v2.0" / "metadata.csv")
    with pytest.raises(DataError, match=message) as caught:
        read(iwildcam)
    assert "\n" not in str(caught.value)


def test_a_missing_dataset_says_what_to_place_where(tmp_path: Path):
    for root in (tmp_path, tmp_path / "nope"):
        with pytest.raises(DataError, match=r"place WILDS' iwildcam_v2\.0 there: metadata\.csv and train/\*\.jpg") as caught:
            read(root)
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == set()


def test_mini_is_alias_subset(shared_dir: Path):
    dataset = load_dataset(DataConfig(name="iwildcam-mini", root=str(shared_dir)), check_files=False)
    assert {name: (split.role, len(split)) for name, split in dataset.splits.items()} == {
        "train": ("train", 6052),
        "val": ("select", 2826),
        "test": ("test", 8483),
        "extra": ("train", 2224),
    }
    assert dataset.splits["test"].shift == "ood"
    assert dataset.class_names == ("background", "cattle", "elephants", "impalas", "zebras", "giraffes", "dik-diks")
    folder = shared_dir / "reference" / "alia_iwildcam_subset"
    classes = [0, 24, 32, 36, 48, 49, 52]
    for split, name in (("train", "train"), ("val", "val"), ("test", "test"), ("extra", "train_extra")):
        table = pd.read_csv(folder / f"{name}_subset.csv")
        samples = dataset.splits[split].samples
        assert [s.sample_id for s in samples] == table["filename"].tolist()
        assert [classes[s.label] for s in samples] == table["y"].tolist()
        assert [s.domain for s in samples] == table["location_remapped"].astype(str).tolist()


def test_mini_with_images_trains_on_extra_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = mini_rows()[::40]  # fewer files
    monkeypatch.setattr(wilds_module, "mini_rows", lambda: rows)
    num = Counter(split for _, _, split, _ in rows)
    (tmp_path / "images").mkdir()
    first, *others = (tmp_path / "images" / name for name, *_ in rows)
    for path in others:
        path.touch()
    config = DataConfig(name="iwildcam-mini", root=str(tmp_path))
    with pytest.raises(DataError, match=rf"\(1 of {num['train']} in train\)"):
        load_dataset(config)
    first.touch()
    assert len(load_dataset(config).train) == num["train"]
    dataset = load_dataset(DataConfig(name="iwildcam-mini", root=str(tmp_path), add_to_train=("extra",)))
    assert len(dataset.train) == num["train"] + num["extra"]
    assert "extra" not in dataset.splits


def test_mini_rows_have_no_image_twice():
    rows = mini_rows()
    assert len({name for name, *_ in rows}) == len(rows) == 19585
    assert Counter(split for _, _, split, _ in rows) == {"train": 6052, "val": 2826, "test": 8483, "extra": 2224}


def test_official_metrics_equal_the_datasets_own_evaluation(iwildcam: Path):
    from wilds import get_dataset

    official = get_dataset("iwildcam", root_dir=str(iwildcam), download=False)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 20, (200,), generator=generator)
    predictions = torch.where(
        torch.rand(200, generator=generator) < 0.5, labels, torch.randint(0, 182, (200,), generator=generator)
    )
    results, _ = official.eval(predictions, labels, torch.zeros(200, 1))
    ours = official_metrics(predictions, labels)
    assert ours == {
        "accuracy": results["acc_avg"],
        "macro_recall": results["recall-macro_all"],
        "macro_f1": results["F1-macro_all"],
    }
    # Classes that are only predicted do not count as a zero.
    assert official_metrics([0, 0, 5, 1], [0, 0, 0, 1])["macro_f1"] == pytest.approx((0.8 + 1.0) / 2)
