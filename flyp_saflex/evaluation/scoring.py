"""Scores of a model on a split: results row, tables per class and group, predictions. Numpy only, no files.

Training scores its select split with the same functions as `evaluate` and experiment scripts.

Shapes: N images that could be read, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flyp_saflex.errors import DataError, RunError
from flyp_saflex.evaluation import metrics
from flyp_saflex.records import Sample, Split

NEVER = -1e9
"""Logit of a class that is not predicted; its probability is zero."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One model on one split.

    Attributes:
        row: as in results.json, without `wise_alpha`.
        samples: the N images that could be read.
        labels_N: their classes.
        predictions_N: predicted classes.
        confidences_N: probabilities of the predictions.
    """

    row: dict[str, Any]
    samples: list[Sample]
    labels_N: NDArray[np.int64]
    predictions_N: NDArray[np.int64]
    confidences_N: NDArray[np.float64]


def score_split(split: Split, positions_N: ArrayLike, logits_NK: ArrayLike, *, bootstrap: int = 0, seed: int = 0) -> Scored:
    """Score one model on one split.

    Args:
        split: the images.
        positions_N: which of them the logits are of, in any order; the others were unreadable and are counted.
        logits_NK: logits; a tensor must be on the CPU.
        bootstrap: resamples behind the intervals; 0: none.
        seed: seed of the resamples.

    Raises:
        RunError: a logit is NaN or infinite.
        DataError: there are no images.
    """
    positions_N, logits_NK = np.asarray(positions_N, dtype=np.int64), np.asarray(logits_NK)
    assert len(positions_N) == len(logits_NK), f"{len(positions_N)} positions, {len(logits_NK)} rows of logits"
    assert len(np.unique(positions_N)) == len(positions_N), "an image was scored twice"
    order_N = np.argsort(positions_N, kind="stable")
    samples, logits_NK = [split.samples[i] for i in positions_N[order_N]], logits_NK[order_N]
    try:
        scores = scores_of(samples, logits_NK, split.own_classes, split.merged)
        row: dict[str, Any] = {
            "n": len(samples),
            **metrics.metric_row(scores),
            **metrics.interval_row(scores, resamples=bootstrap, seed=seed),
            **metrics.sequence_row(scores, [sample.sequence for sample in samples]),
        }
    except (RunError, DataError) as error:
        raise type(error)(f"split {split.name}: {error}") from None
    row = {"split": split.name, "role": split.role, "shift": split.shift, **row, "unreadable": len(split) - len(samples)}
    if split.own_classes:
        row["num_classes"] = len(split.own_classes)
    if split.merged:
        row["num_classes"] = len(split.merged)
    if groups := len({sample.group for sample in samples} - {""}):
        row["num_groups"] = groups
    return Scored(row, samples, scores.labels_N, scores.predictions_N, scores.confidences_N)


def split_scores(split: Split, positions_N: Iterable[int], logits_NK: ArrayLike) -> metrics.Scores:
    """Return the scores of a split's images that logits are given of, over its own classes.

    Args:
        split: the images.
        positions_N: which of them the logits are of.
        logits_NK: their logits.
    """
    return scores_of([split.samples[position] for position in positions_N], logits_NK, split.own_classes, split.merged)


def scores_of(
    samples: Sequence[Sample], logits_NK: ArrayLike, own_classes: Sequence[int] = (), merged: Sequence[Sequence[int]] = ()
) -> metrics.Scores:
    """Return the scores of samples whose logits are given in the same order.

    Args:
        samples: N images.
        logits_NK: their logits.
        own_classes: classes that predictions are taken from; empty: all.
        merged: classes that count as one; the first of them gets the highest logit, the others are never predicted.
    """
    logits_NK = np.asarray(logits_NK, dtype=np.float64)
    if own_classes:
        is_other_K = np.ones(logits_NK.shape[1], dtype=bool)
        is_other_K[list(own_classes)] = False
        logits_NK = np.where(is_other_K & np.isfinite(logits_NK), NEVER, logits_NK)
    logits_NK = _merged(logits_NK, merged) if merged else logits_NK
    return metrics.Scores.of(logits_NK, [sample.label for sample in samples], groups_of(samples))


def _merged(logits_NK: NDArray[np.float64], merged: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Return logits where the first class of a group has the highest, and the others are never predicted."""
    found_NK = logits_NK.copy()
    for group in merged:
        found_NK[:, list(group)] = NEVER
        found_NK[:, group[0]] = logits_NK[:, list(group)].max(axis=1)
    return found_NK


def groups_of(samples: Sequence[Sample]) -> list[str]:
    """Return the group of every sample: that of `data.group_columns`, or its domain."""
    return [sample.group or sample.domain for sample in samples]


def prediction_columns(scored: Mapping[float, Scored], class_names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns of predictions/<split>.parquet, alpha after alpha."""
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("sample_id", "label", "prediction", "confidence", "label_name", "prediction_name", "domain", "alpha")
    }
    for alpha, part in scored.items():
        labels, predictions = part.labels_N.tolist(), part.predictions_N.tolist()
        columns["sample_id"] += [sample.sample_id for sample in part.samples]
        columns["label"] += labels
        columns["prediction"] += predictions
        columns["confidence"] += part.confidences_N.tolist()
        columns["label_name"] += [class_names[k] for k in labels]
        columns["prediction_name"] += [class_names[k] for k in predictions]
        columns["domain"] += [sample.domain for sample in part.samples]
        columns["alpha"] += [alpha] * len(labels)
    return columns


def details(scored: Mapping[float, Scored], class_names: Sequence[str]) -> dict[str, Any]:
    """Return the tables per class and per group by alpha, as in details.json."""
    return {
        f"{alpha:g}": {
            "per_class": metrics.per_class(part.labels_N, part.predictions_N, class_names),
            "per_group": metrics.per_group(part.labels_N, part.predictions_N, groups_of(part.samples)),
        }
        for alpha, part in scored.items()
    }
