"""ALIA's filters of edits and CLIPScore, as rules over scores and probabilities; no torch.

Source: ALIA (arXiv 2305.16289), section on filtering; thresholds from confident learning (arXiv 1911.00068, cleanlab): the
threshold of a class is the mean probability of the class over held-out images of the class. ALIA's released code
(filtering/filter.py at ce01c94) departs from that: see `confidence_filter`.

Shapes: N images, K classes, P positive and M negative texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rule = Literal["predicted", "alia"]
"""Values of `filter.rule`."""
UNREADABLE = "unreadable"
"""Verdict on an edit that cannot be scored; it is never kept."""


class ConfidenceFlags(NamedTuple):
    """Flags of the confidence filter per edit.

    Attributes:
        unchanged_N: predicted as the class of the source, confidently: the edit adds nothing.
        corrupted_N: predicted as another class, confidently: the edit no longer shows its class.
    """

    unchanged_N: NDArray[np.bool_]
    corrupted_N: NDArray[np.bool_]


class Agreement(NamedTuple):
    """Precision and recall of flags.

    Attributes:
        precision: fraction of the flagged edits that are flagged rightly; None if nothing is flagged.
        recall: fraction of the edits to flag that are flagged; None if there are none.
        num_flagged: number of flagged edits.
        num_true: number of edits to flag.
    """

    precision: float | None
    recall: float | None
    num_flagged: int
    num_true: int


def clip_score(cosine_N: ArrayLike) -> NDArray[np.float64]:
    """Return score_N: 2.5 max(cosine, 0), 0..2.5, of images and texts (CLIPScore, arXiv 2104.08718, section 3); NaN stays NaN.

    Args:
        cosine_N: cosine between the embeddings of an image and of its text, -1..1.
    """
    return 2.5 * np.maximum(np.asarray(cosine_N, dtype=np.float64), 0.0)


def semantic_log_odds(positive_NP: ArrayLike, negative_NM: ArrayLike) -> NDArray[np.float64]:
    """Return log_odds_N of the best positive against the best negative text; an edit passes from 0 upwards.

    Args:
        positive_NP: logits of the texts that an edit should show.
        negative_NM: logits of the texts that an edit should not show.
    """
    positive_N = np.asarray(positive_NP, dtype=np.float64).max(axis=1)
    return positive_N - np.asarray(negative_NM, dtype=np.float64).max(axis=1)


def confident_thresholds(probabilities_NK: ArrayLike, labels_N: ArrayLike) -> NDArray[np.float64]:
    """Return threshold_K: the mean probability of class k over the held-out images of class k.

    The threshold of a class without held-out images is infinity: no prediction of that class is confident.
    """
    probabilities_NK, labels_N = np.asarray(probabilities_NK, dtype=np.float64), np.asarray(labels_N)
    num_classes = probabilities_NK.shape[1]
    return np.array([probabilities_NK[labels_N == k, k].mean() if (labels_N == k).any() else np.inf for k in range(num_classes)])


def confidence_filter(
    probabilities_NK: ArrayLike, labels_N: ArrayLike, threshold_K: ArrayLike, *, rule: Rule = "predicted"
) -> ConfidenceFlags:
    """Flag edits by the predictions of a model that was trained on the unedited data.

    Args:
        probabilities_NK: class probabilities of the edits; a row of NaN is never flagged.
        labels_N: classes of the sources.
        threshold_K: thresholds from `confident_thresholds`.
        rule: `predicted`: confident is a probability of at least the threshold of the predicted class; `alia`: one above the
            threshold of the source's class, as in ALIA's released code.
    """
    probabilities_NK, labels_N = np.asarray(probabilities_NK, dtype=np.float64), np.asarray(labels_N)
    predicted_N = probabilities_NK.argmax(axis=1)
    confidence_N = probabilities_NK[np.arange(len(labels_N)), predicted_N]
    threshold_N = applied_thresholds(threshold_K, labels_N, predicted_N, rule)
    confident_N = confidence_N > threshold_N if rule == "alia" else confidence_N >= threshold_N
    same_N = predicted_N == labels_N
    return ConfidenceFlags(confident_N & same_N, confident_N & ~same_N)


def applied_thresholds(threshold_K: ArrayLike, labels_N: ArrayLike, predicted_N: ArrayLike, rule: Rule) -> NDArray[np.float64]:
    """Return the threshold that every edit is compared with; arguments as those of `confidence_filter`."""
    classes_N = np.asarray(labels_N if rule == "alia" else predicted_N, dtype=np.int64)
    return np.asarray(threshold_K, dtype=np.float64)[classes_N]


def keep(flags: Mapping[str, NDArray[np.bool_]], drop: Collection[str]) -> NDArray[np.bool_]:
    """Return keep_N: True for a readable edit without a verdict in `drop`.

    Args:
        flags: verdict -> flagged_N, at least one; verdicts of filters that were not run are absent.
        drop: verdicts that drop an edit.
    """
    dropping = [flagged_N for name, flagged_N in flags.items() if name in drop or name == UNREADABLE]
    num_edits = len(next(iter(flags.values())))
    return ~np.logical_or.reduce(dropping) if dropping else np.ones(num_edits, dtype=bool)


def removal_table(
    groups: Sequence[str], flags: Mapping[str, NDArray[np.bool_]], keep_N: NDArray[np.bool_], order: Iterable[str] = ()
) -> dict[str, dict[str, int]]:
    """Count edits, verdicts and kept edits per group.

    Args:
        groups: group of every edit: its class or its domain.
        flags: verdict -> flagged_N. An edit may have several verdicts, so a row's numbers need not add up.
        keep_N: result of `keep`.
        order: groups that come first, in this order; groups without an edit are left out.

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
    """Compare the flags of a filter with the truth.

    Args:
        flagged_N: whether the filter flags an edit.
        truth_N: whether it should.
    """
    flagged_N, truth_N = np.asarray(flagged_N, dtype=bool), np.asarray(truth_N, dtype=bool)
    assert flagged_N.shape == truth_N.shape, (flagged_N.shape, truth_N.shape)
    num_flagged, num_true, both = int(flagged_N.sum()), int(truth_N.sum()), int((flagged_N & truth_N).sum())
    return Agreement(both / num_flagged if num_flagged else None, both / num_true if num_true else None, num_flagged, num_true)
