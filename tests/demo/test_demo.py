"""The demo: its texts and its table, what it refuses, and (slow) that it runs, resumes and comes out the same."""

from __future__ import annotations

import errno
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from flyp_saflex import recipe
from flyp_saflex.comparison import compare as runs
from flyp_saflex.demo import biased_cameras
from flyp_saflex.demo import demo as module
from flyp_saflex.demo.biased_cameras import PHRASES
from flyp_saflex.demo.corruption import CLEAN, read_truth
from flyp_saflex.demo.demo import LABELS, NUM_DIFFUSION, RATE, RIVALS, SAFLEX, demo, summary
from flyp_saflex.demo.world import TEST_PLACES, TRAIN_PLACES, VAL_PLACES
from flyp_saflex.editing import generate as generating
from flyp_saflex.errors import RunError, UserError
from flyp_saflex.prompting.edit_prompts import load_edit_prompts
from flyp_saflex.storage.augment_cache import AugmentCache

TRUSTED = "trusted"
TINY = {"num_images": 400, "steps": 3}


def test_places_file_names_only_places_that_training_knows() -> None:
    texts = load_edit_prompts("demo.places", "iwildcam").edits
    assert {place for place in TRAIN_PLACES for text in texts if place.rstrip("s") in text.domain} == set(TRAIN_PLACES)
    assert not [(place, text) for place in (*VAL_PLACES, *TEST_PLACES, "night") for text in texts if place in text.instruction]


def test_diffusion_model_gets_the_instructions_of_the_rendered_edits() -> None:
    texts = load_edit_prompts(recipe.load("demo").editor.prompts, "iwildcam").edits
    assert {text.instruction for text in texts} == {f"put the {{}} {phrase}" for phrase in PHRASES.values()}


def test_recipe_has_the_conditions_of_the_table_on_edits_that_are_said_to_be_rendered_and_wrong() -> None:
    options = recipe.load("demo").compare
    assert list(options.conditions) == list(LABELS)
    assert all("rendered" in name and "wrong on purpose" in name for name in options.edits)
    assert {"no-edits", "zero-shot", TRUSTED} < set(RIVALS) < set(LABELS)


@pytest.mark.parametrize("seeds", [0, -1])
def test_no_seed_is_refused(tmp_path: Path, seeds: int) -> None:
    with pytest.raises(UserError, match=f"--seeds {seeds}: expected 1 or more"):
        demo(tmp_path / "demo", seeds=seeds)
    assert not (tmp_path / "demo").exists()


def written(folder: Path, recipe_name: str, seed: int, accuracy: float) -> Path:
    run = folder / f"{recipe_name}-{seed}"
    run.mkdir(parents=True)
    rows = [
        {
            "split": split,
            "role": "test",
            "shift": "id",
            "wise_alpha": alpha,
            "n": 100,
            "accuracy": accuracy + shift,
            "macro_f1": accuracy / 2,
        }
        for split, shift in (("id_test", 0.1), ("test", 0.0))
        for alpha in (0.5, 1.0)
    ]
    (run / "results.json").write_text(
        json.dumps({"recipe": recipe_name, "seed": seed, "results": rows, "chosen_alpha": 0.5}), encoding="utf-8"
    )
    return run


def test_table_has_means_over_seeds_and_the_paired_difference(tmp_path: Path) -> None:
    base = [written(tmp_path, name, seed, value) for name in RIVALS for seed, value in enumerate((0.5, 0.6, 0.7))]
    ours = [written(tmp_path, SAFLEX, seed, value) for seed, value in enumerate((0.52, 0.64, 0.76))]
    text = summary([*base, *ours])
    line = next(line for line in text.splitlines() if line.startswith(LABELS[SAFLEX]))
    assert line.removeprefix(LABELS[SAFLEX]).split() == ["74.0", "32.0", "64.0", "32.0", "64.0", "32.0"]
    # Differences 2, 4, 6: mean 4, deviation 2, t of two degrees of freedom 4.303: 4 +- 4.303 * 2 / sqrt(3).
    # F1 is half the accuracy: 1, 2, 3 and so half of all that.
    assert "SAFLEX against the others, n = 3 seeds" in text
    below = text[text.index("SAFLEX against the others") :].splitlines()
    assert [line.split("  ")[0] for line in below[2:]] == [LABELS[name] for name in RIVALS]
    assert all(line.split()[-6:] == ["+4.0", "[-1.0,", "+9.0]", "+2.0", "[-0.5,", "+4.5]"] for line in below[2:])


def test_table_of_one_seed_says_what_it_can_say_and_has_no_interval(tmp_path: Path) -> None:
    text = summary([written(tmp_path, f"{name} @ rendered", 0, 0.5) for name in LABELS])
    assert "n = 1: one seed shows how it works, not by how much it helps" in text
    assert "[" not in text
    assert "rendered edits" in text.lower()
    assert "wrong on purpose" in text


def test_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match="holds files that are not a demo's"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_folder_of_another_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"num_images": 4, "seed": 0}), encoding="utf-8")
    with pytest.raises(RunError, match="made with another num_images and recipe"):
        demo(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_broken_settings_are_another_demos(tmp_path: Path, content: str) -> None:
    (tmp_path / "demo.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match="give a new folder, or delete it"):
        demo(tmp_path)


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", "metadata.csv")

    monkeypatch.setattr(module, "biased_world", full)
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
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Folder of a demo, what it returned, what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with redirect_stdout(io.StringIO()) as printed:
        text = demo(out, **TINY)
    return out, text, printed.getvalue()


def results(out: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text(encoding="utf-8") for path in sorted(out.glob("runs/*/results.json"))}


def without_time(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("Done in")]


@pytest.mark.slow
def test_demo_ends_in_the_table_and_the_report(finished: tuple[Path, str, str]) -> None:
    out, text, printed = finished
    lines = text.splitlines()
    assert [line.partition("   ")[0].strip() for line in lines[1:7]] == list(LABELS.values())
    assert lines[-1].endswith(f"Report: {out / 'report.html'}")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in LABELS)
    top = page[: page.index("<h2")]
    assert "Are edits worth having?" in top
    for words in ("Not shown at n = 1", "One seed has no interval", "rendered edits, half wrong on purpose"):
        assert words in top
    first_screen = printed[: printed.index("[1/4]")]
    for words in ("rendered", "no diffusion model", "Half of them are wrong on purpose", "n = 1"):
        assert words in first_screen


@pytest.mark.slow
def test_demo_makes_both_kinds_of_edits_and_trains_on_the_rendered_ones(finished: tuple[Path, str, str]) -> None:
    out = finished[0]
    root = out / "seed0" / "augment_cache"
    diffusion, rendered = (AugmentCache.open(root, "iwildcam", key) for key in ("diffusion", "rendered"))
    assert len(diffusion) == NUM_DIFFUSION
    assert {edit.provenance["kind"] for edit in diffusion.edits} == {"instruct-pix2pix"}
    assert {edit.provenance["kind"] for edit in rendered.edits} == {"rendered"}
    wrong = [kind != CLEAN for kind in read_truth(root, "iwildcam", "rendered").values()]
    # Four standard deviations of the 268 edits.
    assert sum(wrong) / len(wrong) == pytest.approx(RATE, abs=0.13)
    for run in out.glob("runs/*rendered*-seed0"):
        assert recipe.load(str(run / "config.toml")).cache.key == "rendered"


@pytest.mark.slow
def test_rerun_does_nothing_and_prints_the_table_again(
    finished: tuple[Path, str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text, _ = finished

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a finished step was done again")

    for home, names in ((runs, ("train", "evaluate")), (biased_cameras, ("write_world",)), (generating, ("load_editor",))):
        for name in names:
            monkeypatch.setattr(home, name, forbidden)
    again = demo(out, **TINY)
    assert without_time(again) == without_time(text)
    assert capsys.readouterr().out.endswith(again + "\n")


@pytest.mark.slow
def test_interrupted_demo_goes_on_and_equals_an_undisturbed_one(
    finished: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = runs.evaluate, []

    def interrupted(run: Path, **options: object) -> object:
        calls.append(run.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(run, **options)

    monkeypatch.setattr(runs, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "out", **TINY)
    text = demo(tmp_path / "out", **TINY)
    names = [call.partition("-rendered")[0].removesuffix("-seed0") for call in calls]
    assert names == ["zero-shot", "no-edits", "no-edits", *list(LABELS)[2:]]
    assert without_time(text) == without_time(finished[1])
    assert results(tmp_path / "out") == results(finished[0])
