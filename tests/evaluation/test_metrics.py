"""Metrics against numbers by hand, scikit-learn and WILDS."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from flyp_saflex.errors import DataError, RunError
from flyp_saflex.evaluation import metrics
from flyp_saflex.evaluation.metrics import Scores
from flyp_saflex.tables import METRICS

LABELS = np.array([0, 0, 0, 1, 1, 3])
PREDICTIONS = np.array([0, 0, 1, 1, 2, 3])


def random_labels(seed, n=400, num_classes=12):
    generator = np.random.default_rng(seed)
    labels = generator.choice(num_classes, size=n, p=generator.dirichlet(np.full(num_classes, 0.4)))
    predictions = np.where(generator.random(n) < 0.6, labels, generator.integers(0, num_classes, n))
    return labels, predictions


def test_accuracy_and_macro_f1_by_hand():
    assert metrics.accuracy(LABELS, PREDICTIONS) == pytest.approx(4 / 6)
    # class 0: 2*2/(3+2), class 1: 2*1/(2+2), class 3: 1; class 2 has no images and does not count
    assert metrics.macro_f1(LABELS, PREDICTIONS) == pytest.approx((0.8 + 0.5 + 1.0) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_scikit_learns_over_the_classes_present(seed):
    labels, predictions = random_labels(seed)
    expected = f1_score(labels, predictions, average="macro", labels=np.unique(labels))
    assert metrics.macro_f1(labels, predictions) == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_macro_f1_and_accuracy_are_the_wilds_evaluators():
    from wilds.common.metrics.all_metrics import F1, Accuracy

    labels, predictions = random_labels(7, num_classes=182)
    tensors = torch.from_numpy(predictions), torch.from_numpy(labels)
    f1 = F1(average="macro").compute(*tensors)["F1-macro_all"]
    assert abs(metrics.macro_f1(labels, predictions) - f1) < 1e-6
    assert metrics.macro_f1(labels, predictions) != pytest.approx(
        f1_score(labels, predictions, average="macro", labels=range(182), zero_division=0), abs=1e-3
    ), "the case must tell WILDS' rule from the mean over all classes"
    assert abs(metrics.accuracy(labels, predictions) - Accuracy().compute(*tensors)["acc_avg"]) < 1e-6


def test_per_class_by_hand_and_with_classes_that_have_no_images():
    rows = metrics.per_class(LABELS, PREDICTIONS, ["cat", "dog", "elk", "fox", "gnu"])
    assert rows[0] == {"class": 0, "name": "cat", "n": 3, "predicted": 2, "precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    assert rows[1] == {"class": 1, "name": "dog", "n": 2, "predicted": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert rows[2] == {"class": 2, "name": "elk", "n": 0, "predicted": 1, "precision": 0.0, "recall": None, "f1": None}
    assert rows[4] == {"class": 4, "name": "gnu", "n": 0, "predicted": 0, "precision": None, "recall": None, "f1": None}
    assert [row["name"] for row in metrics.per_class(LABELS, PREDICTIONS)] == ["0", "1", "2", "3"]


def test_worst_group_is_the_lowest_and_small_groups_can_be_passed_over():
    groups = ["a", "a", "a", "b", "b", "c"]
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0]
    assert metrics.per_group(labels, predictions, groups) == [
        {"group": "a", "n": 3, "accuracy": 2 / 3},
        {"group": "b", "n": 2, "accuracy": 1.0},
        {"group": "c", "n": 1, "accuracy": 0.0},
    ]
    assert metrics.worst_group_accuracy(labels, predictions, groups) == 0.0
    assert metrics.worst_group_accuracy(labels, predictions, groups, minimum_size=2) == pytest.approx(2 / 3)
    assert metrics.worst_group_accuracy(labels, predictions, groups, minimum_size=4) is None
    assert metrics.worst_group_accuracy(LABELS, PREDICTIONS, [""] * 6) == metrics.accuracy(LABELS, PREDICTIONS)


def test_calibration_error_by_hand():
    # bins of a tenth: (0.9, 1] holds two images, half of them right, at 0.95; (0.5, 0.6] one right image at 0.55
    error = metrics.expected_calibration_error([0.95, 0.95, 0.55], [True, False, True], bins=10)
    assert error == pytest.approx((2 * abs(0.5 - 0.95) + 1 * abs(1 - 0.55)) / 3)
    assert metrics.expected_calibration_error([1.0, 1.0], [True, True]) == 0.0
    # gaps cancel within a bin, never across bins
    assert metrics.expected_calibration_error([0.5, 0.5], [True, False], bins=15) == pytest.approx(0.0)


def test_confidences_are_softmax_and_huge_logits_do_not_overflow():
    logits = np.random.default_rng(0).normal(size=(50, 7)) * 5
    predictions, confidences = metrics.predictions_and_confidences(logits)
    expected = torch.from_numpy(logits).softmax(dim=1).max(dim=1)
    assert (predictions == expected.indices.numpy()).all()
    np.testing.assert_allclose(confidences, expected.values.numpy(), rtol=1e-12)
    assert metrics.predictions_and_confidences([[1e30, 0.0]])[1][0] == 1.0


def test_interval_of_accuracy_is_the_binomial_one_and_of_macro_f1_matches_resampled_images():
    labels, predictions = random_labels(3, n=300, num_classes=5)
    intervals = metrics.bootstrap_intervals(labels, predictions, resamples=4000, seed=1)
    accuracy = metrics.accuracy(labels, predictions)
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 300)
    # 4000 resamples and steps of 1/300 leave about 0.004 of noise in a percentile
    assert intervals["accuracy"] == pytest.approx((accuracy - half, accuracy + half), abs=0.008)

    generator, scores = np.random.default_rng(2), []
    for _ in range(500):
        rows = generator.integers(0, 300, 300)
        scores.append(f1_score(labels[rows], predictions[rows], average="macro", labels=np.unique(labels[rows])))
    assert intervals["macro_f1"] == pytest.approx(tuple(np.percentile(scores, [2.5, 97.5])), abs=0.02)  # 500 resamples


def test_intervals_are_seeded_and_do_not_depend_on_the_order_of_images():
    labels, predictions = random_labels(4)
    order = np.random.default_rng(0).permutation(len(labels))
    first = metrics.bootstrap_intervals(labels, predictions, resamples=250, seed=5)
    assert first == metrics.bootstrap_intervals(labels[order], predictions[order], resamples=250, seed=5)
    assert first != metrics.bootstrap_intervals(labels, predictions, resamples=250, seed=6)


def one_hot_intervals(labels, predictions, *, resamples: int, seed: int):
    """The obvious way: dense one-hot matrices, one resample after another from the same draws."""
    num_classes, scores = int(max(labels.max(), predictions.max())) + 1, []
    cells, counts = np.unique(labels * num_classes + predictions, return_counts=True)
    truth, guess = np.eye(num_classes)[cells // num_classes], np.eye(num_classes)[cells % num_classes]
    for draws in np.random.default_rng(seed).multinomial(len(labels), counts / len(labels), size=resamples):
        support, guessed, correct = draws @ truth, draws @ guess, draws @ (truth * guess)
        f1 = 2 * correct / np.maximum(support + guessed, 1)
        scores.append((correct.sum() / len(labels), f1[support > 0].mean()))
    accuracy, macro_f1 = np.percentile(scores, [2.5, 97.5], axis=0).T
    return {"accuracy": tuple(accuracy), "macro_f1": tuple(macro_f1)}


def test_intervals_equal_those_of_dense_one_hot_matrices():
    labels, predictions = random_labels(7, n=400, num_classes=30)
    labels[labels == 11] = 12  # a class that is only predicted, and one that is never
    predictions[predictions == 5] = 6
    found = metrics.bootstrap_intervals(labels, predictions, resamples=150, seed=3)
    expected = one_hot_intervals(labels, predictions, resamples=150, seed=3)
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-12)
    assert found["macro_f1"] == pytest.approx(expected["macro_f1"], abs=1e-12)


def test_intervals_of_many_cells_are_those_of_few(monkeypatch):
    labels, predictions = random_labels(8, n=500, num_classes=40)
    order = np.random.default_rng(0).permutation(len(labels))
    by_cell = metrics.bootstrap_intervals(labels, predictions, resamples=4000, seed=1)
    monkeypatch.setattr(metrics, "MOST_CELLS", 0)
    by_image = metrics.bootstrap_intervals(labels, predictions, resamples=4000, seed=1)
    assert by_image == metrics.bootstrap_intervals(labels[order], predictions[order], resamples=4000, seed=1)
    for name in by_cell:  # two samples of 4000: a percentile has a noise of about 0.001
        assert by_image[name] == pytest.approx(by_cell[name], abs=0.006)


def test_one_class_and_one_image():
    assert metrics.bootstrap_intervals([2, 2], [2, 2], resamples=10) == {"accuracy": (1.0, 1.0), "macro_f1": (1.0, 1.0)}
    row = metrics.metric_row(Scores.of([[0.0, 5.0]], [1], ["here"]))
    assert (row["accuracy"], row["macro_f1"], row["worst_group_accuracy"]) == (1.0, 1.0, 1.0)
    assert metrics.metric_row(Scores.of([[5.0, 0.0]], [1], ["here"]))["macro_f1"] == 0.0


def test_a_row_has_every_metric_and_takes_tensors():
    logits = torch.eye(4)[torch.from_numpy(PREDICTIONS)] * 3
    scores = Scores.of(logits, torch.from_numpy(LABELS), ["a"] * 3 + ["b"] * 3)
    row = metrics.metric_row(scores)
    assert list(row) == list(METRICS)
    assert row["accuracy"] == pytest.approx(4 / 6)
    assert row["worst_group_accuracy"] == pytest.approx(2 / 3)
    confidence = math.exp(3) / (math.exp(3) + 3)
    assert row["ece"] == pytest.approx(abs(4 / 6 - confidence))
    intervals = metrics.interval_row(scores, resamples=100)
    assert intervals.keys() == {"accuracy_interval", "macro_f1_interval"}
    assert intervals["accuracy_interval"][0] <= row["accuracy"] <= intervals["accuracy_interval"][1]
    assert metrics.interval_row(scores, resamples=0) == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    logits = np.zeros((3, 2))
    logits[1, 0] = bad
    with pytest.raises(RunError, match=r"1 of 3 images .* image number 1"):
        Scores.of(logits, [0, 1, 0], [""] * 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.accuracy([], []),
        lambda: metrics.macro_f1([], []),
        lambda: metrics.per_group([], [], []),
        lambda: metrics.expected_calibration_error([], []),
        lambda: metrics.bootstrap_intervals([], []),
        lambda: Scores.of(np.empty((0, 3)), [], []),
    ],
)
def test_no_images_is_an_error(call):
    with pytest.raises(DataError, match="0 images"):
        call()


def test_bootstrap_of_a_large_split_is_quick():
    labels, predictions = random_labels(0, n=40_000, num_classes=182)
    import time

    start = time.process_time()
    metrics.bootstrap_intervals(labels, predictions, resamples=1000)
    assert time.process_time() - start < 20  # about 2 s; a thousand calls of scikit-learn take over a minute
