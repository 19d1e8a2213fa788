"""Temperature scaling: the optimum of the likelihood, bounds, and predictions that stay."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from flyp_saflex.errors import DataError
from flyp_saflex.evaluation.calibration import COLDEST, HOTTEST, Calibration, fit_temperature, probabilities, reliability
from flyp_saflex.evaluation.metrics import expected_calibration_error


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
    assert fit_temperature(np.ones((4, 3)), [0, 1, 2, 0]) == 1.0


def test_huge_logits_do_not_overflow():
    likely = probabilities([[1e4, -1e4, 0.0]])
    assert likely.tolist() == [[1.0, 0.0, 0.0]]


def test_no_image_is_told():
    with pytest.raises(DataError, match="0 images"):
        fit_temperature(np.empty((0, 3)), [])


@pytest.mark.parametrize("bins", [4, 15])
def test_reliability_bins_hold_every_image_and_give_the_calibration_error(bins):
    generator = np.random.default_rng(3)
    confidences, correct = generator.random(500) ** 0.5, generator.random(500) < 0.6
    found = reliability(confidences, correct, bins=bins)
    assert sum(bin.n for bin in found) == 500
    assert [bin.confidence for bin in found] == sorted(bin.confidence for bin in found)
    error = sum(bin.n * abs(bin.accuracy - bin.confidence) for bin in found) / 500
    assert error == pytest.approx(expected_calibration_error(confidences, correct, bins=bins))
