"""`predict --issues`: planted label errors are found, labels are read, a missing cleanlab is told."""

import csv
import sys

import numpy as np
import pytest

from flyp_saflex import extras
from flyp_saflex.config import DataConfig
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.predicting.inputs import collect
from flyp_saflex.predicting.label_issues import issue_columns, label_issues, lonely_classes
from flyp_saflex.predicting.predict_images import PredictOptions, predict_images
from flyp_saflex.training.train import train

NO_CLEANLAB = "cleanlab is not installed; it is in the extra `issues`: pip install 'flyp-saflex[issues]'"


def likely(labels, classes=4, sure=0.85):
    rows = np.full((len(labels), classes), (1 - sure) / (classes - 1))
    rows[np.arange(len(labels)), labels] = sure
    return rows


def test_planted_label_errors_are_found_the_worst_first():
    pytest.importorskip("cleanlab", reason=NO_CLEANLAB)
    true = np.random.default_rng(0).integers(0, 3, 90)  # the fourth class has no image
    given = true.copy()
    given[[5, 40, 77]] = (given[[5, 40, 77]] + 1) % 3
    rows = likely(true)
    rows[40, given[40]], rows[40, true[40]] = 0.0, rows[40, true[40]] + rows[40, given[40]]
    found = label_issues(given, rows)
    assert sorted(found.tolist()) == [5, 40, 77]
    assert found[0] == 40
    columns = issue_columns(found, [f"{i}.png" for i in range(90)], given.tolist(), rows, "abcd")
    assert columns["image"][0] == "40.png"
    assert columns["label"][0] == "abcd"[given[40]]
    assert columns["suggested"][0] == "abcd"[true[40]]
    assert columns["probability"][0] == 0.0
    assert label_issues(true, likely(true)).tolist() == []


def test_one_class_has_nothing_to_confuse():
    pytest.importorskip("cleanlab", reason=NO_CLEANLAB)
    with pytest.raises(DataError, match="two classes at least"):
        label_issues([1, 1], likely(np.array([1, 1])))


def test_a_missing_cleanlab_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(ConfigError, match=r"--issues needs cleanlab, .* pip install 'flyp-saflex\[issues\]'"):
        predict_images(tmp_path / "no-run", [tmp_path], PredictOptions(out=tmp_path / "o.csv", issues=tmp_path / "i.csv"))


def test_labels_are_class_names_folder_names_or_indices(tmp_path):
    (tmp_path / "t.csv").write_text("path,label\na.png,Polar bear\nb.png,polar-bear\nc.png,1\n", encoding="utf-8")
    inputs = collect([tmp_path / "t.csv"], DataConfig(), labelled=True)
    assert inputs.label_indices(("polar bear", "fox")) == [0, 0, 1]
    for name in ("001.Sooty_Albatross", "002.Fox"):
        (tmp_path / "birds" / name).mkdir(parents=True)
        (tmp_path / "birds" / name / "1.png").write_bytes(b"")
    inputs = collect([tmp_path / "birds"], DataConfig(), labelled=True)
    assert inputs.label_indices(("Fox", "Sooty Albatross")) == [1, 0]
    with pytest.raises(DataError, match=r"has the label '001.Sooty_Albatross', which is no class of the run"):
        inputs.label_indices(("cat", "dog"))
    (tmp_path / "t.csv").write_text("path,label\na.png,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 2, column 'label' is empty"):
        collect([tmp_path / "t.csv"], DataConfig(), labelled=True)


def test_the_command_lists_issues_and_tells_images_that_were_trained_on(make_config, tiny_images_dir, tmp_path, capsys):
    pytest.importorskip("cleanlab", reason=NO_CLEANLAB)
    run = tmp_path / "run"
    train(make_config("train.steps=30"), run)
    capsys.readouterr()
    options = PredictOptions(out=tmp_path / "o.csv", issues=tmp_path / "i.csv")
    summary = predict_images(run, [tiny_images_dir / "day"], options)
    told = capsys.readouterr().out
    assert "the run was trained on 12 of 24 images: their label errors are likely overlooked" in told
    assert f"{summary['issues']} likely label errors" in told
    with open(tmp_path / "i.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["issues"]
    assert all(row["label"] == row["image"].split("/")[-2] != row["suggested"] for row in rows)
    predict_images(run, [tiny_images_dir / "night"], options)
    assert "their probabilities are held out" in capsys.readouterr().out


def test_classes_with_one_image_are_named():
    assert lonely_classes([0, 0, 2, 3, 3, 3], "abcd") == ["c"]
