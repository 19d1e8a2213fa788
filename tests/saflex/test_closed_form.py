"""Labels are the softened solution of the paper's program, Eq. (10); gains have the properties of Eq. (9)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from gain_rows import random_gains

from flyp_saflex.saflex.closed_form import gains, renormalise, soft_labels

RETAINED = 1e6  # a penalty that retains labels, see the robust preset


def test_labels_are_the_written_softmax():
    pi, upstream = random_gains()
    u = F.one_hot(upstream, 5).double()
    for penalty in (0.0, 0.5, 3.0):
        expected = ((pi / 10 + penalty * u) / 0.7).softmax(1)
        torch.testing.assert_close(soft_labels(pi / 10, u, 0.7, penalty), expected, rtol=1e-12, atol=1e-15)


def test_cold_labels_are_the_hard_solution():
    pi, upstream = random_gains()
    labels = soft_labels(pi, F.one_hot(upstream, 5).double(), 1e-6, 0.0)
    assert torch.equal(labels, F.one_hot(pi.argmax(1), 5).double())


@pytest.mark.parametrize("penalty", [RETAINED, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_penalty_gives_the_upstream_labels_to_the_last_bit(penalty, dtype):
    pi, upstream = random_gains()
    u = F.one_hot(upstream, 5).to(dtype)
    mixed = 0.25 * u + 0.75 * u.flip(0)  # Mixup's
    for labels in (u, mixed):
        assert torch.equal(soft_labels(pi.to(dtype), labels, 0.1, penalty), labels)


def test_soft_upstream_labels_are_the_mean_over_their_classes():
    pi, _ = random_gains(rows=3)
    u = torch.tensor([[0.6, 0.4, 0, 0, 0], [0, 0, 1, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2]]).double()
    classes = torch.eye(5).double()
    expected = sum(u[:, k, None] * soft_labels(pi / 20, classes[k].expand(3, 5), 0.5, 1.3) for k in range(5))
    torch.testing.assert_close(soft_labels(pi / 20, u, 0.5, 1.3), expected)


@pytest.mark.parametrize("temperature", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("penalty", [0.0, 1e-9, 1.0, 50.0])
def test_labels_are_on_the_simplex_at_every_setting(temperature, penalty):
    pi, upstream = random_gains()
    labels = soft_labels(pi.float() * 10, F.one_hot(upstream, 5).float(), temperature, penalty)
    torch.testing.assert_close(labels.sum(1), torch.ones(12), rtol=0, atol=1e-6)
    assert (labels >= 0).all()


def test_weights_have_a_mean_of_one_over_kept_rows():
    assert renormalise(torch.tensor([0.5, 0.0, 1.5, 2.0])).tolist() == [0.375, 0.0, 1.125, 1.5]
    assert torch.equal(renormalise(torch.zeros(3)), torch.zeros(3))


def test_facts_about_gains():
    torch.manual_seed(0)
    logits, tangent = torch.randn(50, 7).double(), torch.randn(50, 7).double()
    pi, p = gains(logits, tangent), logits.softmax(1)
    torch.testing.assert_close((p * pi).sum(1), torch.zeros(50).double(), rtol=0, atol=1e-14)
    assert (pi.max(1).values >= 0).all()
    uniform_gain = -(tangent.mean(1) - (p * tangent).sum(1))  # of y = 1/K, by linearity of Eq. (7)
    torch.testing.assert_close(pi.sum(1), 7 * uniform_gain)
    torch.testing.assert_close(gains(logits + 3, tangent - 5), pi)  # a shift of the logits is no change of the softmax


def test_a_nan_stays_in_its_row():
    logits, tangent = torch.zeros(2, 3), torch.ones(2, 3)
    tangent[1, 0] = torch.nan
    pi = gains(logits, tangent)
    assert pi[0].isfinite().all()
    assert pi[1].isnan().all()
