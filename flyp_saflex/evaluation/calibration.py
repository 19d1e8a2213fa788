"""Temperature scaling: one number that makes confidences fit accuracies (Guo et al., arXiv 1706.04599).

    probabilities = softmax(logits / temperature)

The temperature minimises the negative log likelihood of labelled images that the model was not trained on. It changes no
prediction. With b = 1 / temperature that loss is convex; its derivative, mean(sum_k p_k z_k - z_label), rises with b.

Shapes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flyp_saflex.errors import DataError
from flyp_saflex.evaluation.metrics import CALIBRATION_BINS, confidence_bins, expected_calibration_error

COLDEST, HOTTEST = 0.05, 20.0
"""Bounds of the temperature. Where every image is answered rightly, the likelihood rises for ever as it falls."""
HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature, with the images that it was fitted on.

    Attributes:
        temperature: divides the logits; above 1 the model was too sure.
        split: name of the select split.
        n: its images.
        ece_before: expected calibration error of these images without it, 0..1.
        ece_after: with it; fitted on the same images, and therefore a little too good.
    """

    temperature: float
    split: str
    n: int
    ece_before: float
    ece_after: float

    @classmethod
    def of(cls, logits_NK: ArrayLike, labels_N: ArrayLike, split: str) -> Calibration:
        """Fit the temperature on the images of a split.

        Args:
            logits_NK: finite logits.
            labels_N: class indices.
            split: its name.

        Raises:
            DataError: there are no images.
        """
        logits_NK, labels_N = np.asarray(logits_NK, dtype=np.float64), np.asarray(labels_N, dtype=np.int64)
        temperature = fit_temperature(logits_NK, labels_N)
        before, after = (calibration_error(logits_NK, labels_N, value) for value in (1.0, temperature))
        return cls(temperature=temperature, split=split, n=len(labels_N), ece_before=before, ece_after=after)

    @property
    def at_bound(self) -> bool:
        """True if the likelihood has its optimum beyond the bounds, as with a few images that are all answered rightly."""
        return usable(self.temperature) != self.temperature


def usable(temperature: float) -> float:
    """Return a fitted temperature; 1 for one at its bound, where the images are too few."""
    return 1.0 if temperature in (COLDEST, HOTTEST) else temperature


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Images of similar confidence, one point of a reliability plot.

    Attributes:
        n: their number, at least 1.
        confidence: mean confidence, 0..1.
        accuracy: share of right predictions, 0..1.
    """

    n: int
    confidence: float
    accuracy: float


def reliability(confidences_N: ArrayLike, correct_N: ArrayLike, *, bins: int = CALIBRATION_BINS) -> list[Bin]:
    """Return the occupied bins of `metrics.expected_calibration_error`, by rising confidence.

    The sum of n |accuracy - confidence| over the bins, divided by N, is the expected calibration error.

    Args:
        confidences_N: probabilities of the predicted classes.
        correct_N: whether the predictions are right.
        bins: number of equal-width bins of (0, 1].
    """
    confidences_N, correct_N = np.asarray(confidences_N, dtype=np.float64), np.asarray(correct_N, dtype=np.float64)
    bin_N = confidence_bins(confidences_N, bins)
    counts_B, sums_B, right_B = (
        np.bincount(bin_N, weights=values, minlength=bins) for values in (None, confidences_N, correct_N)
    )
    return [
        Bin(n=int(n), confidence=float(total / n), accuracy=float(right / n))
        for n, total, right in zip(counts_B, sums_B, right_B, strict=True)
        if n
    ]


def fit_temperature(logits_NK: ArrayLike, labels_N: ArrayLike) -> float:
    """Return the temperature with the smallest negative log likelihood.

    Args:
        logits_NK: finite logits.
        labels_N: class indices.

    Returns:
        Between `COLDEST` and `HOTTEST`; 1 where no temperature changes the likelihood (a single class, equal logits).

    Raises:
        DataError: there are no images.
    """
    logits_NK, labels_N = np.asarray(logits_NK, dtype=np.float64), np.asarray(labels_N, dtype=np.int64)
    if not len(labels_N):
        raise DataError("a temperature cannot be fitted on 0 images, expected at least 1; check data.* and --limit")
    assert logits_NK.shape[0] == labels_N.shape[0], f"{logits_NK.shape} logits, {labels_N.shape} labels"
    shifted_NK = logits_NK - logits_NK.max(axis=1, keepdims=True)
    if not shifted_NK.any():
        return 1.0
    label_N = shifted_NK[np.arange(len(labels_N)), labels_N]

    def slope(temperature: float) -> float:
        return float(((probabilities(shifted_NK, temperature) * shifted_NK).sum(axis=1) - label_N).mean())

    if slope(COLDEST) <= 0:
        return COLDEST
    if slope(HOTTEST) >= 0:
        return HOTTEST
    low, high = np.log(COLDEST), np.log(HOTTEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(float(np.exp(middle))) > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def probabilities(logits_NK: ArrayLike, temperature: float = 1.0) -> NDArray[np.float64]:
    """Return softmax(logits / temperature) [N, K]."""
    scaled_NK = np.asarray(logits_NK, dtype=np.float64) / temperature
    scaled_NK = np.exp(scaled_NK - scaled_NK.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(scaled_NK / scaled_NK.sum(axis=1, keepdims=True))


def calibration_error(logits_NK: ArrayLike, labels_N: ArrayLike, temperature: float) -> float:
    """Return the expected calibration error of logits divided by a temperature.

    Raises:
        DataError: there are no images.
    """
    likely_NK = probabilities(logits_NK, temperature)
    correct_N = np.asarray(logits_NK).argmax(axis=1) == np.asarray(labels_N)
    return expected_calibration_error(likely_NK.max(axis=1, initial=0), correct_N)
