"""WILDS' other image datasets, in small copies of the real layout, read and scored as the `wilds` package does."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from flyp_saflex.config import DataConfig
from flyp_saflex.data import wilds_sets
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError
from flyp_saflex.evaluation.metrics import accuracy, worst_group_accuracy
from flyp_saflex.tables import DATASETS

wilds = pytest.importorskip("wilds")


def touch(root: Path, files) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def waterbirds(root: Path) -> Path:
    """Columns as in the released metadata.csv: img_id, img_filename, y, split, place, place_filename."""
    folder = root / "waterbirds_v1.0"
    folder.mkdir(parents=True)
    rows = []
    for number in range(48):
        y, place, split = number % 2, number // 2 % 2, (0, 0, 1, 2)[number // 4 % 4]
        name = f"{number % 3 + 1:03d}.Bird/Bird_{number:04d}.jpg"
        rows.append((number + 1, name, y, split, place, f"/b/{number}.jpg"))
    pd.DataFrame(rows, columns=["img_id", "img_filename", "y", "split", "place", "place_filename"]).to_csv(
        folder / "metadata.csv", index=False
    )
    touch(folder, [row[1] for row in rows])
    return root


def camelyon17(root: Path) -> Path:
    """Columns as in the released metadata.csv; hospital 2 is tested on and hospital 1 selects."""
    folder = root / "camelyon17_v1.0"
    folder.mkdir(parents=True)
    rows = []
    for number in range(60):
        center = number % 5
        split = number // 30 if center in (0, 3, 4) else 0
        rows.append(
            (f"{center * 20:03d}", number % 3, number, 7 * number, number // 5 % 2, center * 2 + number % 2, center, split)
        )
    columns = ["patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "metadata.csv")
    touch(folder, [f"patches/patient_{p}_node_{n}/patch_patient_{p}_node_{n}_x_{x}_y_{y}.png" for p, n, x, y, *_ in rows])
    return root


def fmow(root: Path) -> Path:
    """Columns as in the released rgb_metadata.csv; sequestered rows (`seq`) count in the file names but in no split."""
    folder = root / "fmow_v1.1"
    folder.mkdir(parents=True)
    rows = []
    categories = wilds_sets.FMOW.classes()
    for number in range(400):
        split = ("train", "train", "val", "test", "seq")[number % 5]
        year = (2010, 2014, 2016)[number // 5 % 3]
        country = ("USA", "FRA", "KEN", "XXX")[number // 15 % 4]
        rows.append((split, categories[number % 62], country, f"{year}-03-01T10:00:00Z", number))
    pd.DataFrame(rows, columns=["split", "category", "country_code", "timestamp", "img_id"]).to_csv(
        folder / "rgb_metadata.csv", index=False
    )
    codes = pd.DataFrame([("USA", "Americas"), ("FRA", "Europe"), ("KEN", "Africa")], columns=["alpha-3", "region"])
    codes.to_csv(folder / "country_code_mapping.csv", index=False)
    touch(folder, [f"images/rgb_img_{number}.png" for number in range(400)])
    return root


MAKERS = {"waterbirds": waterbirds, "camelyon17": camelyon17, "fmow": fmow}


def official(root: Path, name: str):
    folder = next(root.glob(f"{name}_v*"))
    (folder / f"RELEASE_{folder.name.rpartition('_')[2]}.txt").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wilds.get_dataset(name, root_dir=str(root), download=False)


@pytest.mark.parametrize("name", MAKERS)
def test_splits_files_labels_and_numbers_are_the_official_ones(tmp_path: Path, name: str):
    root = MAKERS[name](tmp_path)
    before = set(tmp_path.rglob("*"))
    dataset = load_dataset(DataConfig(name=name, root=str(root)))
    assert set(tmp_path.rglob("*")) == before
    theirs = official(root, name)
    assert set(dataset.splits) == set(theirs.split_dict)
    rng = np.random.default_rng(0)
    for split in dataset.splits.values():
        subset = theirs.get_subset(split.name)
        assert [sample.label for sample in split.samples] == subset.y_array.tolist()
        assert all(sample.path.is_file() for sample in split.samples)
        predictions = rng.integers(0, theirs.n_classes, len(split))
        with wilds_sets.group_means():
            expected, _ = theirs.eval(torch.tensor(predictions), subset.y_array, subset.metadata_array)
        found = dataset.evaluator(split.samples, predictions.tolist())
        assert found
        assert found == {key: pytest.approx(float(expected[key])) for key in found}
        labels, groups = [sample.label for sample in split.samples], [sample.domain for sample in split.samples]
        if "acc_avg" in found:
            assert accuracy(labels, predictions) == pytest.approx(found["acc_avg"])
        if "acc_wg" in found:
            assert worst_group_accuracy(labels, predictions, groups) == pytest.approx(found["acc_wg"])
        if "acc_worst_region" in found:
            known = [index for index, group in enumerate(groups) if group != "region: Other"]
            ours = worst_group_accuracy([labels[i] for i in known], predictions[known], [groups[i] for i in known])
            assert ours == pytest.approx(found["acc_worst_region"])


def test_waterbirds_groups_are_background_and_class(tmp_path: Path):
    dataset = load_dataset(DataConfig(name="waterbirds", root=str(waterbirds(tmp_path))))
    assert {sample.domain for sample in dataset.splits["test"].samples} == {
        f"background: {place}, y: {bird}" for place in ("land", "water") for bird in ("landbird", "waterbird")
    }
    assert "adj_acc_avg" in dataset.evaluator(dataset.splits["test"].samples, [0] * len(dataset.splits["test"]))


def test_camelyon17_tests_and_selects_on_other_hospitals(tmp_path: Path):
    dataset = load_dataset(DataConfig(name="camelyon17", root=str(camelyon17(tmp_path))))
    assert {name: (split.role, split.shift) for name, split in dataset.splits.items()} == {
        "train": ("train", "id"),
        "id_val": ("select", "id"),
        "val": ("select", "ood"),
        "test": ("test", "ood"),
    }
    assert dataset.class_names == ("normal tissue", "tumor tissue")


def test_fmow_leaves_sequestered_images_out_and_tells_it(tmp_path: Path):
    dataset = load_dataset(DataConfig(name="fmow", root=str(fmow(tmp_path))))
    assert dataset.num_classes == 62
    assert dataset.class_names[1] == "airport hangar"
    assert not any(int(s.path.stem.rpartition("_")[2]) % 5 == 4 for split in dataset.splits.values() for s in split.samples)
    assert any("rows in no official split" in note for note in dataset.notes)


@pytest.mark.parametrize("name", MAKERS)
def test_missing_metadata_is_told_in_one_line(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=rf"no \w+\.csv.* expected WILDS' {name}_v1\.\d as unpacked") as caught:
        load_dataset(DataConfig(name=name, root=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert DATASETS[name].name == name


def test_broken_metadata_is_told_in_one_line(tmp_path: Path):
    root = waterbirds(tmp_path)
    path = root / "waterbirds_v1.0" / "metadata.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("img_filename", "file"), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"metadata\.csv: the wilds package refuses it \(KeyError: 'img_filename'\); copy"
    ) as caught:
        load_dataset(DataConfig(name="waterbirds", root=str(root)))
    assert "\n" not in str(caught.value)
