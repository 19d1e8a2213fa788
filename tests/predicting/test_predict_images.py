"""`predict`: the same classes as `evaluate`, calibrated, resumable, with unreadable files told."""

import csv
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flyp_saflex import cli
from flyp_saflex.clip.model import load_clip
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError, DataError, RunError
from flyp_saflex.evaluation import calibration as calibration_module
from flyp_saflex.evaluation.calibration import COLDEST, Calibration, probabilities
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.predicting import predict_images as module
from flyp_saflex.predicting.predict_images import PredictOptions, predict_images
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.train import train

CLASSES = ["circle", "square", "stripes"]


@pytest.fixture
def run(make_config, tmp_path):
    folder = tmp_path / "run"
    train(make_config("evaluate.bootstrap=0"), folder)
    return folder


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logits_by_hand(run, samples):
    """Logits with open_clip alone, one image at a time."""
    from flyp_saflex.clip.zero_shot import zero_shot_head

    clip = load_clip(f"local-dir:{run / 'model'}")
    with RunDir(run, lock=False) as folder:
        config = folder.read_config()
    dataset = load_dataset(config.data, seed=config.seed)
    with torch.no_grad():
        head = zero_shot_head(clip, dataset.class_names, dataset.templates)
        images = [clip.preprocess(Image.open(path).convert("RGB"))[None] for path in samples]
        features = torch.cat([clip.model.encode_image(image, normalize=True) for image in images])
        return features.numpy(), (clip.model.logit_scale.exp() * features @ head.T).numpy(), dataset


def test_a_folder_is_predicted_with_the_probabilities_that_the_select_split_calibrates(
    run, tiny_images_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(calibration_module, "usable", lambda temperature: temperature)  # six images fit none
    out = tmp_path / "out.csv"
    summary = predict_images(run, [tiny_images_dir / "night"], PredictOptions(out=out, top_k=2))
    rows = rows_of(out)
    files = sorted((tiny_images_dir / "night").rglob("*.png"))
    assert [row["image"] for row in rows] == [str(path) for path in files]
    assert list(rows[0]) == ["image", "class", "probability", "class_2", "probability_2", "calibrated", "error"]

    _, logits, dataset = logits_by_hand(run, files)
    select = dataset.splits["id_val"].samples
    _, select_logits, _ = logits_by_hand(run, [sample.path for sample in select])
    calibration = Calibration.of(select_logits, [sample.label for sample in select], "id_val")
    assert summary["temperature"] == pytest.approx(calibration.temperature, rel=1e-3)
    likely = probabilities(logits, calibration.temperature)
    order = np.argsort(-likely, axis=1)
    assert [row["class"] for row in rows] == [CLASSES[k] for k in order[:, 0]]
    assert [row["class_2"] for row in rows] == [CLASSES[k] for k in order[:, 1]]
    assert [float(row["probability"]) for row in rows] == pytest.approx(likely.max(axis=1).tolist(), abs=1e-3)
    assert {(row["calibrated"], row["error"]) for row in rows} == {("True", "")}
    told = capsys.readouterr().out
    assert "24 images predicted" in told
    assert f"fitted on {len(select)} images of id_val" in told
    assert not (tmp_path / "out.csv.parts").exists()


def test_a_split_that_is_answered_rightly_calibrates_nothing(run, tiny_images_dir, tmp_path, capsys, monkeypatch):
    """The likelihood rises for ever as the temperature falls; at its bound every probability would be 1."""
    found = Calibration(temperature=COLDEST, split="id_val", n=18, ece_before=0.1, ece_after=0.0)
    monkeypatch.setattr(module, "_calibration", lambda *arguments: found)
    summary = predict_images(run, [tiny_images_dir / "night"], PredictOptions(out=tmp_path / "out.csv"))
    assert summary["temperature"] is None
    assert "not calibrated: no temperature fits id_val: its 18 images are too few" in capsys.readouterr().out
    assert {row["calibrated"] for row in rows_of(tmp_path / "out.csv")} == {"False"}


def test_predictions_agree_with_those_of_evaluate(run, tiny_images_dir, tmp_path):
    evaluate(run, splits=["night"])
    expected = pq.read_table(run / "predictions" / "night.parquet").to_pylist()
    predict_images(run, [tiny_images_dir / "night"], PredictOptions(out=tmp_path / "out.parquet", calibrate_on="none"))
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    found = {row["image"].split("night/")[1]: (row["class"], row["probability"]) for row in rows}
    for row in expected:
        name, probability = found[row["sample_id"].split("night/")[1]]
        assert (name, probability) == (row["prediction_name"], pytest.approx(row["confidence"], abs=1e-5))
    assert {row["calibrated"] for row in rows} == {False}


def test_a_run_without_its_data_predicts_and_says_that_nothing_is_calibrated(run, tiny_images_dir, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.move(tiny_images_dir / "night", moved)
    shutil.rmtree(tiny_images_dir)
    summary = predict_images(run, [moved], PredictOptions(out=tmp_path / "out.csv"))
    assert summary["temperature"] is None
    assert "not calibrated: the run's data is not there" in capsys.readouterr().out
    assert {row["calibrated"] for row in rows_of(tmp_path / "out.csv")} == {"False"}
    with pytest.raises(ConfigError, match="--calibrate-on id_val: the run's data is not there"):
        predict_images(run, [moved], PredictOptions(out=tmp_path / "out.csv", calibrate_on="id_val"))
    (run / "data.json").unlink()
    with pytest.raises(RunError, match=r"has no data.json .* only known from its data"):
        predict_images(run, [moved], PredictOptions(out=tmp_path / "out.csv"))


def test_other_data_at_the_run_s_place_does_not_calibrate(run, tiny_images_dir, tmp_path, capsys):
    for path in list((tiny_images_dir / "day" / "circle").glob("*.png"))[:3]:
        path.unlink()
    predict_images(run, [tiny_images_dir / "night"], PredictOptions(out=tmp_path / "out.csv"))
    assert "not calibrated: the data there is not the run's" in capsys.readouterr().out


def test_an_unreadable_image_is_a_row_with_its_reason(run, tiny_images_dir, tmp_path, capsys, monkeypatch):
    folder = tiny_images_dir / "night" / "circle"
    (folder / "3.png").write_bytes(b"no image")
    (folder / "7.png").write_bytes(b"")
    names = [f"{number}.png" for number in range(8)] + ["gone.png"]
    (folder / "list.csv").write_text("path\n" + "\n".join(names) + "\n", encoding="utf-8")
    monkeypatch.setattr(module, "PART", 3)
    options = PredictOptions(out=tmp_path / "out.csv", embeddings=tmp_path / "features.npz")
    summary = predict_images(run, [folder / "list.csv"], options, overrides=["evaluate.batch_size=2"])
    rows = rows_of(options.out)
    assert [row["image"] for row in rows] == names
    assert summary["unreadable"] == ["3.png", "7.png", "gone.png"]
    for row in rows:
        assert (row["class"] == "") == (row["image"] in summary["unreadable"]) == bool(row["error"])
        assert row["error"] == "" or row["image"] in row["error"]
    assert "3 images cannot be read, see the column error" in capsys.readouterr().out
    with np.load(options.embeddings) as features:
        assert features["images"].tolist() == [name for name in names if name not in summary["unreadable"]]
        expected, _, _ = logits_by_hand(run, [folder / name for name in features["images"]])
        assert features["embeddings"] == pytest.approx(expected, abs=1e-5)


def test_only_unreadable_images_still_give_a_table(run, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    predict_images(run, [tmp_path / "bad.png"], PredictOptions(out=tmp_path / "o.parquet", embeddings=tmp_path / "e.parquet"))
    (row,) = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert row["class"] is None
    assert "bad.png" in row["error"]
    assert pq.read_table(tmp_path / "e.parquet").num_rows == 0


class Killed(Exception):
    """Stands for the end of the process."""


def test_an_interrupted_prediction_resumes_and_equals_one_in_a_piece(run, tiny_images_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "PART", 8)
    (tiny_images_dir / "night" / "square" / "2.png").write_bytes(b"")
    small = ["evaluate.batch_size=3"]
    whole = PredictOptions(out=tmp_path / "whole.csv", embeddings=tmp_path / "whole.npz")
    predict_images(run, [tiny_images_dir / "night"], whole, overrides=small)

    embedder, seen = module.ClipTask.embedder, []

    def counting(self, **options):
        embed = embedder(self, **options)

        def run_batch(images):
            seen.append(len(images))
            if len(seen) == 5 and not resumed:
                raise Killed
            return embed(images)

        return run_batch

    resumed = False
    monkeypatch.setattr(module.ClipTask, "embedder", counting)
    options = PredictOptions(out=tmp_path / "out.csv", embeddings=tmp_path / "out.npz", calibrate_on="none")
    with pytest.raises(Killed):
        predict_images(run, [tiny_images_dir / "night"], options, overrides=small)
    assert not options.out.exists()
    before = {path.name for path in (tmp_path / "out.csv.parts").iterdir()}
    assert len(before) == 2, "the plan and one part"

    with pytest.raises(RunError, match=r"out\.csv\.parts holds the beginning of another prediction \(other images\)"):
        predict_images(run, [tiny_images_dir / "day"], options, overrides=small)

    resumed = True
    seen.clear()
    capsys.readouterr()
    predict_images(run, [tiny_images_dir / "night"], options, overrides=small)
    assert "resuming: 9 of 24 images are done" in capsys.readouterr().out
    assert sum(seen) == 24 - 9 - 1, "nothing is embedded twice; one image cannot be read"
    with np.load(whole.embeddings) as one, np.load(options.embeddings) as other:
        assert one["images"].tolist() == other["images"].tolist()
        assert one["embeddings"] == pytest.approx(other["embeddings"], abs=1e-6)  # batches of other rows
    assert [row["class"] for row in rows_of(whole.out)] == [row["class"] for row in rows_of(options.out)]


def test_a_linear_head_predicts(make_config, tiny_images_dir, tmp_path):
    run = tmp_path / "linear"
    train(make_config("train.method=linear-probe"), run)
    evaluate(run, splits=["night"])
    expected = {row["sample_id"]: row["prediction_name"] for row in pq.read_table(run / "predictions/night.parquet").to_pylist()}
    shutil.move(tiny_images_dir / "night", tmp_path / "night")
    shutil.rmtree(tiny_images_dir)
    predict_images(run, [tmp_path / "night"], PredictOptions(out=tmp_path / "out.csv"))
    for row in rows_of(tmp_path / "out.csv"):
        assert row["class"] == expected[row["image"][len(str(tmp_path)) + 1 :]]


def test_wise_weights_predict_as_evaluate_s_do(run, tiny_images_dir, tmp_path, capsys):
    evaluate(run, wise_alphas=(0.0, 0.5))
    with pytest.raises(ConfigError, match=r"--wise-alpha 1\.5: expected a number from 0 to 1"):
        predict_images(run, [tiny_images_dir], PredictOptions(out=tmp_path / "o.csv", wise_alpha=1.5))
    capsys.readouterr()
    chosen = evaluate(run, wise_alphas=(0.0, 0.5))["chosen_alpha"]
    expected = pq.read_table(run / "predictions" / "night.parquet").to_pylist()
    options = PredictOptions(out=tmp_path / "o.csv", wise_alpha=chosen, calibrate_on="none")
    predict_images(run, [tiny_images_dir / "night"], options)
    found = {row["image"].split("night/")[1]: float(row["probability"]) for row in rows_of(options.out)}
    for row in expected:
        if row["alpha"] == chosen:
            assert found[row["sample_id"].split("night/")[1]] == pytest.approx(row["confidence"], abs=1e-5)
    other = 0.25 if chosen != 0.25 else 0.75
    predict_images(run, [tiny_images_dir / "night"], PredictOptions(out=tmp_path / "o.csv", wise_alpha=other), dry_run=True)
    assert f"evaluate chose WiSE-FT's alpha {chosen:g}" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(run, tiny_images_dir, tmp_path, capsys):
    out = tmp_path / "out.csv"
    assert cli.main(["predict", str(run), str(tiny_images_dir / "night"), "--out", str(out), "--limit", "5", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "would predict 5 images" in told
    assert "calibrated on id_val" in told
    assert not out.exists()
    assert not (tmp_path / "out.csv.parts").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}x", "{images}"], ["there is no such folder"]),
        (["{images}", "{images}"], ["is not a run folder"]),
        (["{run}", "{images}/none"], ["there is no such folder, table or image"]),
        (["{run}", "{images}/none.csv"], ["there is no such table"]),
        (["{run}", "{empty}"], ["found no image"]),
        (["{run}", "{images}", "--out", "p.xlsx"], ["--out p.xlsx", "expected .csv or .parquet"]),
        (["{run}", "{images}", "--out", "no/such/p.csv"], ["there is no folder no/such"]),
        (["{run}", "{images}", "--embeddings", "e.csv"], ["--embeddings e.csv", "expected .npz or .parquet"]),
        (["{run}", "{images}", "--embeddings", "p.parquet", "--out", "p.parquet"], ["name one file twice"]),
        (["{run}", "{images}", "--top-k", "0"], ["--top-k 0", "at least 1"]),
        (["{run}", "{images}", "--limit", "0"], ["--limit 0", "at least 1"]),
        (["{run}", "{images}", "--calibrate-on", "valid_x"], ["--calibrate-on valid_x", "no split"]),
        (["{run}", "{images}", "--calibrate-on", "night"], ["--calibrate-on night", "cannot be used as a 'select' split"]),
        (["{run}", "{images}", ""], ["IMAGES ''"]),
    ],
)
def test_a_mistake_is_one_line(arguments, words, run, tiny_images_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    filled = [part.format(run=run, images=tiny_images_dir, empty=tmp_path / "empty") for part in arguments]
    capsys.readouterr()
    assert cli.main(["predict", *filled]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert not (tmp_path / "predictions.csv").exists()


def test_a_table_without_the_column_of_paths_is_told(run, tmp_path):
    (tmp_path / "t.csv").write_text("file\na.png\n", encoding="utf-8")
    with pytest.raises(DataError, match="there is no column 'path'"):
        predict_images(run, [tmp_path / "t.csv"], PredictOptions(out=tmp_path / "o.csv"))
