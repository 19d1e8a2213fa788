"""Two views of every image: NT-Xent by a double loop, gains by real steps, a probe, SAFLEX from recipe to report, resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from disc_sets import write_discs
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch.func import functional_call
from vanishing import train_until

from flyp_saflex import recipe
from flyp_saflex.config import Config
from flyp_saflex.data import medmnist
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError, DataError, RunError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.reporting.report import report
from flyp_saflex.saflex.objectives import NT_XENT
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.step import StepLoss
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tasks.contrastive_task import ABSENT, ContrastiveTask, fit_probe
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.tasks.task import TaskInputs
from flyp_saflex.tasks.view_network import ViewNetwork, view_space
from flyp_saflex.training.train import train

SIZES = (32, 12, 16)


@pytest.fixture
def views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """`views("saflex.enabled=true", ...)`: the contrastive recipe, narrow, on drawn colour images of two kinds."""
    write_discs(tmp_path, "retina", SIZES, monkeypatch, colour=True)
    common = [
        f"data.root={tmp_path}",
        "network.width=4",
        "network.projection=8",
        "train.steps=6",
        "train.batch_size=8",
        "train.evaluate_every=3",
        "train.checkpoint_every=3",
        "train.log_every=1",
        "train.log_augmented=true",
        "saflex.validation_rows=6",
        "evaluate.bootstrap=0",
    ]
    return lambda *changes: recipe.load("contrastive-retina", [*common, *changes])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def slow_nt_xent(embeddings_ND: torch.Tensor, partners: list[int], temperature: float) -> float:
    """Eq. (12), view by view: -log exp(s_ip / t) / sum over the other views of exp(s_ij / t)."""
    total, rows = 0.0, embeddings_ND.double().tolist()

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        return dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))

    for i, row in enumerate(rows):
        others = sum(math.exp(cosine(row, rows[j]) / temperature) for j in range(len(rows)) if j != i)
        total += -math.log(math.exp(cosine(row, rows[partners[i]]) / temperature) / others)
    return total / len(rows)


@pytest.fixture
def step(views: Callable[..., Config]) -> Callable[..., tuple]:
    """`step(option, ...)`: 5 images as training and augmented views, 4 validation pairs, exact gains; no batch statistics."""

    def make(*changes: str) -> tuple[ContrastiveTask, StepLoss, Rows, Validation]:
        config = views("saflex.enabled=true", "saflex.check_every=0", *changes)
        torch.manual_seed(0)
        task = ContrastiveTask.build(TaskInputs(config=config, dataset=load_dataset(config.data)))
        task.network.double()
        task.network.set_mode(training=True, freeze_batchnorm=config.train.freeze_batchnorm)
        loss = StepLoss(task, NT_XENT, saflex=Saflex(config.saflex.settings))
        torch.manual_seed(1)
        zeros = torch.zeros(10, dtype=torch.long)
        rows = Rows(torch.randn(10, 3, 28, 28).double(), zeros, zeros, torch.arange(10), num_train=5)
        return task, loss, rows, Validation(torch.randn(4, 2, 3, 28, 28).double(), zeros[:4], zeros[:4])

    return make


def test_the_step_and_the_validation_loss_are_eq_12_by_a_double_loop(step: Callable[..., tuple]) -> None:
    task, loss, rows, validation = step()
    plain = StepLoss(task, NT_XENT)
    with torch.no_grad():
        embeddings = task.network(rows.inputs).images_ND
    expected = slow_nt_xent(embeddings, [5, 6, 7, 8, 9, 0, 1, 2, 3, 4], 0.5)
    assert float(plain(rows).loss.detach()) == pytest.approx(expected, abs=1e-9)
    _, loss_of = loss.validation._loss(validation.labels_V, validation.captions_V)
    with torch.no_grad():
        pairs = task.network.eval()(validation.inputs)
    assert pairs.images_ND.shape == (8, 8)
    expected = slow_nt_xent(pairs.images_ND, [4, 5, 6, 7, 0, 1, 2, 3], 0.5)
    assert float(loss_of(pairs)) == pytest.approx(expected, abs=1e-9)


def test_partners_of_several_processes_are_of_the_own_one() -> None:
    zeros = torch.zeros(6, dtype=torch.long)
    rows = Rows(torch.zeros(6, 1), zeros, zeros, zeros, num_train=3)
    space = view_space(rows, lambda tensor: torch.cat([tensor, tensor]))  # two processes with 3 images each
    own = torch.arange(12)
    columns = space.upstream_NK.argmax(dim=1)
    partners = columns + (columns >= own)
    assert partners.tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]
    assert space.augmented_N.tolist() == 2 * [False, False, False, True, True, True]


@pytest.mark.parametrize("options", [("saflex.scope=all",), ("saflex.scope=head",), ("train.freeze_batchnorm=true",)])
def test_a_gain_is_what_a_step_on_that_label_takes_off_the_real_validation_loss(
    step: Callable[..., tuple], options: tuple[str, ...]
) -> None:
    task, loss, rows, validation = step(*options)
    parameters = {name: value.detach() for name, value in task.network.parameters_in(loss.saflex.settings.scope).items()}
    buffers = {name: value.clone() for name, value in task.network.named_buffers()}
    loss.refresh(validation)
    loss(rows)  # moves batch statistics, which both derivatives were taken before
    gains_AK = loss.saflex._last[0]
    assert gains_AK.shape == (5, 9)

    def validation_loss(changed: dict[str, torch.Tensor]) -> float:
        task.network.eval()
        out = functional_call(task.network, {**buffers, **changed}, (validation.inputs,))
        task.network.set_mode(training=True, freeze_batchnorm="train.freeze_batchnorm=true" in options)
        return slow_nt_xent(out.images_ND.detach(), [4, 5, 6, 7, 0, 1, 2, 3], 0.5)

    def row_loss(changed: dict[str, torch.Tensor], row: int, label: int) -> torch.Tensor:
        copies = {name: value.clone() for name, value in buffers.items()}
        out = functional_call(task.network, {**copies, **changed}, (rows.inputs,))
        return -out.logits()[5 + row].log_softmax(dim=0)[label]

    def moved(steps: dict[str, torch.Tensor | None], size: float) -> dict[str, torch.Tensor]:
        taken = {name: 0 if steps[name] is None else size * steps[name] for name in parameters}
        return {name: value - taken[name] for name, value in parameters.items()}

    for row, label in ((0, 0), (0, 3), (2, 8), (4, 4)):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        gradient = torch.autograd.grad(row_loss(leaves, row, label), list(leaves.values()), allow_unused=True)
        steps = dict(zip(leaves, gradient, strict=True))
        size = 1e-7  # small enough that no ReLU changes sides
        taken_off = (validation_loss(moved(steps, -size)) - validation_loss(moved(steps, size))) / (2 * size)
        assert float(gains_AK[row, label]) == pytest.approx(taken_off, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("preset", ["paper-log", "robust"])
def test_views_are_trained_with_saflex_killed_resumed_evaluated_and_reported(
    views: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    config = views("saflex.enabled=true", f"saflex.preset={preset}", "recipe=saflex", "saflex.validation_renewed=2")
    train(config, tmp_path / "whole")
    decided = rows_of(tmp_path / "whole/augmented.jsonl")
    assert len(decided) == 6 * 8
    assert any(row["weight"] > 0 for row in decided)
    assert all(row["gain"] != 0 for row in decided)
    train_until(monkeypatch, 4, config, tmp_path / "killed")
    train(config, tmp_path / "killed", resume=True)
    for file in ("weights.safetensors", "probe.safetensors"):
        one, two = (load_file(tmp_path / name / "model" / file) for name in ("whole", "killed"))
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    (val,) = [row for row in evaluate(tmp_path / "whole")["results"] if row["split"] == "val"]
    selected = [row["auroc"] for row in rows_of(tmp_path / "whole/metrics.jsonl") if "auroc" in row]
    assert val["auroc"] == pytest.approx(max(selected)), "the stored probe is that of the selected weights"
    assert "saflex" in report([tmp_path / "whole"])


def test_training_knows_no_labels(views: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(views("saflex.enabled=true", "saflex.preset=robust"), tmp_path / "right")
    monkeypatch.setattr(
        medmnist, "_labels", lambda path, part, labels, num_images, known: [n // 5 % 2 for n in range(num_images)]
    )
    train(views("saflex.enabled=true", "saflex.preset=robust", "train.select_split="), tmp_path / "wrong")
    logs = [rows_of(tmp_path / name / "metrics.jsonl") for name in ("right", "wrong")]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert losses[0] == losses[1]


def test_the_probe_is_scikit_learns_on_standardised_features() -> None:
    rng = np.random.default_rng(0)
    for classes in ((0, 1), (0, 1, 3)):
        labels = np.array([classes[n % len(classes)] for n in range(60)])
        features = (rng.normal(labels[:, None] * [1.0, 0, -2, 0], 2) * [1, 5, 1, 0] + 3).astype(np.float32)
        weight, bias = fit_probe(features, labels, 4)
        scaled = (features - features.mean(0)) / np.where(features.std(0) > 1e-6, features.std(0), 1)
        expected = LogisticRegression(max_iter=5000).fit(scaled, labels).predict_proba(scaled)
        found = torch.from_numpy(features @ weight.T + bias).softmax(dim=1).numpy()
        np.testing.assert_allclose(found[:, list(classes)], expected, atol=2e-3)
        assert all(bias[label] == ABSENT for label in range(4) if label not in classes)
    with pytest.raises(DataError, match="needs training images of two classes"):
        fit_probe(features, np.zeros(60, dtype=int), 4)


def test_a_probe_of_other_classes_is_refused(views: Callable[..., Config], tmp_path: Path) -> None:
    config = views("train.steps=1")
    train(config, tmp_path / "run")
    dataset = load_dataset(config.data)
    object.__setattr__(dataset, "class_names", ("a", "b", "c"))
    with pytest.raises(RunError, match=r"is a probe of the shape \[2, 32\], expected \[3, 32\]") as error:
        ContrastiveTask.build(TaskInputs(config=config, dataset=dataset, run=tmp_path / "run"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("augment.upstream=[]", "two views of every image, but augment.upstream is empty: set it"),
        ("augment.on_train=[]", "two views of every image, but augment.on_train is empty: set it"),
        ("augment.per_train=0.5", "augment.per_train = 0.5: set augment.per_train=1"),
        ("augment.upstream=mixup", "augment.upstream has 'mixup', which edits, mixes or softens"),
        ("augment.upstream=soft-crop", "augment.upstream has 'soft-crop', which edits, mixes or softens"),
        ("train.rows_at_once=4", "train.rows_at_once = 4: every view is a proxy class of the step's others"),
        ("train.batch_size=99", r"train.batch_size = 99 is larger than the training split \(32 images\)"),
    ],
)
def test_what_makes_no_pairs_is_refused_in_one_line(views: Callable[..., Config], tmp_path: Path, change: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        train(views(change), tmp_path / "run", dry_run=True)
    assert "\n" not in str(error.value)


def test_the_network_keeps_pairs_together() -> None:
    torch.manual_seed(0)
    network = ViewNetwork(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6)), 6, 4, 0.2)
    pairs = torch.randn(3, 2, 3, 2, 2)
    together = torch.cat([pairs[:, 0], pairs[:, 1]])
    torch.testing.assert_close(network(pairs).images_ND, network(together).images_ND)
    torch.testing.assert_close(network(pairs).logits(), network.relate(network(together).images_ND))
    torch.testing.assert_close(network(network.pool(pairs), from_pooled=True).images_ND, network(together).images_ND)
