"""ResNet on small images: stem, width, BatchNorm in the joint batch, SAFLEX from recipe to results, soft labels of crops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disc_sets import write_discs
from safetensors.torch import load_file
from vanishing import train_until

from flyp_saflex import recipe
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.reporting.report import report
from flyp_saflex.saflex.objectives import CROSS_ENTROPY
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.step import StepLoss
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tasks.image_classifier import ImageClassifierTask
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.tasks.task import TaskInputs
from flyp_saflex.training.train import train

SIZES = (48, 16, 24)


@pytest.fixture
def breast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """`breast("saflex.enabled=true", ...)`: the Breast recipe, narrow, on drawn images of bright and dark discs."""
    write_discs(tmp_path, "breast", SIZES, monkeypatch)
    common = [
        f"data.root={tmp_path}",
        "network.width=4",
        "train.steps=12",
        "train.batch_size=16",
        "train.lr=3e-3",
        "train.head_lr=3e-3",
        "train.evaluate_every=6",
        "train.checkpoint_every=6",
        "train.log_augmented=true",
        "evaluate.bootstrap=0",
    ]
    return lambda *changes: recipe.load("medmnist-breast", [*common, *changes])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def built(config: Config) -> ImageClassifierTask:
    torch.manual_seed(0)
    return ImageClassifierTask.build(TaskInputs(config=config, dataset=load_dataset(config.data)))


def test_width_and_stem_shape_the_resnet(breast: Callable[..., Config]) -> None:
    images = torch.zeros(2, 3, 28, 28)
    for width, stem, side in ((4, "small", 28), (4, "usual", 7), (64, "small", 28)):
        task = built(breast(f"network.width={width}", f"network.stem={stem}"))
        trunk = task.network.trunk.eval()
        first = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
        assert first.shape == (2, width, side, side)
        assert task.network.pool(images).shape == (2, 8 * width)
        assert task.network(images).logits().shape == (2, 2)
    published = sum(parameter.numel() for parameter in task.network.parameters())
    assert published == 11_169_858, "medmnist's ResNet-18 for 28 px with two classes has 11.17 million"


@pytest.mark.parametrize("preset", ["paper-log", "robust"])
def test_images_are_trained_with_saflex_killed_resumed_and_evaluated(
    breast: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    config = breast("saflex.enabled=true", f"saflex.preset={preset}", "train.optimizer=sgd", "train.lr=3e-2")
    train(config, tmp_path / "whole")
    decided = rows_of(tmp_path / "whole/augmented.jsonl")
    assert sum(row["weight"] > 0 for row in decided) > 0
    (tested,) = [row for row in evaluate(tmp_path / "whole")["results"] if row["split"] == "test"]
    assert tested["auroc"] > 0.7
    assert "### AUROC" in report([tmp_path / "whole"], out=tmp_path / "report.md")
    train_until(monkeypatch, 7, config, tmp_path / "killed")
    train(config, tmp_path / "killed", resume=True)
    weights = [load_file(tmp_path / name / "model/weights.safetensors") for name in ("whole", "killed")]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


@pytest.fixture
def joint_step(breast: Callable[..., Config]) -> tuple[ImageClassifierTask, StepLoss, Rows, Validation]:
    """A step of 6 training and 5 augmented rows with BatchNorm in training mode, exact gains of all parameters."""
    config = breast("saflex.enabled=true", "saflex.check_every=0")
    task = built(config)
    task.network.set_mode(training=True, freeze_batchnorm=False)
    step = StepLoss(task, CROSS_ENTROPY, saflex=Saflex(config.saflex.settings))
    torch.manual_seed(1)
    labels = torch.arange(11) % 2
    rows = Rows(torch.randn(11, 3, 28, 28), labels, labels, torch.arange(11), num_train=6)
    return task, step, rows, Validation(torch.randn(8, 3, 28, 28), torch.arange(8) % 2, torch.arange(8) % 2)


def test_gains_are_those_of_the_joint_batch_and_move_no_statistic(joint_step: tuple) -> None:
    task, step, rows, validation = joint_step
    before = {name: value.clone() for name, value in task.network.named_buffers()}
    step.refresh(validation)
    assert all(torch.equal(before[name], value) for name, value in task.network.named_buffers())
    result = step(rows)
    moved = {name: value.clone() for name, value in task.network.named_buffers()}
    task.network.load_state_dict(before, strict=False)
    task.network(rows.inputs)
    for name, value in task.network.named_buffers():
        assert torch.equal(moved[name], value), "the training pass alone moves statistics"
    # Eq. (9) by finite differences: the change of each row's cross entropy, inside the joint batch, along the gradient
    direction = step.saflex.direction
    parameters = dict(task.network.named_parameters())
    losses = []
    for size in (1e-4, -1e-4):
        with torch.no_grad():
            for name, value in direction.items():
                parameters[name].add_(value, alpha=size)
            logits = task.network(rows.inputs).logits()[6:].double()
            for name, value in direction.items():
                parameters[name].sub_(value, alpha=size)
        losses.append(-logits.log_softmax(dim=1)[range(5), rows.labels_N[6:]])
    expected = (losses[0] - losses[1]) / 2e-4
    torch.testing.assert_close(result.gains_A.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_soft_crops_have_the_papers_labels_and_weights(breast: Callable[..., Config], tmp_path: Path) -> None:
    train(breast("augment.upstream=soft-crop", "train.steps=3"), tmp_path / "soft")
    weights = [row["weight"] for row in rows_of(tmp_path / "soft/augmented.jsonl")]
    assert all(0.5 <= weight <= 1 for weight in weights), "p lies between chance and 1"
    assert len(set(weights)) > 10
    train(breast("augment.upstream=soft-crop", "augment.soft_weights=false", "train.steps=3"), tmp_path / "labels")
    assert {row["weight"] for row in rows_of(tmp_path / "labels/augmented.jsonl")} == {1.0}
    train(breast("augment.upstream=translate", "train.steps=3"), tmp_path / "hard")
    losses = [[row["loss"] for row in rows_of(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in ("labels", "hard")]
    assert losses[0] != losses[1], "the labels are soft"


def test_tables_models_and_options_that_do_not_fit_are_refused_in_one_line(breast: Callable[..., Config]) -> None:
    for change, line in (
        ("model.name=resnet81", r"model.name = resnet81: expected a classifier of torchvision.*did you mean 'resnet18'"),
        ("model.name=timm:resnet1", r"timm has no such model"),
        ("model.name=mobilenet_v3_small", r"network.width = 4 is an option of torchvision's ResNets alone"),
        ("model.pretrained=DEFAULT", r"network.width = 4: there are no pretrained weights|cannot be had"),
    ):
        with pytest.raises(Exception, match=line) as error:
            built(breast(change))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"data.name = medmnist has images"):
        train(breast("train.method=mlp"), Path("unused"), dry_run=True)


def test_a_batch_larger_than_the_data_is_refused_in_one_line(breast: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size = 64 is larger than the training split \(48 images\)") as error:
        train(breast("train.batch_size=64"), Path("unused"), dry_run=True)
    assert "\n" not in str(error.value)


def test_other_networks_of_torchvision_and_timm_train(breast: Callable[..., Config]) -> None:
    for name in ("mobilenet_v3_small", "timm:resnet10t"):
        task = built(breast(f"model.name={name}", "network.width=64"))
        assert task.network.eval()(torch.zeros(2, 3, 28, 28)).logits().shape == (2, 2)


def test_frozen_statistics_from_scratch_are_told(breast: Callable[..., Config]) -> None:
    assert any("untrained statistics" in note for note in built(breast("train.freeze_batchnorm=true")).notes)
    assert built(breast()).notes == []


def test_options_of_clip_alone_are_told(breast: Callable[..., Config]) -> None:
    (note,) = built(breast("train.freeze_image_blocks=2", "train.gradient_checkpointing=true")).notes
    assert note.startswith("train.freeze_image_blocks, train.gradient_checkpointing has no effect with train.method=image-class")
