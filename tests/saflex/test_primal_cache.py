"""Products of a pass serve the derivative of the same function, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from flyp_saflex.saflex.jvp import directional_derivative
from flyp_saflex.saflex.primal_cache import Products

ROWS, LAST = 5, 2


class Net(nn.Module):
    """Convolution and linear layers; one is used twice, one has no bias, the last is cut in parts as attention does."""

    def __init__(self, in_place=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.twice = nn.Linear(4, 4, bias=False)
        self.activation = nn.ReLU(inplace=in_place)
        self.last = nn.Linear(4, 6)

    def forward(self, images):
        hidden = self.conv(images).mean(dim=(2, 3))
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        both = (
            F.linear(hidden, self.last.weight[:3], self.last.bias[:3]),
            F.linear(hidden, self.last.weight[3:], self.last.bias[3:]),
        )
        return torch.cat([self.activation(part) for part in both], dim=1)


def problem(**options):
    torch.manual_seed(0)
    net = Net(**options).double()
    images = torch.randn(ROWS, 3, 8, 8).double()
    parameters = dict(net.named_parameters())
    return net, images, parameters, {name: torch.randn_like(value) for name, value in parameters.items()}


def derivative(net, images, parameters, direction, products=None):
    return directional_derivative(lambda p: functional_call(net, p, (images,)), parameters, direction, products=products)


@pytest.mark.parametrize("first", [0, ROWS - LAST])
@pytest.mark.parametrize("names", ["all", "last"])
def test_the_derivative_is_the_same(first, names):
    net, images, parameters, direction = problem()
    if names != "all":
        parameters = {name: value for name, value in parameters.items() if name.startswith(names)}
        direction = {name: direction[name] for name in parameters}
    products = Products(parameters.values(), ROWS)
    with products.recording():
        out = net(images)
    left = sum(map(len, products._kept.values()))
    assert left == (5 if names == "all" else 2)
    values, tangent = derivative(net, images[first:], parameters, direction, products)
    assert not any(products._kept.values()), "every result is used once"
    torch.testing.assert_close((values, tangent), derivative(net, images[first:], parameters, direction), rtol=0, atol=1e-14)
    out.sum().backward()  # what was kept has no part in the graph, and left it alone


def test_kept_values_are_those_that_are_used():
    """Falsified results are seen in the derivative: it really takes them."""
    net, images, parameters, direction = problem()
    products = Products(parameters.values(), ROWS)
    with products.recording():
        net(images)
    for kept in products._kept.values():
        kept[0] = (kept[0][0] + 1, kept[0][1])
    values, _ = derivative(net, images, parameters, direction, products)
    assert not torch.allclose(values, net(images))


@pytest.mark.parametrize("odd", ["changed in place", "fewer rows were seen", "another precision", "another net"])
def test_what_may_differ_is_computed(odd):
    net, images, parameters, direction = problem(in_place=odd == "changed in place")
    products = Products(parameters.values(), ROWS)
    with products.recording():
        if odd == "fewer rows were seen":
            net(images[:LAST] + 1)
        elif odd == "another precision":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                net.float()(images.float() + 1)
            net.double()
        elif odd == "another net":
            problem()[0](images + 1)
        else:
            net(images)
    parameters = dict(net.named_parameters())
    found = derivative(net, images, parameters, direction, products)
    torch.testing.assert_close(found, derivative(net, images, parameters, direction), rtol=0, atol=1e-14)
