"""Likely label errors of a labelled set by confident learning (Northcutt et al., arXiv 1911.00068), through cleanlab.

The probabilities must be held out: a model that was trained on an image with a wrong label has learned that label.

Shapes: N images, K classes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flyp_saflex.errors import DataError
from flyp_saflex.extras import require


def check_cleanlab() -> None:
    """Check that cleanlab is installed.

    Raises:
        ConfigError: it is not.
    """
    require("--issues", "cleanlab")


def label_issues(labels_N: ArrayLike, probabilities_NK: ArrayLike) -> NDArray[np.int64]:
    """Return the positions of images whose label is likely wrong, the least likely label first.

    Args:
        labels_N: class indices as given; some classes may be without images.
        probabilities_NK: held-out probabilities.

    Raises:
        ConfigError: cleanlab is not installed.
        DataError: fewer than two classes among the labels: nothing to confuse.
    """
    check_cleanlab()
    from cleanlab.filter import find_label_issues

    labels_N, probabilities_NK = np.asarray(labels_N, dtype=np.int64), np.asarray(probabilities_NK, dtype=np.float64)
    if len(np.unique(labels_N)) < 2:
        raise DataError(
            f"--issues: {len(labels_N)} labelled images of {len(np.unique(labels_N))} class, expected two classes at least; "
            "give a labelled set with more classes, or leave --issues out"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "May not flag all label issues in class", UserWarning)  # `lonely_classes` tells it
        found = find_label_issues(labels_N, probabilities_NK, return_indices_ranked_by="self_confidence", n_jobs=1)
    return np.asarray(found, dtype=np.int64)


def lonely_classes(labels_N: Sequence[int], class_names: Sequence[str]) -> list[str]:
    """Return the names of classes with a single labelled image: confident learning passes no judgement on these."""
    counts = Counter(labels_N)
    return [name for k, name in enumerate(class_names) if counts[k] == 1]


def issue_columns(
    issues: NDArray[np.int64],
    names: Sequence[str],
    labels_N: Sequence[int],
    probabilities_NK: NDArray[np.float64],
    class_names: Sequence[str],
) -> dict[str, list[Any]]:
    """Return the columns of the table of likely label errors.

    Args:
        issues: positions, in the order of the rows.
        names: of the N images.
        labels_N: class indices as given.
        probabilities_NK: held-out probabilities.
        class_names: by index.
    """
    best_N = probabilities_NK.argmax(axis=1)
    rows = [int(i) for i in issues]
    return {
        "image": [names[i] for i in rows],
        "label": [class_names[labels_N[i]] for i in rows],
        "probability": [float(probabilities_NK[i, labels_N[i]]) for i in rows],
        "suggested": [class_names[best_N[i]] for i in rows],
        "suggested_probability": [float(probabilities_NK[i, best_N[i]]) for i in rows],
    }
