"""Pictures of the drawn world: the same scene gives the same pixels, and an edit changes the place only."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flyp_saflex.demo.animals import SPECIES, Pose, draw
from flyp_saflex.demo.places import PLACES
from flyp_saflex.demo.scene import Scene, at, render


def pixels(scene: Scene, size_px: int = 64) -> np.ndarray:
    return np.asarray(render(scene, size_px), dtype=np.float32)


def test_there_are_enough_kinds() -> None:
    assert len(SPECIES) >= 8
    assert len(PLACES) >= 8
    assert PLACES["infrared night"].infrared


@pytest.mark.parametrize("size_px", [32, 64, 224])
def test_same_scene_same_pixels_at_every_size(size_px: int) -> None:
    scene = Scene(species="fox", place="snow", occlusion=0.5, blur_px=0.6, individual=4, seed=5)
    image = render(scene, size_px)
    assert (image.mode, image.size) == ("RGB", (size_px, size_px))
    assert image.tobytes() == render(dataclasses.replace(scene), size_px).tobytes()
    assert image.tobytes() != render(dataclasses.replace(scene, seed=6), size_px).tobytes()


@pytest.mark.parametrize("species", SPECIES)
def test_every_species_shows_at_every_place(species: str) -> None:
    for place in PLACES:
        empty = pixels(Scene(species=None, place=place, camera=3))
        there = pixels(Scene(species=species, place=place, camera=3, size=0.7))
        changed = (np.abs(there - empty).max(axis=2) > 25).mean()
        # Even a bear in a dark forest stands out over a twentieth of the picture.
        assert changed > 0.05, place


def test_species_differ_from_each_other() -> None:
    images = {name: pixels(Scene(species=name, place="meadow", size=0.8)) for name in SPECIES}
    for a in SPECIES:
        for b in SPECIES:
            assert a == b or np.abs(images[a] - images[b]).mean() > 4, (a, b)


@pytest.mark.parametrize("field", ["x", "y", "size", "facing", "phase", "head", "tone", "occlusion", "blur_px", "exposure"])
def test_every_variation_shows(field: str) -> None:
    scene = Scene(species="deer", place="savanna", size=0.7)
    other = {"facing": -1, "occlusion": 0.8, "blur_px": 1.0, "exposure": 1.4, "x": 0.3, "y": 0.7, "size": 0.5}.get(field, 0.7)
    assert np.abs(pixels(scene) - pixels(dataclasses.replace(scene, **{field: other}))).mean() > 0.5


def test_an_edit_keeps_the_animal_and_changes_the_place() -> None:
    scene = Scene(species="tortoise", place="lake", camera=2, size=0.8, x=0.5)
    edited = at(scene, "snow")
    assert dataclasses.replace(edited, place="lake") == scene
    before, after = pixels(scene), pixels(edited)
    animal = np.abs(pixels(dataclasses.replace(scene, species=None)) - before).max(axis=2) > 40
    ground = ~animal
    ground[-8:] = False  # the timestamp bar
    assert np.abs(before - after)[animal].mean() < 0.4 * np.abs(before - after)[ground].mean()
    with pytest.raises(KeyError, match="moon"):
        at(scene, "moon")


def test_infrared_has_no_colours() -> None:
    night = pixels(Scene(species="tiger", place="infrared night"))
    assert (night[..., 0] == night[..., 2]).all()


def test_a_camera_sees_its_own_backdrop() -> None:
    first, again, other = (pixels(Scene(species=None, place="rocks", camera=camera, seed=1)) for camera in (1, 1, 2))
    assert (first == again).all()
    assert np.abs(first - other).mean() > 5


@pytest.mark.parametrize("species", SPECIES)
def test_every_pose_stands_on_the_ground(species: str) -> None:
    for phase in (0.0, 0.3, 0.8):
        for head in (0.0, 1.0):
            points = np.concatenate([part.points for part in draw(species, Pose(phase=phase, head=head))])
            assert np.isfinite(points).all()
            assert -0.15 < points[:, 1].min() < 0.1
