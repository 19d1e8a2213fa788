"""Training with `train.objective`: sigmoid where the model has a bias, softmax where it has none or where it is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flyp_saflex.clip.model import load_clip
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.saflex.objectives import CONTRASTIVE, CROSS_ENTROPY, SIGMOID
from flyp_saflex.training.setup import prepare
from flyp_saflex.training.train import train

SAFLEX = ("augment.upstream=flip", "saflex.enabled=true", "saflex.preset=robust")
SCALE = math.log(120)
"""Above CLIP's bound of 100, as SigLIP's pretrained scales are."""


@pytest.fixture
def siglip(tiny_clip_dir: Path) -> Path:
    """The tiny model with SigLIP's bias."""
    config = json.loads((tiny_clip_dir / "open_clip_config.json").read_text())
    config["model_cfg"]["init_logit_bias"] = -10
    (tiny_clip_dir / "open_clip_config.json").write_text(json.dumps(config))
    weights = tiny_clip_dir / "open_clip_model.safetensors"
    state = load_file(weights) | {"logit_bias": torch.tensor(-10.0), "logit_scale": torch.tensor(SCALE)}
    save_file(state, weights)
    return tiny_clip_dir


def rows_of(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def test_a_model_with_a_bias_is_trained_with_the_sigmoid_loss(
    siglip: Path, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config, run = make_config(*SAFLEX), tmp_path / "run"
    setup = prepare(config)
    assert setup.objective is SIGMOID
    assert any(note.startswith("train.objective is sigmoid, ") for note in setup.notes)
    train(config, run)
    rows = rows_of(run)
    assert all(row["logit_bias"] != -10 for row in rows[1:])
    assert rows[-1]["logit_scale"] > 110, "no bound on the scale"
    saved = load_clip(f"local-dir:{run / 'model'}").model
    assert float(saved.logit_bias.detach()) == pytest.approx(rows[-1]["logit_bias"])
    assert {row["split"] for row in evaluate(run, wise_alphas=(0.0, 1.0))["results"]} >= {"id_val", "night"}


def test_softmax_is_to_be_had_for_a_model_with_a_bias(siglip: Path, make_config: Callable[..., Config], tmp_path: Path) -> None:
    """The bias stays as it is, and the scale is not pressed to CLIP's bound at the first step."""
    config, run = make_config("train.objective=contrastive"), tmp_path / "run"
    assert prepare(config).objective is CONTRASTIVE
    train(config, run)
    rows = rows_of(run)
    assert "logit_bias" not in rows[-1]
    assert float(load_clip(f"local-dir:{run / 'model'}").model.logit_bias.detach()) == -10
    assert 110 < rows[-1]["logit_scale"] < 120.001


@pytest.mark.parametrize("method", ["ce-text", "ce-linear"])
def test_other_methods_keep_their_cross_entropy(siglip: Path, make_config: Callable[..., Config], method: str) -> None:
    setup = prepare(make_config(f"train.method={method}"))
    assert setup.objective is CROSS_ENTROPY
    assert not any("train.objective" in note for note in setup.notes)


def test_a_model_without_a_bias_keeps_the_softmax_and_is_told_nothing(make_config: Callable[..., Config]) -> None:
    setup = prepare(make_config())
    assert setup.objective is CONTRASTIVE
    assert not any("train.objective" in note for note in setup.notes)


@pytest.mark.parametrize(
    ("with_bias", "overrides", "line"),
    [
        (False, ["train.objective=sigmoid"], "train.objective = sigmoid: expected a model with logit_bias"),
        (
            True,
            ["train.objective=cross-entropy"],
            "is over classes, but train.method = flyp is over captions: set ",
        ),
        (
            True,
            ["train.objective=sigmoid", "train.method=ce-linear"],
            "but train.method = ce-linear is over classes",
        ),
        (True, [*SAFLEX, "saflex.gains_of=prob"], 'saflex.gains_of = "prob" reads the logits as a softmax'),
        (True, ["train.objective=sigmiod"], "train.objective = 'sigmiod': expected one of .*did you mean 'sigmoid'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    request: pytest.FixtureRequest, make_config: Callable[..., Config], with_bias: bool, overrides: list[str], line: str
) -> None:
    if with_bias:
        request.getfixturevalue("siglip")
    with pytest.raises(ConfigError, match=line) as error:
        prepare(make_config(*overrides))
    assert "\n" not in str(error.value)


def test_the_probability_reading_is_refused_for_the_sigmoid_loss_alone(siglip: Path, make_config: Callable[..., Config]) -> None:
    assert prepare(make_config("saflex.gains_of=prob")).saflex is None, "without SAFLEX nobody reads it"
    assert prepare(make_config(*SAFLEX, "saflex.gains_of=prob", "train.objective=contrastive")).saflex is not None


@pytest.mark.parametrize("options", [["train.rows_at_once=4"], ["saflex.select=always"]], ids=["parts", "select"])
def test_steps_of_two_passes_train_the_same_bias(
    siglip: Path, make_config: Callable[..., Config], tmp_path: Path, options: list[str]
) -> None:
    biases = []
    for number, more in enumerate(([], options)):
        train(make_config(*SAFLEX, "train.steps=3", *more), tmp_path / str(number))
        biases.append([row["logit_bias"] for row in rows_of(tmp_path / str(number))])
    assert biases[1] == pytest.approx(biases[0], abs=1e-5)
    assert biases[0][0] != biases[0][-1]
