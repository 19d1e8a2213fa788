"""Temperature scaling: the optimum of the likelihood, bounds, and predictions that stay."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.evaluation.calibration import (
    COLDEST,
    HOTTEST,
    Calibration,
    calibration_error,
    fit_temperature,
    probabilities,
    reliability,
    usable,
)
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.evaluation.load_run import load_run, open_run
from flyp_saflex.evaluation.metrics import expected_calibration_error
from flyp_saflex.evaluation.predict import predict_split
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.training.train import train


def drawn(sharpness, n=4000, classes=6, seed=0):
    """Logits whose true temperature is `sharpness`, with labels drawn from their probabilities."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, (n, classes))
    labels = np.array([generator.choice(classes, p=row) for row in probabilities(logits)])
    return sharpness * logits, labels


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(sharpness):
    logits, labels = drawn(sharpness)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(sharpness, rel=0.08)  # 4000 draws: a standard error of about 2 %

    def loss(log_temperature):
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(len(labels)), labels].mean()

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8})
    assert found == pytest.approx(np.exp(best.x), rel=1e-4)  # the minimiser stops at the root of the digits of its loss


def test_an_overconfident_model_is_calibrated_and_predicts_the_same():
    logits, labels = drawn(5.0)
    calibration = Calibration.of(logits, labels, "id_val")
    assert calibration.ece_before > 0.1
    assert calibration.ece_after < 0.03
    assert (calibration.split, calibration.n, calibration.at_bound) == ("id_val", 4000, False)
    scaled = probabilities(logits, calibration.temperature)
    assert scaled.sum(axis=1) == pytest.approx(1)
    assert (scaled.argmax(axis=1) == logits.argmax(axis=1)).all()


def test_a_likelihood_without_optimum_ends_at_a_bound():
    logits = np.eye(3) * 2
    assert fit_temperature(logits, [0, 1, 2]) == COLDEST
    assert fit_temperature(logits, [1, 2, 0]) == HOTTEST
    assert Calibration.of(logits, [0, 1, 2], "val").at_bound
    assert (usable(COLDEST), usable(HOTTEST), usable(0.7)) == (1.0, 1.0, 0.7)
    assert fit_temperature(np.ones((4, 3)), [0, 1, 2, 0]) == 1.0


def test_huge_logits_do_not_overflow():
    likely = probabilities([[1e4, -1e4, 0.0]])
    assert likely.tolist() == [[1.0, 0.0, 0.0]]


def test_no_image_is_told():
    with pytest.raises(DataError, match="0 images"):
        fit_temperature(np.empty((0, 3)), [])


def test_evaluate_fits_on_the_select_split_and_tells_the_error_before_and_after(make_config, tmp_path, capsys):
    """By hand from the model's own logits; a split evaluated later takes the temperature that was fitted before."""
    run = tmp_path / "run"
    train(make_config("train.steps=3"), run)
    evaluate(run, overrides=["evaluate.calibrate=true"], splits=("id_val",))
    results = evaluate(run, overrides=["evaluate.calibrate=true"], splits=("night",))
    rows = {row["split"]: row for row in results["results"]}
    assert rows["night"]["temperature"] == rows["id_val"]["temperature"]
    config = open_run(run)
    dataset = load_dataset(config.data, seed=config.seed)
    task = load_run(run, config, dataset)
    loader = ImageLoader(task.source(config.data, ()), batch_size=4)
    for name in ("id_val", "night"):
        split = dataset.splits[name]
        _, (logits_NK,) = predict_split([task.predictor], split, loader)
        labels_N = [sample.label for sample in split.samples]
        if name == "id_val":
            assert rows[name]["temperature"] == pytest.approx(usable(fit_temperature(logits_NK, labels_N)), rel=1e-4)
        after = calibration_error(logits_NK, labels_N, rows[name]["temperature"])
        assert rows[name]["ece_calibrated"] == pytest.approx(after, abs=1e-4)
    assert "calibration error on night (alpha 1): " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"fits the temperature on a select split"):
        evaluate(run, overrides=["evaluate.calibrate=true", "train.select_split="])


@pytest.mark.parametrize("bins", [4, 15])
def test_reliability_bins_hold_every_image_and_give_the_calibration_error(bins):
    generator = np.random.default_rng(3)
    confidences, correct = generator.random(500) ** 0.5, generator.random(500) < 0.6
    found = reliability(confidences, correct, bins=bins)
    assert sum(bin.n for bin in found) == 500
    assert [bin.confidence for bin in found] == sorted(bin.confidence for bin in found)
    error = sum(bin.n * abs(bin.accuracy - bin.confidence) for bin in found) / 500
    assert error == pytest.approx(expected_calibration_error(confidences, correct, bins=bins))
