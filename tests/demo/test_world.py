"""The drawn world on disk: what `wilds` opens, what is rare, and where training and test part."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex.config import DataConfig
from flyp_saflex.data.wilds import read_iwildcam
from flyp_saflex.demo.scene import render
from flyp_saflex.demo.world import CLASSES, SPLITS, TEMPLATES, Shot, plan, read_scenes, write_world
from flyp_saflex.errors import DataError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), num_images=400, seed=3, size_px=32)


@pytest.fixture(scope="module")
def shots() -> list[Shot]:
    return plan(2000, 0)


def of(shots: list[Shot], *splits: str) -> list[Shot]:
    return [shot for shot in shots if shot.split in splits]


def read_splits(world: Path) -> list[str]:
    with open(world / "metadata.csv", newline="", encoding="utf-8") as file:
        return [row["split"] for row in csv.DictReader(file)]


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def association(shots: list[Shot]) -> float:
    """Cramer's V between species and place over bursts: 0 independent, 1 each tells the other."""
    pairs = Counter((shot.scene.species, shot.scene.place) for shot in shots if shot.frame == 0 and shot.scene.species)
    rows, columns = sorted({str(a) for a, _ in pairs}), sorted({b for _, b in pairs})
    table = np.array([[pairs[a, b] for b in columns] for a in rows], dtype=float)
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    return float(np.sqrt(((table - expected) ** 2 / expected).sum() / table.sum() / (min(table.shape) - 1)))


def test_wilds_opens_it_and_evaluates_on_it(world: Path) -> None:
    wilds = pytest.importorskip("wilds")
    dataset = wilds.get_dataset("iwildcam", root_dir=str(world.parent), download=False)
    assert dataset.n_classes == len(CLASSES)
    sizes = {name: len(dataset.get_subset(name)) for name in SPLITS}
    assert sizes == {"train": 134, "id_val": 33, "id_test": 50, "val": 50, "test": 133}
    image, label, metadata = dataset.get_subset("test")[0]
    with image:  # wilds leaves the file open
        assert image.size == (32, 32)
    assert metadata[dataset.metadata_fields.index("y")] == label
    subset = dataset.get_subset("test")
    results, _ = dataset.eval(subset.y_array, subset.y_array, subset.metadata_array)
    assert results["F1-macro_all"] == 1.0


def test_our_reader_opens_it_with_its_own_prompts(world: Path) -> None:
    dataset = read_iwildcam(DataConfig(name="iwildcam", root=str(world.parent), prompts=str(world / "prompts")))
    assert dataset.class_names == CLASSES
    assert {name: len(split) for name, split in dataset.splits.items()} == Counter(read_splits(world))
    assert all(sample.path.is_file() for split in dataset.splits.values() for sample in split.samples)


def test_same_seed_same_files(world: Path, tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", num_images=400, seed=3, size_px=32)
    assert digest(again) == digest(world)
    assert plan(400, 3) != plan(400, 4)


def test_pictures_on_disk_are_the_scenes(world: Path) -> None:
    scenes = read_scenes(world)
    assert len(scenes) == 400
    for name in list(scenes)[::80]:
        drawn = np.asarray(render(scenes[name], 32), dtype=float)
        stored = np.asarray(Image.open(world / "train" / name), dtype=float)
        assert np.abs(drawn - stored).mean() < 8  # JPEG


def test_read_scenes_of_another_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no scenes\.jsonl"):
        read_scenes(tmp_path)


def test_tables_agree_with_each_other(world: Path) -> None:
    with open(world / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["filename"] for row in rows} == {path.name for path in (world / "train").iterdir()}
    with open(world / "categories.csv", newline="", encoding="utf-8") as file:
        names = {row["y"]: row["name"] for row in csv.DictReader(file)}
    assert names == {str(y): name if y else "empty" for y, name in enumerate(CLASSES)}
    classes = (world / "prompts" / "classes.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[-1] for line in classes] == list(CLASSES)
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    scenes = read_scenes(world)
    assert all(CLASSES[int(row["y"])] == (scenes[row["filename"]].species or CLASSES[0]) for row in rows)


@pytest.mark.parametrize(("num_images", "seed"), [(400, 0), (401, 1), (1000, 2), (2000, 0)])
def test_every_split_has_its_size_and_every_class(num_images: int, seed: int) -> None:
    shots = plan(num_images, seed)
    assert len(shots) == num_images
    for name, part in SPLITS.items():
        assert abs(len(of(shots, name)) - part * num_images) <= 2
        assert {shot.label for shot in of(shots, name)} == set(range(len(CLASSES)))


def test_too_few_images_is_a_data_error() -> None:
    with pytest.raises(DataError, match="399 images is too small"):
        plan(399, 0)


def test_id_splits_share_cameras_with_training_and_ood_splits_share_none(shots: list[Shot]) -> None:
    cameras = {name: {shot.scene.camera for shot in of(shots, name)} for name in SPLITS}
    places = {name: {shot.scene.place for shot in of(shots, name)} for name in SPLITS}
    assert cameras["id_val"] <= cameras["train"]
    assert cameras["id_test"] <= cameras["train"]
    for a, b in (("val", "train"), ("test", "train"), ("val", "test")):
        assert not cameras[a] & cameras[b]
        assert not places[a] & places[b]


def test_bursts_stay_in_one_split_and_show_one_animal(shots: list[Shot]) -> None:
    bursts: dict[int, list[Shot]] = {}
    for shot in shots:
        bursts.setdefault(shot.burst, []).append(shot)
    assert sorted(bursts) == list(range(len(bursts)))
    for frames in bursts.values():
        assert len({(f.split, f.label, f.scene.camera, f.scene.individual) for f in frames}) == 1
        assert [f.frame for f in frames] == list(range(frames[0].num_frames))
        assert len({f.scene.time for f in frames}) == len(frames)
    assert max(map(len, bursts.values())) == 4


def test_classes_are_imbalanced(shots: list[Shot]) -> None:
    counts = Counter(shot.label for shot in of(shots, "train"))
    assert max(counts.values()) > 8 * min(counts.values())
    assert counts[0] > 100  # empty pictures


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_place_tells_the_species_in_training_and_not_in_test(seed: int) -> None:
    shots = plan(2000, seed)
    assert association(of(shots, "train")) > 0.7
    assert association(of(shots, "id_val", "id_test")) > 0.6
    # With some 130 bursts of ten species at two places, chance alone gives about 0.26.
    assert association(of(shots, "test")) < 0.45
