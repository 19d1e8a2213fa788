"""The plain network: logits by hand, parameter groups, and the scopes of SAFLEX of a trunk with a linear head."""

import pytest
import torch
from torch import nn

from flyp_saflex.tasks.network import Network, Outputs, parameter_groups


def outputs(images_ND, columns_CD, scale=1.0, bias=0.0):
    return Outputs(images_ND, images_ND, columns_CD, torch.tensor(scale), torch.as_tensor(bias))


def small(**options):
    return Network(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), head=nn.Linear(4, 3), **options)


def test_logits_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(outputs(features, weight, scale=10.0).logits(), torch.tensor([[10.0, 0, 10], [6, 8, 14]]))
    biased = outputs(features, weight, bias=torch.tensor([0.5, 0.0, -1.0])).logits()
    torch.testing.assert_close(biased, torch.tensor([[1.5, 0, 0], [1.1, 0.8, 0.4]]))


def test_logits_of_other_rows_and_of_chosen_columns():
    out = outputs(torch.randn(2, 4), torch.randn(3, 4), scale=2.0)
    others = torch.randn(5, 4)
    torch.testing.assert_close(out.logits(others), 2 * others @ out.columns_CD.T)
    torch.testing.assert_close(out.logits(columns_C=torch.tensor([2, 2, 0])), out.logits()[:, [2, 2, 0]])
    torch.testing.assert_close(out.rows_from(1).logits(), out.logits()[1:])


def test_logits_are_float32_under_autocast():
    out = outputs(torch.randn(2, 4), torch.randn(3, 4))
    expected = out.logits()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(out.logits(), expected)


def test_a_trunk_with_a_linear_head_is_the_plain_classifier():
    network = small().eval()
    inputs = torch.randn(6, 5)
    expected = network.head(network.trunk(inputs))
    torch.testing.assert_close(network(inputs).logits(), expected)
    pooled_NF = network.pool(network.lower(inputs))
    torch.testing.assert_close(network(pooled_NF, from_pooled=True).logits(), expected)


def test_head_scope_is_what_lies_behind_the_pooled_features():
    network = small()
    assert set(network.parameters_in("head")) == {"head.weight", "head.bias"}
    assert set(network.parameters_in("all")) == {name for name, _ in network.named_parameters()}
    network.trunk.requires_grad_(False)
    assert set(network.parameters_in("all")) == {"head.weight", "head.bias"}
    assert not network.trains_rows()
    assert small().trains_rows()


@pytest.mark.parametrize("freeze", [True, False])
def test_batchnorm_keeps_its_statistics_if_asked_and_where_it_is_frozen(freeze):
    network = small()
    network.set_mode(training=True, freeze_batchnorm=freeze)
    assert network.trunk[1].training is not freeze
    network.trunk[1].requires_grad_(False)
    network.set_mode(training=True, freeze_batchnorm=freeze)
    assert not network.trunk[1].training
    assert network.trunk[2].training


def test_dropout_and_batch_statistics_make_training_another_function():
    network = small()
    network.set_mode(training=True, freeze_batchnorm=True)
    assert not network.acts_as_evaluated(), "dropout"
    network.trunk[2].p = 0.0
    assert network.acts_as_evaluated()
    network.set_mode(training=True, freeze_batchnorm=False)
    assert not network.acts_as_evaluated(), "batch statistics"
    assert network.eval().acts_as_evaluated()


def test_only_trained_matrices_decay_and_the_head_has_its_own_rate():
    network = small()
    network.trunk[0].weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, lr=0.1, head_lr=0.2, weight_decay=0.3)
    found = {names[id(p)]: (group["lr"], group["peak_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found == {
        "trunk.0.bias": (0.1, 0.1, 0.0),
        "trunk.1.weight": (0.1, 0.1, 0.0),
        "trunk.1.bias": (0.1, 0.1, 0.0),
        "head.weight": (0.2, 0.2, 0.3),
        "head.bias": (0.2, 0.2, 0.0),
    }


def test_every_trained_parameter_decays_if_asked():
    groups = parameter_groups(small(), lr=0.1, head_lr=0.2, weight_decay=0.3, decays_all=True)
    assert {group["weight_decay"] for group in groups} == {0.3}
    assert sum(len(group["params"]) for group in groups) == len(list(small().parameters()))
