"""Evaluation on other data than the run's own: refused where it has no meaning, else beside the run's own results."""

import json
import shutil

import pytest
from PIL import Image

from flyp_saflex.errors import RunError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.training.train import train


@pytest.fixture
def run(make_config, tmp_path):
    path = tmp_path / "run"
    train(make_config("train.steps=1"), path)
    return path


def files_of(run):
    return {path.name: path.read_bytes() for path in [run / "results.json", *sorted((run / "predictions").iterdir())]}


def more_images(source, target):
    """Copy a folder and add an image per class."""
    shutil.copytree(source, target)
    for folder in target.glob("*/*"):
        shutil.copy(folder / "0.png", folder / "9.png")
    return target


def test_train_records_classes_templates_and_counts(run):
    record = json.loads((run / "data.json").read_text())
    assert record["class_names"] == ["circle", "square", "stripes"]
    assert record["templates"]
    assert {name: (split["images"], sum(split["per_class"])) for name, split in record["splits"].items()} == {
        "train": (12, 12),
        "id_val": (6, 6),
        "id_test": (6, 6),
        "night": (24, 24),
    }


@pytest.mark.parametrize("method", ["ce-linear", "linear-probe", "lp-ft"])
def test_a_linear_head_is_never_scored_on_other_classes(make_config, tiny_images_dir, tmp_path, method):
    run = tmp_path / "run"
    train(make_config(f"train.method={method}", "train.steps=1", "train.probe_steps=1"), run)
    own = evaluate(run)
    away = tmp_path / "away"
    shutil.copytree(tiny_images_dir, away)
    for domain in ("day", "night"):
        (away / domain / "circle").rename(away / domain / "zz_circle")  # the same pictures, another order of classes
    with pytest.raises(RunError, match=r"linear head stands for.*class 0 was 'circle' and is 'square'") as caught:
        evaluate(run, overrides=[f"data.root={away}"])
    assert "\n" not in str(caught.value)
    assert json.loads((run / "results.json").read_text()) == own


def test_another_dataset_lies_beside_the_runs_own_results(run, tiny_images_dir, tmp_path, capsys):
    evaluate(run)
    before = files_of(run)
    away = more_images(tiny_images_dir, tmp_path / "away")
    found = evaluate(run, overrides=[f"data.root={away}"])
    assert files_of(run) == before
    assert json.loads((run / "results-on-away.json").read_text()) == found
    assert {row["split"]: row["n"] for row in found["results"]}["night"] == 27
    assert (run / "predictions-on-away" / "night.parquet").is_file()
    assert (run / "details-on-away.json").is_file()
    told = capsys.readouterr().out
    assert "other data than the run was trained on (split 'id_" in told
    assert "results go to results-on-away.json beside the run's own" in told
    further = more_images(away.parent / "tiny_images", tmp_path / "further" / "away")
    shutil.rmtree(further / "night" / "circle")
    shutil.copytree(tiny_images_dir / "night" / "circle", further / "night" / "circle")
    evaluate(run, overrides=[f"data.root={further}"])
    assert json.loads((run / "results-on-away.json").read_text()) == found, "two folders of one name are two data sets"
    assert len(list(run.glob("results-on-away-*.json"))) == 1


def test_pictures_changed_under_their_names_are_other_data(run, tiny_images_dir, tmp_path):
    evaluate(run)
    before = files_of(run)
    blurred = tmp_path / "blurred"
    shutil.copytree(tiny_images_dir, blurred)
    for path in blurred.rglob("*.png"):
        Image.new("RGB", (48, 40), (9, 9, 9)).save(path)
    evaluate(run, overrides=[f"data.root={blurred}"])
    assert files_of(run) == before
    assert (run / "results-on-blurred.json").is_file()


def test_the_same_data_in_another_place_is_the_runs_own(run, tiny_images_dir, tmp_path):
    own = evaluate(run)
    tiny_images_dir.rename(tmp_path / "moved")
    assert evaluate(run, overrides=[f"data.root={tmp_path / 'moved'}"]) == own
    assert not list(run.glob("results-on-*"))


def test_other_classes_are_no_mistake_for_captions_but_other_data(run, tiny_images_dir, tmp_path):
    own = evaluate(run)
    away = tmp_path / "away"
    shutil.copytree(tiny_images_dir, away)
    for domain in ("day", "night"):
        (away / domain / "circle").rename(away / domain / "disc")
    evaluate(run, overrides=[f"data.root={away}"])
    assert json.loads((run / "results.json").read_text()) == own
    assert "class 0 was 'circle' and is 'disc'" in json.loads((run / "results-on-away.json").read_text())["data"]["difference"]


def test_runs_without_a_record_open_with_a_note_and_keep_their_results(run, tiny_images_dir, tmp_path, capsys):
    own = evaluate(run)
    (run / "data.json").unlink()
    capsys.readouterr()
    assert evaluate(run) == own
    assert "has no data.json" in capsys.readouterr().out
    evaluate(run, overrides=[f"data.root={more_images(tiny_images_dir, tmp_path / 'away')}"])
    assert json.loads((run / "results.json").read_text()) == own
    assert (run / "results-on-away.json").is_file()
