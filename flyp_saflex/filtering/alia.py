"""ALIA's filters of edits, as rules over scores and probabilities (floor 2; numpy).

Source: ALIA (arXiv 2305.16289), section on filtering; thresholds after confident learning (arXiv 1911.00068, cleanlab): the
threshold of a class is the mean probability that held-out images of the class get for it.

Shapes: N images, K classes, P positive and M negative texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNREADABLE = "unreadable"
"""The verdict on an edit that cannot be scored: never kept."""


class ConfidenceFlags(NamedTuple):
    """Which edits the confidence filter flags.

    Attributes:
        unchanged_N: predicted as the class of their source with at least that class's threshold: too easy to add anything.
        corrupted_N: predicted as another class with at least that class's threshold: the class was edited away.
    """

    unchanged_N: NDArray[np.bool_]
    corrupted_N: NDArray[np.bool_]


class Agreement(NamedTuple):
    """How well flags meet the truth.

    Attributes:
        precision: part of the flagged that is true; None if nothing is flagged.
        recall: part of the true that is flagged; None if nothing is true.
        num_flagged: how many are flagged.
        num_true: how many are true.
    """

    precision: float | None
    recall: float | None
    num_flagged: int
    num_true: int


def semantic_log_odds(positive_NP: ArrayLike, negative_NM: ArrayLike) -> NDArray[np.float64]:
    """Return log_odds_N of the best positive against the best negative text; the semantic filter passes 0 and above.

    Args:
        positive_NP: logits of the texts that an edit should show.
        negative_NM: logits of those that it should not.
    """
    positive_N = np.asarray(positive_NP, dtype=np.float64).max(axis=1)
    return positive_N - np.asarray(negative_NM, dtype=np.float64).max(axis=1)


def confident_thresholds(probabilities_NK: ArrayLike, labels_N: ArrayLike) -> NDArray[np.float64]:
    """Return threshold_K: the mean probability of class k over the held-out images of class k.

    A class without any held-out image gets infinity: nothing is confidently of that class.
    """
    probabilities_NK, labels_N = np.asarray(probabilities_NK, dtype=np.float64), np.asarray(labels_N)
    num_classes = probabilities_NK.shape[1]
    return np.array([probabilities_NK[labels_N == k, k].mean() if (labels_N == k).any() else np.inf for k in range(num_classes)])


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


def keep(flags: Mapping[str, NDArray[np.bool_]], drop: Collection[str]) -> NDArray[np.bool_]:
    """Return keep_N: the edits without any of the verdicts in `drop`, and readable.

    Args:
        flags: verdict -> flagged_N; at least one. Verdicts of filters that were not run are absent.
        drop: verdicts that drop an edit.
    """
    dropping = [flagged_N for name, flagged_N in flags.items() if name in drop or name == UNREADABLE]
    num_edits = len(next(iter(flags.values())))
    return ~np.logical_or.reduce(dropping) if dropping else np.ones(num_edits, dtype=bool)


def removal_table(
    groups: Sequence[str], flags: Mapping[str, NDArray[np.bool_]], keep_N: NDArray[np.bool_], order: Iterable[str] = ()
) -> dict[str, dict[str, int]]:
    """Count edits, every verdict and what is kept, by group.

    Args:
        groups: group of every edit, its class or its domain.
        flags: verdict -> flagged_N. An edit may have several verdicts, so a row's numbers need not add up.
        keep_N: of `keep`.
        order: groups that come first, in this order; those without an edit are left out.

    Returns:
        group -> {"edits": n, verdict: n for each of `flags`, "kept": n}.
    """
    group_N = np.asarray(groups, dtype=object)
    table = {}
    for group in dict.fromkeys((*order, *groups)):
        here_N = group_N == group
        if here_N.any():
            counts = {name: int(flagged_N[here_N].sum()) for name, flagged_N in flags.items()}
            table[group] = {"edits": int(here_N.sum()), **counts, "kept": int(keep_N[here_N].sum())}
    return table


def precision_recall(flagged_N: ArrayLike, truth_N: ArrayLike) -> Agreement:
    """Compare what a filter flags with what is true of the edits.

    Args:
        flagged_N: whether the filter flags an edit.
        truth_N: whether it should.
    """
    flagged_N, truth_N = np.asarray(flagged_N, dtype=bool), np.asarray(truth_N, dtype=bool)
    assert flagged_N.shape == truth_N.shape, (flagged_N.shape, truth_N.shape)
    num_flagged, num_true, both = int(flagged_N.sum()), int(truth_N.sum()), int((flagged_N & truth_N).sum())
    return Agreement(both / num_flagged if num_flagged else None, both / num_true if num_true else None, num_flagged, num_true)
