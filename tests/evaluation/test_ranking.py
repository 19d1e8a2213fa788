"""AUROC and average precision: scikit-learn's, one against the rest, and none where nothing can be ranked."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import average_precision_score, roc_auc_score

from flyp_saflex.evaluation.metrics import Scores, metric_row
from flyp_saflex.evaluation.ranking import auroc_of, average_precision_of


def scores(num_classes: int, labels: list[int] | None = None, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    labels_N = np.array(labels) if labels is not None else np.arange(60) % num_classes
    logits_NK = rng.normal(size=(len(labels_N), num_classes))
    logits_NK[np.arange(len(labels_N)), labels_N] += 0.7
    return Scores.of(logits_NK, labels_N, [""] * len(labels_N))


def test_of_two_classes_the_second_is_positive() -> None:
    one = scores(2)
    margin = one.logits_NK[:, 1] - one.logits_NK[:, 0]
    assert auroc_of(one) == pytest.approx(roc_auc_score(one.labels_N, margin))
    assert average_precision_of(one) == pytest.approx(average_precision_score(one.labels_N, margin))


def test_of_more_classes_it_is_the_mean_against_the_rest() -> None:
    one = scores(4)
    probabilities = softmax(one.logits_NK, axis=1)
    assert auroc_of(one) == pytest.approx(roc_auc_score(one.labels_N, probabilities, multi_class="ovr"))


def test_a_class_without_rows_is_passed_over_and_one_class_has_no_value() -> None:
    without = scores(4, labels=[0, 1, 2] * 20)
    assert 0.5 < auroc_of(without) < 1
    assert auroc_of(scores(3, labels=[1] * 9)) is None
    assert metric_row(scores(2, labels=[0] * 9))["auroc"] is None


def test_confident_logits_keep_their_order() -> None:
    logits = np.stack([np.zeros(6), 50.0 + np.arange(6)], axis=1)
    one = Scores.of(logits, np.array([0, 0, 0, 1, 1, 1]), [""] * 6)
    assert auroc_of(one) == 1.0
