"""Averages of runs as a command: a run folder that other commands take, equal to one done by hand; mistakes in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file

from flyp_saflex import cli
from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.evaluation.average_runs import evaluate_average
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.tables import AVERAGES
from flyp_saflex.training.train import train


def weights(run):
    return load_file(run / "model" / "open_clip_model.safetensors")


@pytest.fixture
def runs(make_config, tmp_path):
    paths = [tmp_path / f"run{seed}" for seed in range(2)]
    for seed, path in enumerate(paths):
        train(make_config(f"seed={seed}", "train.steps=3"), path)
    return paths


def test_a_soup_is_a_run_folder_with_the_mean_weights_and_its_own_results(runs, tmp_path):
    out = tmp_path / "soup"
    assert cli.main(["evaluate", *map(str, runs), "--average", "soup", "--out", str(out)]) == 0
    one, other = map(weights, runs)
    for name, value in weights(out).items():
        torch.testing.assert_close(value, (one[name] + other[name]) / 2)
    results = json.loads((out / "results.json").read_text())
    assert results["recipe"].endswith("-soup")
    assert {row["split"] for row in results["results"]} == {"id_val", "id_test", "night"}
    assert json.loads((out / "env.json").read_text())["averaged"]["runs"] == [str(run) for run in runs]
    assert (out / "DONE").is_file()
    assert evaluate(out, splits=("night",))["results"][-1]["split"] == "night"


def test_wise_chooses_on_the_select_split_what_evaluate_chooses_for_one_run(runs, tmp_path):
    evaluate_average(runs[:1], "wise", tmp_path / "wise", wise_alphas=(0.0, 0.5, 1.0))
    chosen = evaluate(runs[0], wise_alphas=(0.0, 0.5, 1.0))
    told = json.loads((tmp_path / "wise" / "env.json").read_text())["averaged"]
    assert (told["split"], told["alpha"]) == ("id_val", chosen["chosen_alpha"])


@pytest.mark.parametrize("name", sorted(AVERAGES))
def test_every_average_of_a_linear_head_is_written_and_evaluated(name, make_config, tmp_path):
    paths = [tmp_path / f"run{seed}" for seed in range(2)]
    for seed, path in enumerate(paths):
        train(make_config(f"seed={seed}", "train.steps=2", "train.method=ce-linear"), path)
    results = evaluate_average(paths, name, tmp_path / "out", wise_alphas=(0.5, 1.0), splits=("night",))
    assert {row["wise_alpha"] for row in results["results"]} >= {1.0}


def test_runs_that_cannot_be_averaged_are_refused_in_one_line(runs, make_config, tmp_path, tiny_images_dir):
    out = tmp_path / "out"
    with pytest.raises(RunError, match="found 1 runs, expected 2 or more"):
        evaluate_average(runs[:1], "soup", out)
    with pytest.raises(RunError, match="each once"):
        evaluate_average([runs[0], runs[0]], "soup", out)
    linear = tmp_path / "linear"
    train(make_config("train.steps=1", "train.method=ce-linear"), linear)
    with pytest.raises(RunError, match=r"differ in the task of train.method: .* has clip, .* has clip-linear"):
        evaluate_average([runs[0], linear], "soup", out)
    with pytest.raises(RunError, match="not empty"):
        evaluate_average(runs, "soup", runs[0])
    with pytest.raises(ConfigError, match="did you mean 'greedy'"):
        evaluate_average(runs, "gredy", out)
    with pytest.raises(ConfigError, match=r"chooses on a select split: set evaluate\.select_split"):
        evaluate_average(runs, "greedy", out, overrides=["train.select_split="])
    other = tmp_path / "other"
    (tiny_images_dir / "day" / "circle" / "0.png").unlink()
    train(make_config("train.steps=1"), other)
    with pytest.raises(RunError, match="trained on different data"):
        evaluate_average([runs[0], other], "soup", out)
    assert not out.exists()


def test_several_runs_need_an_average(runs, capsys):
    assert cli.main(["evaluate", *map(str, runs)]) == 2
    assert "go with --average" in capsys.readouterr().err
    assert cli.main(["evaluate", str(runs[0]), "--average", "soup"]) == 2
    assert "--average needs --out" in capsys.readouterr().err
