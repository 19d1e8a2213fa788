"""The filters' rules on numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from flyp_saflex.filtering.alia import (
    UNREADABLE,
    confidence_filter,
    confident_thresholds,
    keep,
    precision_recall,
    removal_table,
    semantic_log_odds,
)

HELD_OUT = np.array([[0.9, 0.1, 0.0], [0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.4, 0.6, 0.0]])
HELD_OUT_LABELS = [0, 0, 1, 0]


def softmax_logits(probabilities):
    """Logits whose softmax is `probabilities` (up to 1e-9 where one is zero)."""
    return np.log(np.maximum(probabilities, 1e-9))


def test_threshold_is_the_mean_confidence_in_a_class_over_its_own_images():
    # class 0: (0.9 + 0.7 + 0.4) / 3, whatever is predicted; class 1: 0.5; class 2 has no image
    assert_allclose(confident_thresholds(HELD_OUT, HELD_OUT_LABELS), [2 / 3, 0.5, np.inf])


def test_thresholds_equal_the_loop_of_their_definition():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), size=200)
    labels = rng.integers(0, 5, size=200)
    expected = []
    for k in range(5):
        total = [float(row[k]) for row, label in zip(probabilities, labels, strict=True) if label == k]
        expected.append(sum(total) / len(total))
    assert_allclose(confident_thresholds(probabilities, labels), expected)


def test_an_edit_is_flagged_at_the_threshold_of_the_class_it_is_predicted_as():
    threshold_K = [0.6, 0.5, np.inf]
    edits = np.array([[0.6, 0.3, 0.1], [0.59, 0.3, 0.11], [0.3, 0.5, 0.2], [0.0, 0.0, 1.0], [0.4, 0.45, 0.15]])
    flags = confidence_filter(edits, [0, 0, 0, 0, 1], threshold_K)
    assert flags.unchanged_N.tolist() == [True, False, False, False, False]
    assert flags.corrupted_N.tolist() == [False, False, True, False, False]


def test_an_edit_without_numbers_is_not_flagged():
    flags = confidence_filter([[np.nan, np.nan]], [0], [0.5, 0.5])
    assert not flags.unchanged_N.any()
    assert not flags.corrupted_N.any()


def test_semantic_score_compares_the_best_text_of_either_side():
    scores = semantic_log_odds([[3.0, 9.0], [1.0, 2.0], [5.0, 4.0]], [[8.0, 1.0, 0.0], [2.5, 0.0, 0.0], [5.0, 5.0, 5.0]])
    assert_allclose(scores, [1.0, -0.5, 0.0])


def test_removal_table_number_by_number():
    """Ten edits of three classes: probabilities as a model would give them, every verdict worked out by hand.

    Thresholds from HELD_OUT: class 0: 2/3, class 1: 1/2, class 2: none.
    """
    edits = [  # (source's class, probabilities, semantic log-odds)
        (0, [0.80, 0.10, 0.10], 2.0),  # class 0 and sure: unchanged
        (0, [0.60, 0.30, 0.10], 2.0),  # class 0, not sure: kept
        (0, [0.10, 0.70, 0.20], 1.0),  # class 1 and sure: corrupted
        (0, [0.05, 0.90, 0.05], -1.0),  # the same, and shows nothing: corrupted and semantic
        (0, [0.30, 0.30, 0.40], -0.5),  # shows nothing: semantic
        (1, [0.10, 0.80, 0.10], 0.5),  # unchanged
        (1, [0.90, 0.05, 0.05], 0.5),  # corrupted
        (1, [0.05, 0.05, 0.90], 0.5),  # class 2 has no threshold: kept
        (2, [0.05, 0.05, 0.90], 0.0),  # no threshold, on the border of the texts: kept
        (2, [0.50, 0.25, 0.25], 1.0),  # class 0, not sure: kept
    ]
    names = ["deer", "fox", "tiger", "bear"]
    probabilities = np.exp(softmax_logits(np.array([row[1] for row in edits])))
    labels = [row[0] for row in edits]
    found = confidence_filter(probabilities, labels, confident_thresholds(HELD_OUT, HELD_OUT_LABELS))
    semantic = np.array([row[2] for row in edits]) < 0
    unreadable = np.zeros(10, dtype=bool)
    flags = {"semantic": semantic, "unchanged": found.unchanged_N, "corrupted": found.corrupted_N, UNREADABLE: unreadable}
    keep_N = keep(flags, ("semantic", "unchanged", "corrupted"))
    assert keep_N.tolist() == [False, True, False, False, False, False, False, True, True, True]
    assert removal_table([names[label] for label in labels], flags, keep_N, reversed(names)) == {
        "tiger": {"edits": 2, "semantic": 0, "unchanged": 0, "corrupted": 0, "unreadable": 0, "kept": 2},
        "fox": {"edits": 3, "semantic": 0, "unchanged": 1, "corrupted": 1, "unreadable": 0, "kept": 1},
        "deer": {"edits": 5, "semantic": 2, "unchanged": 1, "corrupted": 2, "unreadable": 0, "kept": 1},
    }
    assert list(removal_table([names[label] for label in labels], flags, keep_N, reversed(names))) == ["tiger", "fox", "deer"]
    only_corrupted = keep(flags, ("corrupted",))
    assert removal_table(["all"] * 10, flags, only_corrupted)["all"]["kept"] == 7


def test_unreadable_edits_are_never_kept_and_verdicts_that_do_not_drop_are_counted():
    flags = {"semantic": np.array([True, False, False]), UNREADABLE: np.array([False, True, False])}
    assert keep(flags, ()).tolist() == [True, False, True]
    assert keep(flags, ("semantic", "corrupted")).tolist() == [False, False, True]
    table = removal_table(["a", "a", "b"], flags, keep(flags, ()))
    assert table["a"] == {"edits": 2, "semantic": 1, "unreadable": 1, "kept": 1}


def test_precision_and_recall_by_hand():
    found = precision_recall([True, True, True, False, False], [True, False, True, True, False])
    assert found == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3, 3)
    assert precision_recall([True, False, False], [True, True, False])[:2] == (1.0, 0.5)
    assert precision_recall([False, False], [True, False])[:2] == (None, 0.0)
    assert precision_recall([True, False], [False, False])[:2] == (0.0, None)
    assert precision_recall([], []) == (None, None, 0, 0)


def test_the_rule_of_released_code_compares_with_the_threshold_of_the_source():
    """filter.py of ALIA at ce01c94: aug_conf > conf_thresh[labels], strictly; kept and dropped edits differ between the rules."""
    threshold_K = [0.6, 0.3, 0.9]
    edits = np.array([[0.6, 0.3, 0.1], [0.61, 0.3, 0.09], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6], [0.4, 0.2, 0.4]])
    labels = np.array([0, 0, 0, 1, 2])
    flags = confidence_filter(edits, labels, threshold_K, rule="alia")
    confident = edits.max(axis=1) > np.array(threshold_K)[labels]
    same = edits.argmax(axis=1) == labels
    assert flags.unchanged_N.tolist() == (confident & same).tolist() == [False, True, False, False, False]
    assert flags.corrupted_N.tolist() == (confident & ~same).tolist() == [False, False, False, True, False]
    ours = confidence_filter(edits, labels, threshold_K)
    assert ours.unchanged_N.tolist() == [True, True, False, False, False]
    assert ours.corrupted_N.tolist() == [False, False, True, False, False]
