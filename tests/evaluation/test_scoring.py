"""Scoring of one model on one split: a row, and answers beside the images that they are of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flyp_saflex.errors import RunError
from flyp_saflex.evaluation import metrics
from flyp_saflex.evaluation.scoring import details, prediction_columns, score_split, scores_of
from flyp_saflex.records import Sample, Split

LABELS, DOMAINS = (0, 0, 1, 1, 2), ("a", "a", "a", "b", "b")
SPLIT = Split(
    name="night",
    role="test",
    shift="ood",
    samples=tuple(
        Sample(sample_id=f"{place}.png", item=Path(f"{place}.png"), label=label, domain=domain)
        for place, (label, domain) in enumerate(zip(LABELS, DOMAINS, strict=True))
    ),
)
LOGITS = np.random.default_rng(0).normal(size=(5, 3))


def test_a_row_says_what_was_scored_and_has_the_metrics_of_the_readable_images():
    positions = [0, 1, 3, 4]  # one image could not be read
    row = score_split(SPLIT, positions, LOGITS[positions], bootstrap=20, seed=3).row
    assert list(row)[:4] == ["split", "role", "shift", "n"]
    assert (row["split"], row["role"], row["shift"], row["n"], row["unreadable"]) == ("night", "test", "ood", 4, 1)
    scores = scores_of([SPLIT.samples[place] for place in positions], LOGITS[positions])
    assert {name: row[name] for name in metrics.metric_row(scores)} == metrics.metric_row(scores)
    assert row["accuracy_interval"] == metrics.interval_row(scores, resamples=20, seed=3)["accuracy_interval"]
    assert "accuracy_interval" not in score_split(SPLIT, positions, LOGITS[positions]).row


def test_the_order_of_reading_changes_nothing():
    order = np.array([3, 0, 4, 1, 2])
    shuffled, plain = score_split(SPLIT, order, LOGITS[order]), score_split(SPLIT, range(5), LOGITS)
    assert shuffled.row == plain.row
    assert shuffled.samples == plain.samples == list(SPLIT.samples)
    assert shuffled.predictions_N.tolist() == plain.predictions_N.tolist() == LOGITS.argmax(axis=1).tolist()


def test_an_image_that_is_scored_twice_is_a_mistake():
    with pytest.raises(AssertionError, match="scored twice"):
        score_split(SPLIT, [0, 0], LOGITS[:2])


def test_broken_logits_name_the_split():
    broken = LOGITS.copy()
    broken[2, 0] = np.nan
    with pytest.raises(RunError, match="split night: 1 of 5 images have logits that are NaN"):
        score_split(SPLIT, range(5), broken)


def test_predictions_and_details_are_of_every_alpha():
    scored = {alpha: score_split(SPLIT, range(5), alpha * LOGITS) for alpha in (0.5, 1.0)}
    columns = prediction_columns(scored, ["x", "y", "z"])
    assert columns["alpha"] == [0.5] * 5 + [1.0] * 5
    assert columns["sample_id"] == [sample.sample_id for sample in SPLIT.samples] * 2
    assert columns["label_name"] == ["x", "x", "y", "y", "z"] * 2
    assert {len(column) for column in columns.values()} == {10}
    tables = details(scored, ["x", "y", "z"])
    assert tables.keys() == {"0.5", "1"}
    assert [row["n"] for row in tables["1"]["per_class"]] == [2, 2, 1]
    assert [row["group"] for row in tables["1"]["per_group"]] == ["a", "b"]


def grouped(groups):
    samples = tuple(replace(sample, group=group) for sample, group in zip(SPLIT.samples, groups, strict=True))
    return replace(SPLIT, samples=samples)


def test_the_worst_group_is_that_of_the_groups_if_there_are_any():
    predictions = np.eye(3)[[0, 1, 1, 1, 2]]  # of the labels 0 0 1 1 2 the second is wrong
    row = score_split(SPLIT, range(5), predictions).row
    assert row["worst_group_accuracy"] == pytest.approx(2 / 3), "domains a: 2 of 3, b: 2 of 2"
    assert "num_groups" not in row
    scored = score_split(grouped(["0, a", "0, a", "1, a", "1, b", "2, b"]), range(5), predictions)
    assert (scored.row["worst_group_accuracy"], scored.row["num_groups"]) == (0.5, 4)
    rows = details({1.0: scored}, ["x", "y", "z"])["1"]["per_group"]
    assert [(part["group"], part["n"], part["accuracy"]) for part in rows][:2] == [("0, a", 2, 0.5), ("1, a", 1, 1.0)]


def test_a_split_with_classes_of_its_own_is_scored_among_these():
    """As ImageNet-R and ImageNet-A are: the argmax over the split's classes, and probabilities that add up to one over them."""
    logits = np.array([[1.0, 0.0, 5.0, 9.0]] * 5)
    whole = score_split(SPLIT, range(5), logits)
    assert whole.predictions_N.tolist() == [3] * 5
    own = score_split(replace(SPLIT, own_classes=(0, 1, 2)), range(5), logits)
    assert own.predictions_N.tolist() == [2] * 5
    assert own.row["num_classes"] == 3
    assert own.confidences_N == pytest.approx(np.exp(5) / np.exp([1, 0, 5]).sum())
    with pytest.raises(RunError, match="NaN"):
        score_split(replace(SPLIT, own_classes=(0, 1, 2)), range(5), np.where(logits == 9, np.nan, logits))
