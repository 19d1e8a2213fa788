"""ALIA's filters of edits, as rules over a classifier's probabilities (floor 2; numpy).

Source: ALIA (arXiv 2305.16289), section on filtering; thresholds after confident learning (arXiv 1911.00068): the
threshold of a class is the mean probability that held-out images of the class get for it.

Shapes: N images, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class ConfidenceFlags(NamedTuple):
    """Which edits the confidence filter flags.

    Attributes:
        unchanged_N: predicted as the class of their source with at least that class's threshold: too easy to add anything.
        corrupted_N: predicted as another class with at least that class's threshold: the class was edited away.
    """

    unchanged_N: NDArray[np.bool_]
    corrupted_N: NDArray[np.bool_]


def confident_thresholds(probabilities_NK: ArrayLike, labels_N: ArrayLike) -> NDArray[np.float64]:
    """Return threshold_K: the mean probability of class k over the held-out images of class k; 1 for a class without any."""
    probabilities_NK, labels_N = np.asarray(probabilities_NK, dtype=np.float64), np.asarray(labels_N)
    num_classes = probabilities_NK.shape[1]
    return np.array([probabilities_NK[labels_N == k, k].mean() if (labels_N == k).any() else 1.0 for k in range(num_classes)])


def confidence_filter(probabilities_NK: ArrayLike, labels_N: ArrayLike, threshold_K: ArrayLike) -> ConfidenceFlags:
    """Flag edits by a model that was trained on the unedited data.

    Args:
        probabilities_NK: the model's probabilities of the edits.
        labels_N: the classes that they came with.
        threshold_K: of `confident_thresholds`.
    """
    probabilities_NK, labels_N = np.asarray(probabilities_NK, dtype=np.float64), np.asarray(labels_N)
    predicted_N = probabilities_NK.argmax(axis=1)
    confident_N = probabilities_NK[np.arange(len(labels_N)), predicted_N] >= np.asarray(threshold_K)[predicted_N]
    same_N = predicted_N == labels_N
    return ConfidenceFlags(confident_N & same_N, confident_N & ~same_N)
