"""Mean, spread and paired intervals against numbers by hand and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from flyp_saflex.evaluation.statistics import paired_difference, summarise


def test_summary_by_hand():
    summary = summarise([0.5, 0.6, 0.7])
    assert summary.mean == pytest.approx(0.6)
    assert summary.deviation == pytest.approx(0.1)  # sample deviation: sqrt(0.02 / 2)
    assert summary.error == pytest.approx(0.1 / math.sqrt(3))
    assert summary.n == 3


def test_one_value_has_no_spread_and_none_is_an_error():
    summary = summarise([0.25])
    assert (summary.mean, summary.deviation, summary.error, summary.n) == (0.25, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_paired_interval_is_scipys():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.6, 0.1, 6), generator.normal(0.5, 0.1, 6)
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (
        pytest.approx((a - b).mean()),
        pytest.approx(interval.low),
        pytest.approx(interval.high),
        6,
    )


def test_only_shared_seeds_are_paired():
    found = paired_difference({0: 0.9, 1: 0.8, 7: 0.0}, {1: 0.5, 0: 0.7, 9: 1.0})
    assert found is not None
    assert found.mean == pytest.approx((0.2 + 0.3) / 2)
    # two pairs, 0.2 and 0.3: standard error 0.05, t quantile 12.706 with one degree of freedom
    assert found.low == pytest.approx(0.25 - 12.7062 * 0.05, abs=1e-4)
    assert found.high == pytest.approx(0.25 + 12.7062 * 0.05, abs=1e-4)
    assert found.n == 2


def test_one_pair_has_no_interval_and_no_pair_has_no_difference():
    found = paired_difference({3: 0.75}, {3: 0.5, 4: 0.1})
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (0.25, None, None, 1)
    assert paired_difference({1: 0.5}, {2: 0.5}) is None
