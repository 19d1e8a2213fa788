"""Metrics of the ranking by class probabilities: area under the ROC curve, average precision.

Both are one against the rest, as medmnist's evaluator and the literature on tables have them: of two classes the second one is
the positive class, of more the mean over the classes that can be ranked.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from flyp_saflex.evaluation.metrics import Scores


def auroc_of(scores: Scores) -> float | None:
    """Return the area under the ROC curve; None if the labels are of one class."""
    from sklearn.metrics import roc_auc_score

    return _one_against_rest(scores, roc_auc_score)


def average_precision_of(scores: Scores) -> float | None:
    """Return the average precision; None if the labels are of one class."""
    from sklearn.metrics import average_precision_score

    return _one_against_rest(scores, average_precision_score)


def _one_against_rest(scores: Scores, score: Callable[[NDArray[np.bool_], NDArray[np.float64]], float]) -> float | None:
    probabilities_NK = softmax(scores.logits_NK, axis=1)
    num_classes = probabilities_NK.shape[1]
    found = []
    for label in (1,) if num_classes == 2 else range(num_classes):
        is_label_N = scores.labels_N == label
        if is_label_N.any() and not is_label_N.all():
            # Of two classes the difference of logits: softmax gives equal numbers where a probability is 1 to the last digit.
            margin_N = scores.logits_NK[:, 1] - scores.logits_NK[:, 0] if num_classes == 2 else probabilities_NK[:, label]
            found.append(float(score(is_label_N, margin_N)))
    return float(np.mean(found)) if found else None
