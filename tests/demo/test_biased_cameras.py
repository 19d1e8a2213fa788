"""The biased world and its perfect edits: the bias, what an edit shows, nesting in the rate, the same files again."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex.config import DataConfig
from flyp_saflex.data.wilds import read_iwildcam
from flyp_saflex.demo.biased_cameras import PHRASES, biased_world, write_rendered_edits
from flyp_saflex.demo.corruption import CLEAN, read_truth
from flyp_saflex.demo.places import PLACES
from flyp_saflex.demo.scene import at, render
from flyp_saflex.demo.world import EMPTY, HOME, plan, read_scenes, write_world
from flyp_saflex.errors import DataError
from flyp_saflex.prompting.edit_prompts import load_edit_prompts
from flyp_saflex.records import Dataset
from flyp_saflex.storage.augment_cache import AugmentCache


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = biased_world(tmp_path_factory.mktemp("biased"), seed=0, num_images=400)
    return read_iwildcam(DataConfig(name="iwildcam", root=str(root.parent), prompts=str(root / "prompts")))


@pytest.fixture(scope="module")
def entries(world: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[float, tuple[AugmentCache, dict[str, str]]]:
    """The entry and the truth of every rate."""
    root, found = tmp_path_factory.mktemp("edits"), {}
    for rate in (0.0, 0.25, 0.5):
        write_rendered_edits(world, root, f"rate{rate:g}", seed=0, rate=rate)
        found[rate] = AugmentCache.open(root, "iwildcam", f"rate{rate:g}"), read_truth(root, "iwildcam", f"rate{rate:g}")
    return found


def test_training_sees_a_species_only_at_home_and_the_other_places_see_all_alike() -> None:
    shots = [shot for shot in plan(2000, 0, at_home=1.0) if shot.scene.species]
    own = [shot.scene.place == HOME[str(shot.scene.species)] for shot in shots if shot.split in ("train", "id_val", "id_test")]
    assert all(own)
    elsewhere = Counter(shot.scene.place for shot in shots if shot.split in ("val", "test"))
    assert set(elsewhere) == {"snow", "infrared night", "dusk", "autumn"}


def test_without_the_argument_the_world_is_the_one_that_was_drawn_before_it_existed() -> None:
    rows = [(s.split, s.burst, s.scene.species, s.scene.place, s.scene.camera, round(s.scene.x, 5)) for s in plan(400, 3)]
    assert hashlib.sha256(repr(rows).encode()).hexdigest() == "1dc43265fa8b9214f028d27a648e479fbc9ce468c9be41af5a9a9d511ddf56c2"
    assert plan(400, 3) != plan(400, 3, at_home=1.0)


def test_another_world_in_the_folder_is_refused_and_the_same_one_left_alone(tmp_path: Path) -> None:
    root = biased_world(tmp_path / "a", seed=0, num_images=400)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert biased_world(tmp_path / "a", seed=0, num_images=400) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with pytest.raises(DataError, match="holds another world"):
        biased_world(tmp_path / "a", seed=1, num_images=400)
    write_world(tmp_path / "b", num_images=400, seed=0, size_px=64)
    with pytest.raises(DataError, match="at home 1"):
        biased_world(tmp_path / "b", seed=0, num_images=400)


def test_every_training_picture_has_two_edits_to_different_places(world: Dataset, entries) -> None:
    cache, _ = entries[0.5]
    places: dict[str, set[object]] = {}
    for edit in cache.check_against(world):
        places.setdefault(edit.source_id, set()).add(edit.provenance["domain"])
    assert places.keys() == {sample.sample_id for sample in world.train.samples}
    assert {len(found) for found in places.values()} == {2}
    assert set().union(*places.values()) == set(PLACES)


def test_a_clean_edit_is_its_source_at_the_place_that_the_instruction_names(world: Dataset, entries) -> None:
    cache, truth = entries[0.0]
    assert set(truth.values()) == {CLEAN}
    scenes = read_scenes(world.root.parent)
    for edit in cache.edits[::20]:
        place, source = str(edit.provenance["domain"]), scenes[edit.source_id]
        assert edit.instruction == f"put the {source.species or EMPTY} {PHRASES[place]}"
        drawn = np.asarray(Image.open(edit.path))
        assert any(
            (np.asarray(render(dataclasses.replace(at(source, place), camera=camera))) == drawn).all()
            for camera in range(100, 200)
        )


def test_corrupted_edits_keep_their_label_and_show_another_species_or_nobody(world: Dataset, entries) -> None:
    cache, truth = entries[0.5]
    shown = {aug_id: row["true_label"] for aug_id, row in cache.scores("oracle.jsonl").items()}
    labels = {sample.sample_id: sample.label for sample in world.train.samples}
    for edit in cache.edits:
        kind = truth[edit.aug_id]
        assert edit.label == labels[edit.source_id]
        assert (shown[edit.aug_id] == edit.label) == (kind == CLEAN)
        assert (shown[edit.aug_id] == 0) == (kind == "lost" or (kind == CLEAN and edit.label == 0))
    animals = Counter(truth[edit.aug_id] for edit in cache.edits if edit.label)
    # Four standard deviations of the about 210 edits of animals.
    assert animals[CLEAN] / animals.total() == pytest.approx(0.5, abs=0.14)
    assert animals["lost"] / animals.total() == pytest.approx(0.25, abs=0.12)


def test_what_is_corrupted_at_a_rate_is_the_same_at_a_higher_one(entries) -> None:
    (low, low_truth), (high, high_truth) = entries[0.25], entries[0.5]
    assert low_truth.keys() == high_truth.keys()
    assert 0 < sum(kind != CLEAN for kind in low_truth.values()) < sum(kind != CLEAN for kind in high_truth.values())
    for edit in low.edits:
        kinds = low_truth[edit.aug_id], high_truth[edit.aug_id]
        assert kinds[0] in (CLEAN, kinds[1])
        same = edit.path.read_bytes() == (high.folder / edit.aug_id).read_bytes()
        assert same == (kinds[0] == kinds[1])


def test_the_same_seed_gives_the_same_files_and_another_seed_others(world: Dataset, entries, tmp_path: Path) -> None:
    cache, _ = entries[0.5]
    again = write_rendered_edits(world, tmp_path, "again", seed=0, rate=0.5)
    other = write_rendered_edits(world, tmp_path, "other", seed=1, rate=0.5)
    for edit in cache.edits[::7]:
        assert (again / edit.aug_id).read_bytes() == edit.path.read_bytes()
    assert (again / "metadata.jsonl").read_bytes() == (cache.folder / "metadata.jsonl").read_bytes()
    assert (other / "metadata.jsonl").read_bytes() != (cache.folder / "metadata.jsonl").read_bytes()


def test_the_editors_texts_name_the_same_places() -> None:
    texts = load_edit_prompts("demo.everywhere", "iwildcam")
    assert [edit.domain for edit in texts.edits] == list(PHRASES.values())
    assert PHRASES.keys() == PLACES.keys()
