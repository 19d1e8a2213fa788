"""MedMNIST files: medmnist's own counts and md5, altered copies named, labels and channels in either form, one line otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flyp_saflex import recipe
from flyp_saflex.config import DataConfig
from flyp_saflex.data import medmnist
from flyp_saflex.data.medmnist import Published, published_sets, read_medmnist
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError

SIZES = (24, 12, 9)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataConfig]:
    """`toy(test_labels=..., extra=...)`: a small npz file under the name of the gray set `breast`, whose entry has its md5."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in zip(("train", "val", "test"), SIZES, strict=True):
        arrays[f"{part}_images"] = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(size) % 2)[:, None].astype(np.uint8)

    def write(**changes: np.ndarray | None) -> DataConfig:
        made = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
        np.savez(tmp_path / "breastmnist.npz", **made)
        if not changes:
            md5 = medmnist._md5(tmp_path / "breastmnist.npz")
            known = Published("breast", md5, 1, SIZES, ("malignant", "benign"))
            monkeypatch.setattr(medmnist, "published_sets", lambda: {"breast": known})
        return DataConfig(name="medmnist", root=str(tmp_path), card="breast")

    return write


def test_retina_is_the_official_file(shared_dir: Path) -> None:
    dataset = load_dataset(DataConfig(name="medmnist", root=str(shared_dir / "data/tracks"), card="retina"))
    assert {name: (len(split), split.role, split.shift) for name, split in dataset.splits.items()} == {
        "train": (1080, "train", "id"),
        "val": (120, "select", "id"),
        "test": (400, "test", "id"),
    }
    assert [dataset.train.class_counts()[label] for label in range(5)] == [486, 128, 206, 194, 66]
    assert dataset.rows.shape == (1600, 28, 28, 3)
    assert not any("altered" in note for note in dataset.notes)


def test_a_saved_again_breast_is_named_and_its_duplicate_found(shared_dir: Path) -> None:
    options = DataConfig(name="medmnist", root=str(shared_dir / "data/tracks/breastmnist.npz"))
    with pytest.raises(DataError, match=r"has the md5 098de56c.*, expected 750601b1.*accept_altered=true"):
        read_medmnist(options)
    dataset = load_dataset(replace(options, accept_altered=True))
    assert [len(split) for split in dataset.splits.values()] == [546, 78, 156]
    assert dataset.train.class_counts() == {0: 147, 1: 399}
    assert any(note.startswith("altered copy: ") for note in dataset.notes)
    assert any(note.startswith("1 images are in two splits (first: train: train/") for note in dataset.notes)


def test_the_table_has_the_papers_eight_sets_and_their_sizes() -> None:
    sets = published_sets()
    assert {"path", "derma", "tissue", "blood", "oct", "organa", "organc", "organs", "retina", "breast", "pneumonia"} <= set(sets)
    assert all(len(known.md5) == 32 and known.channels in (1, 3) for known in sets.values())
    assert sum(sets["breast"].sizes) == 780
    assert sum(sets["path"].sizes) == 107180
    assert len(sets["organa"].class_names) == 11


def test_classes_with_few_validation_images_are_warned_of(toy: Callable[..., DataConfig]) -> None:
    notes = read_medmnist(toy()).notes
    assert any(
        note.startswith("warning: split 'val' has fewer than 10 rows of 'malignant' (6), 'benign' (6)") for note in notes
    ), notes


def test_labels_and_gray_images_in_either_form_are_the_same_data(toy: Callable[..., DataConfig]) -> None:
    plain = read_medmnist(toy())
    assert not plain.notes or not any("altered" in note for note in plain.notes)
    with np.load(Path(toy().root) / "breastmnist.npz") as stored:
        other = {key: stored[key][:, 0] if key.endswith("labels") else stored[key][..., None] for key in stored.files}
    again = read_medmnist(replace(toy(**other), accept_altered=True))
    assert again.rows.shape == plain.rows.shape == (45, 28, 28)
    assert {name: split.samples for name, split in again.splits.items()} == {n: s.samples for n, s in plain.splits.items()}


def test_differences_stop_unless_they_are_accepted(toy: Callable[..., DataConfig]) -> None:
    toy()
    changed = toy(note=np.zeros(3), train_images=np.zeros((20, 28, 28), np.uint8), train_labels=np.arange(20) % 2)
    with pytest.raises(DataError, match="md5"):
        read_medmnist(changed)
    notes = "\n".join(read_medmnist(replace(changed, accept_altered=True)).notes)
    assert "arrays that medmnist's file has not: note" in notes
    assert "train has 20 images, expected 24" in notes
    assert notes.count("altered copy") == 3


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"val_labels": None}, r"has no val_labels \(it has: "),
        ({"test_labels": np.zeros(9, np.float32)}, "test_labels is float32.*expected whole numbers"),
        ({"test_labels": np.zeros((9, 14), np.uint8)}, r"test_labels is uint8 of the shape \[9, 14\]"),
        ({"test_labels": np.full(9, 7)}, r"test_labels has the label 7, but 'breast' has the classes 0..1"),
        ({"train_images": np.zeros((24, 28, 28), np.float32)}, "train_images is float32.*expected uint8"),
        ({"train_images": np.zeros((24, 28, 28, 3), np.uint8)}, r"expected uint8 of the shape \[N, S, S\]"),
        ({"val_images": np.zeros((12, 32, 32), np.uint8)}, "have the shapes"),
    ],
)
def test_one_line_for_what_cannot_be_read(toy: Callable[..., DataConfig], changes: dict, line: str) -> None:
    toy()
    with pytest.raises(DataError, match=line) as error:
        read_medmnist(replace(toy(**changes), accept_altered=True))
    assert "\n" not in str(error.value)


def test_other_files_and_sets_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "retinamnist.npz").write_bytes(b"no zip")
    for options, line in (
        ({"card": "retina"}, "cannot be read as an npz file"),
        ({"card": "retinna"}, "did you mean 'retina'"),
        ({"card": "blood"}, "there is no file 'bloodmnist.npz'"),
    ):
        config = DataConfig(name="medmnist", root=str(tmp_path), accept_altered=True, **options)
        with pytest.raises(DataError, match=line) as error:
            read_medmnist(config)
        assert "\n" not in str(error.value)
    (tmp_path / "chestmnist.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"data.card = chest: its images have several labels each"):
        read_medmnist(DataConfig(name="medmnist", root=str(tmp_path), card="chest"))


@pytest.mark.parametrize("name", [name for name in recipe.shipped() if name.startswith("medmnist-")])
def test_a_recipe_per_set_has_the_papers_settings(name: str) -> None:
    config = recipe.load(name)
    assert config.data.card in published_sets()
    assert (config.saflex.temperature, config.saflex.penalty) == (0.01, 0.0)
    assert config.train.freeze_batchnorm is False
