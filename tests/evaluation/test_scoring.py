"""Scoring of one model on one split: a row, and answers beside the images that they are of."""

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
