"""L2-SP: the penalty by hand, of trained parameters only."""

import pytest
import torch
from torch import nn

from flyp_saflex.training.anchor import Anchor


def test_the_penalty_and_its_gradient_by_hand():
    network = nn.Linear(2, 1)
    anchor = Anchor(network, 0.5)
    assert float(anchor.penalty().detach()) == 0
    with torch.no_grad():
        network.weight += torch.tensor([[1.0, -2.0]])
        network.bias += 3.0
    anchor.penalty().backward()
    assert float(anchor.penalty().detach()) == pytest.approx(0.25 * (1 + 4 + 9))
    torch.testing.assert_close(network.weight.grad, 0.5 * torch.tensor([[1.0, -2.0]]))
    network.bias.requires_grad_(False)
    assert float(anchor.penalty().detach()) == pytest.approx(0.25 * (1 + 4))
