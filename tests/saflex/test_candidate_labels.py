"""Candidate labels solve the restricted program; what the two readings of the paper's gains imply."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from gain_rows import random_gains

from flyp_saflex.saflex.closed_form import gains, soft_labels
from flyp_saflex.saflex.saflex import Saflex

RETAINED = 1e6  # a penalty that retains labels, see the robust preset


# --- candidate labels, the restricted program


def test_all_labels_as_candidates_change_no_bit():
    pi, upstream = random_gains(rows=40)
    u = F.one_hot(upstream, 5).double()
    for labels in (u, 0.25 * u + 0.75 * u.flip(0)):
        for penalty in (0.0, 1.0, RETAINED, math.inf):
            free = soft_labels(pi, labels, 0.1, penalty, torch.ones(40, 5, dtype=torch.bool))
            assert torch.equal(free, soft_labels(pi, labels, 0.1, penalty))


def test_the_own_label_as_only_candidate_retains_it():
    pi, upstream = random_gains(rows=40)
    u = F.one_hot(upstream, 5).double()
    for penalty in (0.0, 1.0, math.inf):
        assert torch.equal(soft_labels(pi, u, 0.1, penalty, u.bool()), u)
    assert torch.equal(soft_labels(pi, u, 0.1, 0.0, torch.zeros(40, 5, dtype=torch.bool)), u)  # no candidate at all


def test_labels_among_candidates_are_the_written_softmax_of_those():
    pi, upstream = random_gains(rows=40)
    u = F.one_hot(upstream, 5).double()
    candidates = torch.rand(40, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    candidates[:, 0] = True
    for penalty in (0.0, 0.5, 3.0):
        expected = ((pi / 10 + penalty * u) / 0.7).masked_fill(~candidates, -torch.inf).softmax(1)
        torch.testing.assert_close(soft_labels(pi / 10, u, 0.7, penalty, candidates), expected, rtol=1e-12, atol=1e-15)
    retained = soft_labels(pi, u, 0.1, math.inf, candidates)
    assert retained.isfinite().all()
    kept = candidates.gather(1, upstream[:, None])[:, 0]
    assert torch.equal(retained[kept], u[kept])


def test_no_labels_among_candidates_beat_the_cold_ones():
    pi, upstream = random_gains(rows=6)
    candidates = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    candidates[torch.arange(6), upstream] = True
    labels = soft_labels(pi, F.one_hot(upstream, 5).double(), 1e-6, 0.0, candidates)
    value = (labels * pi).sum()
    # The program is linear, so its maximum is at a corner: every choice of one candidate per row is tried.
    corners = itertools.product(*(row.nonzero()[:, 0].tolist() for row in candidates))
    best = max(sum(float(pi[row, label]) for row, label in enumerate(choice)) for choice in corners)
    assert float(value) == pytest.approx(best, abs=1e-9)


# --- readings of the paper: f as log-probabilities and as probabilities


def test_gains_of_log_probabilities_average_to_zero_under_the_models_own_prediction():
    generator = torch.Generator().manual_seed(0)
    for num_labels in (2, 5):
        logits, tangent = (torch.randn(30, num_labels, generator=generator, dtype=torch.float64) for _ in range(2))
        average = (logits.softmax(1) * gains(logits, 30 * tangent)).sum(1)
        torch.testing.assert_close(average, torch.zeros(30).double(), atol=1e-12, rtol=0)


def test_with_two_labels_the_sum_rule_keeps_a_row_exactly_when_its_label_is_the_less_likely_one():
    generator = torch.Generator().manual_seed(0)
    logits, tangent = (torch.randn(200, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    upstream = torch.randint(2, (200,), generator=generator)
    saflex = Saflex(preset="paper", weight_rule="sum", temperature=1e-6, penalty=0.0)
    weights, labels = saflex.solve(gains(logits, tangent), upstream)
    assert torch.equal(weights > 0, labels.argmax(1) == logits.argmin(1))
    assert 0 < (weights > 0).sum() < 200


def test_gains_of_probabilities_sum_to_zero_so_the_sum_rule_keeps_every_row():
    generator = torch.Generator().manual_seed(0)
    logits, tangent = (torch.randn(30, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    _, derivative = torch.autograd.functional.jvp(lambda z: z.softmax(1), logits, tangent)
    of_probabilities = logits.softmax(1) * gains(logits, tangent)
    torch.testing.assert_close(of_probabilities, -derivative)  # Eq. (9) with f the probability of the label
    assert of_probabilities.sum(1).abs().max() < 1e-12
