"""Objectives: gains are the derivative of the loss, and the loss is linear in the mass of labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flyp_saflex.saflex.jvp import forward_mode
from flyp_saflex.saflex.objectives import CONTRASTIVE, CROSS_ENTROPY, SIGMOID
from flyp_saflex.tables import METHODS, OBJECTIVES


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gains_are_the_derivative_of_the_loss_of_each_row_and_label(name):
    objective = OBJECTIVES[name]
    logits_AC, tangent_AC = rows()
    found = objective.gains(logits_AC, tangent_AC)
    # A single row is its own whole column: of the contrastive loss the image term is left, a half of it (Eq. 13).
    terms = 2 if objective is CONTRASTIVE else 1
    for row in range(6):
        for label in range(4):
            assignment_1C = F.one_hot(torch.tensor([label]), 4).double()
            loss = lambda z, y=assignment_1C: objective.loss(z, y, torch.ones(1, dtype=torch.float64))  # noqa: E731
            few = slice(row, row + 1)
            with forward_mode():
                _, derivative = torch.func.jvp(loss, (logits_AC[few],), (tangent_AC[few],))
            torch.testing.assert_close(found[row, label], terms * derivative)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_linear_in_labels(name):
    logits_NC, raw_NC = rows(1)
    first, second = raw_NC.softmax(dim=1), raw_NC.flip(0).softmax(dim=1)
    ones_N = torch.ones(6, dtype=torch.float64)
    loss = OBJECTIVES[name].loss
    mixed = loss(logits_NC, 0.3 * first + 0.7 * second, ones_N)
    torch.testing.assert_close(mixed, 0.3 * loss(logits_NC, first, ones_N) + 0.7 * loss(logits_NC, second, ones_N))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_of_single_rows_are_the_loss_of_each_row_alone(name):
    objective = OBJECTIVES[name]
    logits_NC, raw_NC = rows(2)
    labels_NC = raw_NC.softmax(dim=1)
    # Of a single row the contrastive loss has the image term only, a half of it (Eq. 13).
    terms = 2 if objective is CONTRASTIVE else 1
    for row, found in enumerate(objective.row_losses(logits_NC, labels_NC)):
        few = slice(row, row + 1)
        alone = objective.loss(logits_NC[few], labels_NC[few], torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(found, terms * alone)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_bias_on_all_logits_changes_what_is_no_softmax(name):
    objective = OBJECTIVES[name]
    logits_NC, raw_NC = rows(3)
    labels_NC, ones_N = raw_NC.softmax(dim=1), torch.ones(6, dtype=torch.float64)
    for value in (
        lambda z: objective.loss(z, labels_NC, ones_N),
        lambda z: objective.gains(z, raw_NC),
        lambda z: objective.row_losses(z, labels_NC),
    ):
        assert torch.allclose(value(logits_NC - 3), value(logits_NC), rtol=1e-9) == objective.is_softmax


def test_flyp_is_over_captions_and_cross_entropy_over_classes():
    assert (CONTRASTIVE.over, SIGMOID.over, CROSS_ENTROPY.over) == ("captions", "captions", "classes")
    assert {name: OBJECTIVES[method.objective].over for name, method in METHODS.items()} == {
        "flyp": "captions",
        "ce-text": "classes",
        "ce-linear": "classes",
        "linear-probe": "classes",
        "lp-ft": "classes",
        "mlp": "classes",
        "image-classifier": "classes",
        "contrastive-images": "views",
    }
