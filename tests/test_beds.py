"""scripts/beds: conditions by severity, edits of photographs with a known truth, folders that the recipes beside them read."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex import recipe
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.demo.corruption import CLEAN, read_truth
from flyp_saflex.demo.scene import Scene, render
from flyp_saflex.errors import DataError
from flyp_saflex.records import Sample
from flyp_saflex.storage.augment_cache import AugmentCache

BEDS = Path(__file__).resolve().parents[1] / "scripts" / "beds"
sys.path.append(str(BEDS))
import conditions  # noqa: E402
import make  # noqa: E402
from photographs import DESTROYED, SWAPPED, shuffle_patches  # noqa: E402

CONDITIONS = sorted(conditions.FAMILIES)


def scenes() -> list[Image.Image]:
    """Three detailed pictures, none of them square."""
    places = (("zebra", "forest"), ("tiger", "lake"), ("fox", "meadow"))
    return [render(Scene(species=name, place=place, camera=5), 96).crop((0, 0, 96, 84)) for name, place in places]


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


@pytest.mark.parametrize("name", CONDITIONS)
def test_severity_zero_changes_nothing_and_more_takes_the_picture_farther_away(name: str) -> None:
    operation = conditions.FAMILIES[name]
    distances = [
        np.mean(
            [distance(image, operation(image, severity, np.random.default_rng(seed))) for image in scenes() for seed in range(3)]
        )
        for severity in (0, 0.2, 0.4, 0.6, 0.8, 1)
    ]
    assert distances[0] == 0
    assert (np.diff(distances) > 0).all()
    assert distances[-1] > 12


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_follows_its_generator_and_leaves_its_input_alone(name: str) -> None:
    operation, image = conditions.FAMILIES[name], scenes()[0]
    before = image.tobytes()
    first, again, other = (operation(image, 0.8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first.mode, first.size) == ("RGB", image.size)
    assert first.tobytes() == again.tobytes()
    assert (first.tobytes() == other.tobytes()) == (name == "low-resolution")  # nothing random in it
    assert image.tobytes() == before


def test_shuffled_patches_are_the_same_pixels_elsewhere() -> None:
    image = scenes()[0]
    shuffled = shuffle_patches(image, np.random.default_rng(0))
    colours = [np.sort(np.asarray(picture).reshape(-1, 3), axis=0) for picture in (image, shuffled)]
    assert np.array_equal(*colours)
    assert distance(image, shuffled) > 12


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder photo/ with 42 pictures of three classes each: 30 to select with, 8 to test on and 4 to train on."""
    root = tmp_path_factory.mktemp("photographs")
    for species in ("zebra", "tiger", "fox"):
        (root / "photo" / species).mkdir(parents=True)
        for number in range(42):
            scene = Scene(species=species, place="meadow", camera=number % 3, x=0.3 + 0.01 * number, seed=number)
            render(scene, 32).save(root / "photo" / species / f"{number}.jpg")
    return root


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["make.py", *map(str, arguments)])
    return make.main()


def snapshot(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("bed", ["camera-trap-conditions", "pacs"])
def test_edits_of_photographs_are_nested_in_the_rate_and_what_is_there_is_left_alone(
    bed: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (bed, "--data", photographs, "--out", tmp_path, "--seeds", "1", "--rates", "0.5,1")
    assert run(monkeypatch, *command) == 0
    before = snapshot(tmp_path)
    assert run(monkeypatch, *command) == 0
    assert snapshot(tmp_path) == before
    half, whole = (AugmentCache.open(tmp_path / "edits", "folder", f"seed1-rate{rate}") for rate in ("0.5", "1"))
    truth, all_corrupted = (read_truth(tmp_path / "edits", "folder", f"seed1-rate{rate}") for rate in ("0.5", "1"))
    assert set(all_corrupted.values()) == {SWAPPED, DESTROYED}
    assert Counter(truth.values()).keys() == {CLEAN, SWAPPED, DESTROYED}
    rows = half.scores("oracle.jsonl")
    for edit in half.edits:
        kind, other = truth[edit.aug_id], (whole.folder / edit.aug_id).read_bytes()
        assert kind in (CLEAN, all_corrupted[edit.aug_id])
        assert (edit.path.read_bytes() == other) == (kind != CLEAN)
        assert rows[edit.aug_id]["keep"] == (kind == CLEAN)
        shown = rows[edit.aug_id]["true_label"]
        assert {CLEAN: shown == edit.label, SWAPPED: shown not in (edit.label, None), DESTROYED: shown is None}[kind]
    per_photo = Counter(edit.source_id for edit in half.edits)
    assert set(per_photo.values()) == {4}
    assert len({(edit.source_id, edit.provenance["domain"]) for edit in half.edits}) == len(half.edits) == 4 * 12


def test_the_tested_conditions_show_photographs_that_nothing_is_trained_on(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = ("--seeds", "0-1", "--rates", "0")
    assert run(monkeypatch, "camera-trap-conditions", "--data", photographs, "--out", tmp_path, *seeds) == 0
    for seed in (0, 1):
        overrides = [f"data.root={tmp_path / 'data'}", f"seed={seed}"]
        config = recipe.load(str(BEDS / "camera-trap-conditions.toml"), overrides)
        dataset = load_dataset(config.data, seed=seed)
        tested = {sample.sample_id.removeprefix("conditions/") for sample in dataset.splits["conditions"].samples}
        held_out = {sample.sample_id.removeprefix("photo/") for sample in dataset.splits["id_test"].samples}
        assert tested == {f"{name.removesuffix('.jpg')}-{family}.jpg" for name in held_out for family in CONDITIONS}
        assert dataset.splits["conditions"].role == "test"
        assert dataset.splits["conditions"].shift == "ood"
        edits = AugmentCache.open(tmp_path / "edits", "folder", f"seed{seed}-rate0").check_against(dataset)
        assert {edit.source_id for edit in edits} == {sample.sample_id for sample in dataset.train.samples}


def test_tested_pictures_of_another_split_are_refused(tmp_path: Path) -> None:
    scenes()[0].save(tmp_path / "0.jpg")
    photo = Sample(sample_id="photo/fox/0.jpg", item=tmp_path / "0.jpg", label=0)
    assert conditions.write_test_domain([photo], tmp_path / "conditions") == 6
    with pytest.raises(DataError, match=r"6 pictures that are not of these held-out photographs"):
        conditions.write_test_domain([], tmp_path / "conditions")


def test_other_photographs_in_the_same_folder_are_refused(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(photographs, other)
    rest = ("--out", tmp_path / "bed", "--seeds", "0", "--rates", "0")
    assert run(monkeypatch, "camera-trap-conditions", "--data", photographs, *rest) == 0
    capsys.readouterr()
    assert run(monkeypatch, "camera-trap-conditions", "--data", other, *rest) == 2
    assert "the same --data as before" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("pacs",), ("camera-trap-conditions", "--data", "nowhere")])
def test_missing_photographs_are_one_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments, "--out", tmp_path / "bed") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "photo/<class>/*.jpg" in error
    assert not (tmp_path / "bed").exists()


def test_the_biased_world_is_read_with_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("biased-cameras", "--out", tmp_path, "--seeds", "2", "--rates", "0.25", "--num-images", "400")
    assert run(monkeypatch, *command) == 0
    before = snapshot(tmp_path)
    assert run(monkeypatch, *command) == 0
    assert snapshot(tmp_path) == before
    world = tmp_path / "worlds" / "seed2"
    overrides = [f"data.root={world}", f"data.prompts={world / 'iwildcam_v2.0' / 'prompts'}", "seed=2"]
    config = recipe.load(str(BEDS / "biased-cameras.toml"), overrides)
    dataset = load_dataset(config.data, seed=2)
    edits = AugmentCache.open(tmp_path / "edits", "iwildcam", "seed2-rate0.25").check_against(dataset)
    assert len(edits) == 2 * len(dataset.train)


@pytest.mark.parametrize(("bed", "shipped"), [("biased-cameras", "demo"), ("camera-trap-conditions", "pacs"), ("pacs", "pacs")])
def test_a_bed_trains_as_the_shipped_recipe_does(bed: str, shipped: str) -> None:
    ours, theirs = recipe.load(str(BEDS / f"{bed}.toml")), recipe.load(shipped)
    log_only = {"checkpoint_every": 0, "keep_checkpoints": 1, "log_augmented": True}
    assert dataclasses.replace(ours.train, **log_only) == dataclasses.replace(theirs.train, **log_only)
    assert ours.augment == theirs.augment
    assert (ours.data.shots, ours.data.select_per_class) == (theirs.data.shots, theirs.data.select_per_class)
