"""Choice of edits: quotas, the way out of a bias, budgets; deterministic, and told as a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from flyp_saflex.demo.biased_cameras import PHRASES
from flyp_saflex.demo.world import CLASSES, HOME, plan
from flyp_saflex.editing.choice import choice_table, choose_edits, read_places
from flyp_saflex.editing.plan import PlannedEdit, Wording, plan_edits
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.records import Sample

COUNTS = (40, 10, 3)
NAMES = ("deer", "hare", "lynx")
TEXTS = [Wording("snow", "put the {} in the snow"), Wording("lake", "put the {} near a lake"), Wording("dusk", "make it dusk")]


def samples(counts: tuple[int, ...] = COUNTS) -> list[Sample]:
    """Images whose class is seen at one place of its own, and the first class also at the lake."""
    homes = ("snow", "lake", "dusk")
    found = [
        Sample(sample_id=f"{label}/{n}.jpg", item=Path(f"{label}/{n}.jpg"), label=label, domain=homes[label])
        for label, count in enumerate(counts)
        for n in range(count)
    ]
    return [Sample(sample_id=f"0/lake{n}.jpg", item=Path("x"), label=0, domain="lake") for n in range(5)] + found


def choose(name: str, budget: int = 0, seed: int = 0, images: list[Sample] | None = None) -> list[PlannedEdit]:
    images = samples() if images is None else images
    every = plan_edits(images, TEXTS, NAMES, seed=seed)
    return list(choose_edits(every, images, EditorConfig(plan=name, budget=budget), {}, seed=seed))  # type: ignore[arg-type]


def per_class(edits: list[PlannedEdit]) -> dict[int, int]:
    return dict(Counter(edit.sample.label for edit in edits))


def test_all_is_every_edit_and_a_budget_draws_from_them() -> None:
    every = plan_edits(samples(), TEXTS, NAMES)
    assert choose("all") == list(every)
    some = choose("all", 50)
    assert len(some) == 50
    assert [edit for edit in every if edit in some] == some  # in the order of the plan
    assert {edit.file_name for edit in some} < {edit.file_name for edit in choose("all", 60)}
    assert len(choose("all", 10**6)) == len(every)
    assert choose("all", 50, seed=1) != some


def test_texts_that_are_the_same_for_a_class_are_one_edit() -> None:
    texts = [*TEXTS, Wording("deer in the snow", "put the deer in the snow")]
    every = plan_edits(samples((2, 2, 0)), texts, NAMES)
    assert len(set(every.file_names)) == len(every) == 7 * 3 + 2 * 4
    assert Counter(edit.domain for edit in every) == {"snow": 9, "lake": 9, "dusk": 9, "deer in the snow": 2}


def test_quota_levels_the_classes_rare_ones_first() -> None:
    assert per_class(choose("quota")) == {1: 30, 2: 9}  # 45, 10 and 3 images, and 3 texts: all that a rare class can get
    assert per_class(choose("quota", 9)) == {1: 1, 2: 8}  # 45, 11, 11
    assert per_class(choose("quota", 20)) == {1: 11, 2: 9}
    assert per_class(choose("quota", 60)) == {0: 21, 1: 30, 2: 9}
    # texts are drawn: none comes first for every image
    assert {edit.domain for edit in choose("quota", 20) if edit.sample.label == 1} == {"snow", "lake", "dusk"}
    assert {edit.domain for edit in choose("all", 20)} == {"snow", "lake", "dusk"}
    # an image is edited a second time only after every image of its class was
    times = Counter(edit.sample.sample_id for edit in choose("quota", 6) if edit.sample.label == 2)
    assert sorted(times.values()) == [2, 2, 2]


def test_bias_goes_to_places_where_the_class_was_not_seen() -> None:
    cells = Counter((edit.sample.label, edit.domain) for edit in choose("bias"))
    # class 0: 40 in the snow, 5 at the lake; the others only at home; no pair rises above the largest of its class
    assert cells == {(0, "lake"): 35, (0, "dusk"): 40, (1, "snow"): 10, (1, "dusk"): 10, (2, "snow"): 3, (2, "lake"): 3}
    few = Counter((edit.sample.label, edit.domain) for edit in choose("bias", 10))
    assert few == {(0, "dusk"): 2, (1, "snow"): 2, (1, "dusk"): 2, (2, "snow"): 2, (2, "lake"): 2}  # never seen come first
    assert len(choose("bias", 10**6)) == sum(cells.values())


def test_bias_on_the_drawn_world_leaves_the_home_of_every_species(tmp_path: Path) -> None:
    shots = [shot for shot in plan(2400, 0, at_home=1.0) if shot.split == "train"]
    images = [
        Sample(sample_id=f"{n}.jpg", item=Path(f"{n}.jpg"), label=shot.label, domain=str(shot.scene.camera))
        for n, shot in enumerate(shots)
    ]
    table = {str(shot.scene.camera): shot.scene.place for shot in shots}
    file = tmp_path / "places.csv"
    file.write_text("domain,place\n" + "".join(f"{camera},{place}\n" for camera, place in table.items()))
    places = read_places(str(file), images)
    assert places == table
    texts = [Wording(place, f"put the {{}} {phrase}") for place, phrase in PHRASES.items()]
    every = plan_edits(images, texts, CLASSES)
    for budget in (0, 500):
        chosen = choose_edits(every, images, EditorConfig(plan="bias", budget=budget), places, seed=0)
        went = {name: {edit.domain for edit in chosen if CLASSES[edit.sample.label] == name} for name in HOME}
        # training saw a species at home only: its edits go to all other places, and none to its home
        assert went == {name: set(PHRASES) - {home} for name, home in HOME.items()}
        assert budget in (0, len(chosen))


def test_the_choice_depends_on_no_order_of_the_images() -> None:
    for name in ("all", "quota", "bias"):
        forwards = choose(name, 30)
        backwards = choose(name, 30, images=samples()[::-1])
        assert {edit.file_name for edit in forwards} == {edit.file_name for edit in backwards}
        assert forwards == choose(name, 30)


def test_the_table_tells_every_class_and_text() -> None:
    lines = [line.split() for line in choice_table(choose("bias"), samples(), NAMES).splitlines()]
    assert lines == [
        ["class", "images", "lake", "dusk", "snow", "edits", "images", "+", "edits"],
        ["deer", "45", "35", "40", "0", "75", "120"],
        ["hare", "10", "0", "10", "10", "20", "30"],
        ["lynx", "3", "3", "0", "3", "6", "9"],
        ["all", "58", "38", "50", "13", "101", "159"],
    ]


def test_budgets_and_places_that_cannot_work_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"editor\.budget = 2 is below one edit per class, and training has 3 classes"):
        choose("quota", 2)
    elsewhere = [Sample(sample_id="a", item=Path("a"), label=0, domain="camera 7")]
    with pytest.raises(
        ConfigError, match=r"no text's domain \(dusk, lake, snow\) is a place of the training images \(camera 7\)"
    ):
        choose("bias", images=elsewhere)
    file = tmp_path / "places.csv"
    for text, message in (
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"", "expected a header and rows"),
        (b"camera,place\n1,lake\n", "expected a header and rows"),
        (b"domain,place\ncamera 8,lake\n", "no place for 1 of the training domains, first 'camera 7'; did you mean 'camera 8'"),
    ):
        if text is not None:
            file.write_bytes(text)
        with pytest.raises(DataError) as caught:
            read_places(str(file), elsewhere)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert read_places("", elsewhere) == {}
