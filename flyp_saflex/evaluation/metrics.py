"""Metrics of one split: accuracy, macro-F1, worst group, calibration, bootstrap intervals.

Macro-F1 follows WILDS: the mean F1 over the classes that occur among the labels. Everything is a function of labels and
predictions or logits, in fractions of 0..1, so that the trainer, `evaluate` and an experiment's own script share it.

Shapes: N images, K classes, R resamples, C occupied cells of the confusion matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flyp_saflex.errors import DataError, RunError
from flyp_saflex.tables import METRICS

CALIBRATION_BINS = 15
RESAMPLES_AT_ONCE = 100  # bounds the memory of a bootstrap to 100 x C counts
MOST_CELLS = 4096
"""Occupied cells of a confusion matrix up to which a bootstrap draws cells; with more, drawing the images is cheaper."""


def predictions_and_confidences(logits_NK: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the most likely class of every image and its softmax probability.

    Args:
        logits_NK: logits; a tensor must be on the CPU. Of equal logits the first class wins.

    Raises:
        RunError: a logit is NaN or infinite.
    """
    logits_NK = np.asarray(logits_NK, dtype=np.float64)
    broken_N = ~np.isfinite(logits_NK).all(axis=1)
    if broken_N.any():
        raise RunError(
            f"{int(broken_N.sum())} of {len(logits_NK)} images have logits that are NaN or infinite (first: image number "
            f"{int(broken_N.argmax())}): the weights are broken or the precision is too low; try --set train.precision=no"
        )
    predictions_N = logits_NK.argmax(axis=1)
    shifted_NK = logits_NK - logits_NK.max(axis=1, keepdims=True)
    return predictions_N, 1.0 / np.exp(shifted_NK).sum(axis=1)


def accuracy(labels_N: ArrayLike, predictions_N: ArrayLike) -> float:
    """Return the fraction of images whose prediction is their label.

    Raises:
        DataError: there are no images.
    """
    labels_N, predictions_N = _pair(labels_N, predictions_N)
    return float((labels_N == predictions_N).mean())


def macro_f1(labels_N: ArrayLike, predictions_N: ArrayLike) -> float:
    """Return the mean F1 over the classes that occur in `labels_N` (WILDS' rule, `F1-macro_all`).

    A class that is only predicted counts through the false positives it takes from the others, not as an F1 of zero.

    Raises:
        DataError: there are no images.
    """
    scores = [row["f1"] for row in per_class(labels_N, predictions_N) if row["n"]]
    return float(np.mean(scores))


def per_class(labels_N: ArrayLike, predictions_N: ArrayLike, class_names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return one row per class: `class`, `name`, `n` (images), `predicted`, `precision`, `recall`, `f1`.

    Args:
        labels_N: class indices.
        predictions_N: class indices.
        class_names: names by index; every one of them gets a row. Without them: the classes up to the largest index.

    A class without images has no recall and no F1, one that is never predicted no precision: these are None.

    Raises:
        DataError: there are no images.
    """
    labels_N, predictions_N = _pair(labels_N, predictions_N)
    num_classes = len(class_names) if class_names is not None else int(max(labels_N.max(), predictions_N.max())) + 1
    support_K = np.bincount(labels_N, minlength=num_classes)
    predicted_K = np.bincount(predictions_N, minlength=num_classes)
    correct_K = np.bincount(labels_N[labels_N == predictions_N], minlength=num_classes)
    assert len(support_K) == len(predicted_K) == num_classes, "a label or prediction lies outside of the classes"
    rows = []
    for k, (n, predicted, correct) in enumerate(zip(support_K.tolist(), predicted_K.tolist(), correct_K.tolist(), strict=True)):
        rows.append(
            {
                "class": k,
                "name": class_names[k] if class_names is not None else str(k),
                "n": n,
                "predicted": predicted,
                "precision": correct / predicted if predicted else None,
                "recall": correct / n if n else None,
                "f1": 2 * correct / (n + predicted) if n else None,
            }
        )
    return rows


def per_group(labels_N: ArrayLike, predictions_N: ArrayLike, groups_N: Sequence[str]) -> list[dict[str, Any]]:
    """Return `group`, `n` and `accuracy` of every group, in the order in which groups first occur.

    Raises:
        DataError: there are no images.
    """
    labels_N, predictions_N = _pair(labels_N, predictions_N)
    assert len(groups_N) == len(labels_N), f"{len(groups_N)} groups for {len(labels_N)} images"
    names = {group: index for index, group in enumerate(dict.fromkeys(groups_N))}
    index_N = np.array([names[group] for group in groups_N], dtype=np.int64)
    sizes_G = np.bincount(index_N, minlength=len(names)).tolist()
    correct_G = np.bincount(index_N[labels_N == predictions_N], minlength=len(names)).tolist()
    return [{"group": name, "n": sizes_G[g], "accuracy": correct_G[g] / sizes_G[g]} for name, g in names.items()]


def worst_group_accuracy(
    labels_N: ArrayLike, predictions_N: ArrayLike, groups_N: Sequence[str], *, minimum_size: int = 1
) -> float | None:
    """Return the accuracy of the group on which it is lowest.

    Args:
        labels_N: class indices.
        predictions_N: class indices.
        groups_N: group of every image (`scoring.groups_of`); images of unknown domain ("") are a group as well, so that
            without domains this is the accuracy.
        minimum_size: groups with fewer images are passed over. 1 counts every group, as WILDS does; where groups are
            tiny (a camera with three pictures) the worst one is then noise, and 20 or more is a better question.

    Returns:
        A fraction; None if every group is smaller than `minimum_size`.

    Raises:
        DataError: there are no images.
    """
    rows = per_group(labels_N, predictions_N, groups_N)
    return min((row["accuracy"] for row in rows if row["n"] >= minimum_size), default=None)


def expected_calibration_error(confidences_N: ArrayLike, correct_N: ArrayLike, *, bins: int = CALIBRATION_BINS) -> float:
    """Return the mean gap between confidence and accuracy of the predicted class over equal-width bins of (0, 1].

    A bin's gap, |accuracy - mean confidence|, counts in proportion to its images; empty bins count nothing.

    Raises:
        DataError: there are no images.
    """
    confidences_N, correct_N = np.asarray(confidences_N, dtype=np.float64), np.asarray(correct_N, dtype=np.float64)
    _check_images(len(confidences_N))
    gaps_B = np.bincount(confidence_bins(confidences_N, bins), weights=correct_N - confidences_N, minlength=bins)
    return float(np.abs(gaps_B).sum() / len(confidences_N))


def confidence_bins(confidences_N: NDArray[np.float64], bins: int = CALIBRATION_BINS) -> NDArray[np.int64]:
    """Return the bin of every confidence: equal-width bins of (0, 1], from 0; 0 itself is in the first."""
    return np.clip(np.ceil(confidences_N * bins).astype(np.int64) - 1, 0, bins - 1)


def bootstrap_intervals(
    labels_N: ArrayLike, predictions_N: ArrayLike, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Return percentile intervals of `accuracy` and `macro_f1` over resampled images.

    Drawing N images with replacement is drawing the occupied cells of the confusion matrix from a multinomial, so with few
    cells no resample touches the images again. Macro-F1 of a resample is over the classes among *its* labels, by the same
    rule as the value itself; with rare classes its interval can therefore lie above the value.

    Args:
        labels_N: class indices.
        predictions_N: class indices.
        resamples: R, at least 1.
        seed: seed of the draw.
        level: probability covered.

    Raises:
        DataError: there are no images.
    """
    labels_N, predictions_N = _pair(labels_N, predictions_N)
    n = len(labels_N)
    classes, compact = np.unique(np.concatenate([labels_N, predictions_N]), return_inverse=True)
    num_classes = len(classes)
    cells_C, counts_C = np.unique(compact[:n] * num_classes + compact[n:], return_counts=True)
    truth_C, guess_C = np.divmod(cells_C, num_classes)
    order_C, (right_H,) = np.argsort(guess_C, kind="stable"), np.nonzero(truth_C == guess_C)
    truths, truth_starts = np.unique(truth_C, return_index=True)  # the cells are in the order of their truth
    guesses, guess_starts = np.unique(guess_C[order_C], return_index=True)
    accuracies, scores = [], []
    for draws_RC in _draws(counts_C, resamples, np.random.default_rng(seed)):
        support_RK, correct_RK = np.zeros((2, len(draws_RC), num_classes), dtype=np.int64)
        support_RK[:, truths] = np.add.reduceat(draws_RC, truth_starts, axis=1)
        both_RK = support_RK.copy()
        both_RK[:, guesses] += np.add.reduceat(draws_RC[:, order_C], guess_starts, axis=1)
        correct_RK[:, truth_C[right_H]] = draws_RC[:, right_H]
        f1_RK = 2 * correct_RK / np.maximum(both_RK, 1)
        present_RK = support_RK > 0
        scores.append((f1_RK * present_RK).sum(axis=1) / present_RK.sum(axis=1))
        accuracies.append(correct_RK.sum(axis=1) / n)
    tails = [50 * (1 - level), 50 * (1 + level)]
    return {
        name: tuple(float(edge) for edge in np.percentile(np.concatenate(values), tails))  # type: ignore[misc]
        for name, values in (("accuracy", accuracies), ("macro_f1", scores))
    }


def _draws(counts_C: NDArray[np.int64], resamples: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield the cells' counts [R, C] of resampled images, some resamples at a time."""
    n = int(counts_C.sum())
    if len(counts_C) <= MOST_CELLS:
        for start in range(0, resamples, RESAMPLES_AT_ONCE):
            yield generator.multinomial(n, counts_C / n, size=min(RESAMPLES_AT_ONCE, resamples - start))
        return
    starts_C = np.cumsum(counts_C) - counts_C  # of the images in the order of their cells
    for _ in range(resamples):
        drawn_N = np.bincount(generator.integers(0, n, n), minlength=n)
        yield np.add.reduceat(drawn_N, starts_C)[None]


@dataclass(frozen=True)
class Scores:
    """One model's answers on N images: what every metric is a function of.

    Attributes:
        logits_NK: float64 logits.
        labels_N: class indices, 0..K-1.
        groups_N: group of every image, by `data.group_columns` or its domain; "" where unknown.
    """

    logits_NK: NDArray[np.float64]
    labels_N: NDArray[np.int64]
    groups_N: tuple[str, ...]

    @classmethod
    def of(cls, logits_NK: ArrayLike, labels_N: ArrayLike, groups_N: Sequence[str]) -> Scores:
        """Check and convert.

        Args:
            logits_NK: logits; a tensor must be on the CPU.
            labels_N: class indices.
            groups_N: group of every image.

        Raises:
            DataError: there are no images.
            RunError: a logit is NaN or infinite.
        """
        labels_N = np.asarray(labels_N, dtype=np.int64)
        _check_images(len(labels_N))
        scores = cls(np.asarray(logits_NK, dtype=np.float64), labels_N, tuple(groups_N))
        _ = scores.predictions_N
        return scores

    @cached_property
    def _answers(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return predictions_and_confidences(self.logits_NK)

    @property
    def predictions_N(self) -> NDArray[np.int64]:  # noqa: N802 - a shape suffix
        """Most likely class; of equal logits the first."""
        return self._answers[0]

    @property
    def confidences_N(self) -> NDArray[np.float64]:  # noqa: N802 - a shape suffix
        """Probabilities of the predictions."""
        return self._answers[1]


def accuracy_of(scores: Scores) -> float:
    """Return the accuracy."""
    return accuracy(scores.labels_N, scores.predictions_N)


def macro_f1_of(scores: Scores) -> float:
    """Return macro-F1 by WILDS' rule."""
    return macro_f1(scores.labels_N, scores.predictions_N)


def worst_group_of(scores: Scores) -> float | None:
    """Return the accuracy of the group on which it is lowest."""
    return worst_group_accuracy(scores.labels_N, scores.predictions_N, scores.groups_N)


def ece_of(scores: Scores) -> float:
    """Return the expected calibration error."""
    return expected_calibration_error(scores.confidences_N, scores.labels_N == scores.predictions_N)


def metric_row(scores: Scores) -> dict[str, float | None]:
    """Return the value of every metric of `tables.METRICS`, by name."""
    return {name: METRICS[name].of(scores) for name in METRICS}


def interval_row(scores: Scores, *, resamples: int, seed: int = 0) -> dict[str, list[float]]:
    """Return `accuracy_interval` and `macro_f1_interval` as [low, high]; nothing for 0 resamples."""
    if not resamples:
        return {}
    intervals = bootstrap_intervals(scores.labels_N, scores.predictions_N, resamples=resamples, seed=seed)
    return {f"{name}_interval": list(interval) for name, interval in intervals.items()}


def sequence_row(scores: Scores, sequences_N: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return metrics of bursts as `sequences`; nothing where no image belongs to one.

    A burst's probabilities are the mean of its images' (softmax), its label is its images' most frequent one, the first of equal
    ones. Images without a sequence are bursts of one.

    Args:
        scores: of single images.
        sequences_N: burst of every image; "" for none.

    Returns:
        `{"sequences": {"n", "mixed", "accuracy", "macro_f1"}}`; `mixed` counts bursts whose images differ in their label.
    """
    if not any(sequences_N):
        return {}
    keys: dict[tuple[str, int], int] = {}
    index_N = np.array([keys.setdefault((name, -1 if name else n), len(keys)) for n, name in enumerate(sequences_N)])
    shifted_NK = scores.logits_NK - scores.logits_NK.max(axis=1, keepdims=True)
    probabilities_NK = np.exp(shifted_NK) / np.exp(shifted_NK).sum(axis=1, keepdims=True)
    sums_SK = np.zeros((len(keys), scores.logits_NK.shape[1]))
    np.add.at(sums_SK, index_N, probabilities_NK)  # the mean's argmax is the sum's
    votes_SK = np.zeros_like(sums_SK)
    np.add.at(votes_SK, (index_N, scores.labels_N), 1)
    labels_S, predictions_S = votes_SK.argmax(axis=1), sums_SK.argmax(axis=1)
    numbers = {
        "n": len(keys),
        "mixed": int(((votes_SK > 0).sum(axis=1) > 1).sum()),
        "accuracy": accuracy(labels_S, predictions_S),
        "macro_f1": macro_f1(labels_S, predictions_S),
    }
    return {"sequences": numbers}


def _pair(labels_N: ArrayLike, predictions_N: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    labels, predictions = np.asarray(labels_N, dtype=np.int64), np.asarray(predictions_N, dtype=np.int64)
    assert labels.shape == predictions.shape, f"{labels.shape} labels, {predictions.shape} predictions"
    _check_images(len(labels))
    return labels, predictions


def _check_images(n: int) -> None:
    if n == 0:
        raise DataError("a split without images cannot be scored: found 0 images, expected at least 1; check data.* and --limit")
