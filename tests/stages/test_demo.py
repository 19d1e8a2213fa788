"""The demo: what its edits are, what it refuses, and (slow) that it runs, resumes and comes out the same."""

from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flyp_saflex.assets.scene import Scene
from flyp_saflex.assets.world import TEST_PLACES, TRAIN_PLACES, VAL_PLACES
from flyp_saflex.cache import AugmentCache
from flyp_saflex.errors import RunError, UserError
from flyp_saflex.stages import demo as module
from flyp_saflex.stages.demo import CONDITIONS, SPOILT, demo, edit

TINY = {"num_images": 400, "steps": 3}
SCENE = Scene(species="deer", place="forest")


def test_edits_show_another_training_place_and_never_one_of_val_or_test() -> None:
    edits = [edit(SCENE, np.random.default_rng([0, number])) for number in range(300)]
    places = {scene.place for scene, _, _ in edits}
    assert places == set(TRAIN_PLACES) - {"forest"}
    assert not places & {*VAL_PLACES, *TEST_PLACES}
    assert all(instruction == f"put it in the {scene.place}" for scene, instruction, _ in edits)


def test_kind_of_an_edit_is_what_it_shows() -> None:
    kinds = Counter()
    for number in range(1000):
        scene, _, kind = edit(SCENE, np.random.default_rng([0, number]))
        kinds[kind] += 1
        assert (scene.species == "deer", scene.species is None) == (kind == "faithful", kind == "animal lost")
    assert set(kinds) == {"faithful", "animal lost", "other animal"}
    # Binomial standard errors with 1000 draws are 0.0155 and 0.0127; four of them.
    assert kinds["faithful"] / 1000 == pytest.approx(1 - SPOILT, abs=0.062)
    assert kinds["animal lost"] / 1000 == pytest.approx(SPOILT / 2, abs=0.051)


def test_empty_picture_cannot_lose_its_animal() -> None:
    empty = Scene(species=None, place="lake")
    found = [edit(empty, np.random.default_rng([0, number])) for number in range(200)]
    assert {kind for _, _, kind in found} == {"faithful", "animal appeared"}
    assert all((scene.species is None) == (kind == "faithful") for scene, _, kind in found)


def test_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match="holds files that are not a demo's"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_folder_of_another_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"num_images": 4, "seed": 0}), encoding="utf-8")
    with pytest.raises(RunError, match="made with another num_images and recipe and spoilt"):
        demo(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_broken_settings_are_another_demos(tmp_path: Path, content: str) -> None:
    (tmp_path / "demo.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match="give a new folder, or delete it"):
        demo(tmp_path)


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", "metadata.csv")

    monkeypatch.setattr(module, "write_world", full)
    with pytest.raises(RunError, match=r"metadata\.csv cannot be written \(No space left on device\); free disk space"):
        demo(tmp_path / "out")


def test_folder_that_cannot_be_written_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="choose another with --out"):
        demo(tmp_path / "file" / "demo")


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo(out, **TINY)


def results(out: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text(encoding="utf-8") for path in sorted(out.glob("runs/*/results.json"))}


def without_time(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("Done in")]


@pytest.mark.slow
def test_demo_ends_in_the_table_and_the_report(finished: tuple[Path, str]) -> None:
    out, text = finished
    lines = text.splitlines()
    assert [line.partition("   ")[0].strip() for line in lines[1:5]] == [name[:40] for name in CONDITIONS]
    assert "n = 1 (seed 0)" in text
    assert "% of faithful" in text
    assert lines[-1].endswith(f"Report: {out / 'report.html'}")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in CONDITIONS)


@pytest.mark.slow
def test_manifest_does_not_say_what_became_of_an_edit(finished: tuple[Path, str]) -> None:
    cache = AugmentCache.open(finished[0] / "augment_cache", "iwildcam")
    assert cache.done
    truth = [json.loads(line) for line in (cache.folder / "truth.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["aug_id"] for row in truth] == [found.aug_id for found in cache.edits]
    assert not {"faithful", "animal lost"} & {str(value) for found in cache.edits for value in found.provenance.values()}


@pytest.mark.slow
def test_rerun_does_nothing_and_prints_the_table_again(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = finished

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a finished step was done again")

    for name in ("train", "evaluate", "write_world", "render"):
        monkeypatch.setattr(module, name, forbidden)
    again = demo(out, **TINY)
    assert without_time(again) == without_time(text)
    assert capsys.readouterr().out.endswith(again + "\n")


@pytest.mark.slow
def test_interrupted_demo_goes_on_and_equals_an_undisturbed_one(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = module.evaluate, []

    def interrupted(run: Path, **options: object) -> object:
        calls.append(run.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(run, **options)

    monkeypatch.setattr(module, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "out", **TINY)
    text = demo(tmp_path / "out", **TINY)
    assert calls == ["zero-shot", "flyp", "flyp", "flyp-edits-all-trusted", "flyp-edits-saflex"]
    assert without_time(text) == without_time(finished[1])
    assert results(tmp_path / "out") == results(finished[0])
