"""The plain classifier: a new kind of model gets its answers for nothing, and says in one line what it lacks."""

from pathlib import Path

import pytest
import torch
from torch import nn

from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.records import Dataset
from flyp_saflex.tables import METHODS, TASKS, Method
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.tasks.network import Network
from flyp_saflex.tasks.task import Task, autocast
from flyp_saflex.training.setup import prepare


def make_task(width=4, classes=3):
    torch.manual_seed(0)
    dataset = Dataset(
        name="rows",
        root=Path(),
        class_names=tuple("abcdef"[:classes]),
        splits={},
        templates=("{}",),
        rows=torch.randn(9, 5).numpy(),
    )
    return Task(Network(nn.Sequential(nn.Linear(5, width), nn.Tanh()), head=nn.Linear(width, classes)), dataset)


class PlainTask(Task):
    """A plain classifier as a recipe builds it."""

    @classmethod
    def build(cls, inputs):
        network = Network(nn.Flatten(), head=nn.Linear(5, inputs.dataset.num_classes))
        return cls(network, inputs.dataset)


def rows():
    labels_N = torch.tensor([2, 0, 2])
    return Rows(torch.randn(3, 5), labels_N, labels_N, torch.arange(3), 1)


def test_class_logits_are_the_networks():
    task, inputs = make_task(), torch.randn(7, 5)
    task.network.train()
    found = task.predictor()(inputs)
    assert not found.requires_grad
    assert not task.network.training
    torch.testing.assert_close(found, task.network.head(task.network.trunk(inputs)).detach())


def test_saved_weights_are_loaded_and_those_of_another_network_are_refused(tmp_path):
    task, other, inputs = make_task(), make_task(), torch.randn(7, 5)
    with torch.no_grad():
        other.network.head.weight.mul_(2)
    other.save(tmp_path / "model", tmp_path)
    assert all((tmp_path / name).is_file() for name in Task.files)
    task.load_weights(tmp_path)
    assert torch.equal(task.predictor()(inputs), other.predictor()(inputs))
    with pytest.raises(RunError, match=r"does not fit the task of its config\.toml .*: train again") as error:
        make_task(width=6).load_weights(tmp_path)
    assert "\n" not in str(error.value)


def test_labels_are_the_datasets_classes():
    task = make_task()
    space = task.label_space(rows(), "classes", 0, lambda tensor: tensor)
    assert space.upstream_NK.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert len(space.tokens_UL) == 0
    assert task.class_of(2, "classes") == 2


def test_a_method_that_needs_captions_is_refused_in_one_line(make_config, monkeypatch):
    monkeypatch.setitem(TASKS, "plain", PlainTask)
    monkeypatch.setitem(METHODS, "plain-flyp", Method(task="plain", objective="contrastive"))
    with pytest.raises(ConfigError, match=r"train\.method = plain-flyp needs captions, but its task 'plain' has none") as error:
        prepare(make_config("train.method=plain-flyp"))
    assert "\n" not in str(error.value)
    with pytest.raises(AssertionError, match="checked"):
        make_task().label_space(rows(), "captions", 0, lambda tensor: tensor)


def test_a_phase_of_the_head_leaves_the_trunk_alone():
    task = make_task()
    task.begin_phase(only_head=True)
    assert {name for name, parameter in task.network.named_parameters() if parameter.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    task.begin_phase(only_head=False)
    assert all(parameter.requires_grad for parameter in task.network.parameters())


def test_float16_is_left_out_on_a_cpu():
    with autocast(torch.device("cpu"), "fp16"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(torch.device("cpu"), "no"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(torch.device("cpu"), "bf16"):
        assert torch.is_autocast_enabled("cpu")
