"""Terms beside the objective: each formula by hand or against another implementation."""

import math

import pytest
import torch
import torch.nn.functional as F

from flyp_saflex.saflex.extra_losses import SUPCON_TEMPERATURE, divergence, feature_distance, supcon
from flyp_saflex.tables import EXTRA_LOSSES


def test_the_feature_distance_is_that_of_directions():
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [5.0, 0.0]])
    assert float(feature_distance(student, teacher)) == pytest.approx((0.6**2 + 0.2**2 + 0) / 2)
    assert float(feature_distance(student[:0], teacher[:0])) == 0


def test_the_divergence_by_hand_and_zero_of_itself():
    teacher, student = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(divergence(student, teacher)) == pytest.approx(expected)
    assert float(divergence(teacher, teacher)) == 0


def supcon_by_loops(images, labels, weights):
    images, total, mass = F.normalize(images, dim=1), 0.0, 0.0
    for i in range(len(images)):
        others = [a for a in range(len(images)) if a != i and weights[a] > 0]
        positives = [p for p in others if labels[p] == labels[i]]
        if weights[i] > 0 and positives:
            scores = {a: float(images[i] @ images[a]) / SUPCON_TEMPERATURE for a in others}
            normaliser = math.log(sum(math.exp(score) for score in scores.values()))
            total += float(weights[i]) * -sum(scores[p] - normaliser for p in positives) / len(positives)
            mass += float(weights[i])
    return total / mass


def test_supcon_equals_the_loops_with_weights_and_lonely_rows():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(7, 4, generator=generator), torch.tensor([0, 1, 0, 1, 2, 0, 1])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.5, 1.0])
    found = supcon(images.requires_grad_(), None, F.one_hot(labels, 3), weights)
    assert float(found.detach()) == pytest.approx(supcon_by_loops(images.detach(), labels, weights), rel=1e-5)
    found.backward()
    assert images.grad.isfinite().all()
    assert not images.grad[2].any(), "a dropped row has no gradient"


def test_supcon_without_a_pair_is_zero():
    assert float(supcon(torch.eye(3), None, torch.eye(3), torch.ones(3))) == 0


def test_the_class_loss_is_cross_entropy():
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1, 0])
    found = EXTRA_LOSSES["cross-entropy"].loss(torch.empty(5, 0), logits, F.one_hot(labels, 3), torch.ones(5))
    assert torch.equal(found, F.cross_entropy(logits, labels))
