"""The proof of the design: everything that a stranger may want to add, added from this file alone through the public tables.

A dataset without files, a task without CLIP, captions or images, a metric where less is better and that is no percentage, an
editor without diffusers, a weight rule, an objective, an upstream: each is one thing here and one line in a table. CONTRIBUTING
shows the same as four short diffs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flyp_saflex import recipe
from flyp_saflex.config import Config
from flyp_saflex.editing.generate import generate
from flyp_saflex.editing.settings import EditorKind
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.evaluation.metrics import Scores
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.reporting.report import report
from flyp_saflex.saflex.losses import soft_cross_entropy
from flyp_saflex.saflex.objectives import Objective
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.tables import DATASETS, EDITORS, METHODS, METRICS, OBJECTIVES, TASKS, UPSTREAMS, WEIGHT_RULES, Method, Metric
from flyp_saflex.tasks.network import Network
from flyp_saflex.tasks.task import Task, TaskInputs
from flyp_saflex.training.train import train
from flyp_saflex.training.upstreams import Upstream

NUM_FEATURES, CLASSES = 8, ("left", "right", "up")


# A dataset: rows of an array, no file anywhere.


def read_clouds(config) -> Dataset:
    """Three clouds of points in eight dimensions; the OOD split is the same turned a little."""
    generator = np.random.default_rng(0)
    centres = 2 * np.eye(3, NUM_FEATURES)
    rows, splits = [], {}
    for name, role, shift, turn, count in (
        ("train", "train", "id", 0.0, 60),
        ("id_val", "select", "id", 0.0, 30),
        ("far", "test", "ood", 0.6, 60),
    ):
        samples = []
        for number in range(count):
            label = number % 3
            samples.append(Sample(sample_id=f"{name}/{number}", item=len(rows), label=label, domain=name))
            rows.append(centres[label] + turn * centres[(label + 1) % 3] + generator.normal(0, 0.7, NUM_FEATURES))
        splits[name] = Split(name=name, role=role, shift=shift, samples=tuple(samples))
    return Dataset(
        name="clouds", root=Path(), class_names=CLASSES, splits=splits, templates=("{}",), rows=np.array(rows, dtype=np.float32)
    )


# A task: an MLP on eight features.


class MlpTask(Task):
    """Two layers and a linear head."""

    @classmethod
    def build(cls, inputs: TaskInputs) -> MlpTask:
        """Return a new MLP, or that of a run."""
        trunk = nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        task = cls(Network(trunk, head=nn.Linear(16, inputs.dataset.num_classes)), inputs.dataset)
        if inputs.run is not None:
            task.load_weights(inputs.run)
        return task


# A metric: nats, the fewer the better.


def negative_log_likelihood(scores: Scores) -> float:
    """Mean of -log p(label)."""
    log_probs_NK = torch.from_numpy(scores.logits_NK).log_softmax(dim=1)
    return float(-log_probs_NK[range(len(scores.labels_N)), scores.labels_N].mean())


# An objective, a weight rule, an upstream.


def focal_mass(logits_NC, assignment_NC, weights_N):
    """Cross entropy whose rows count more the less sure the model is of them (a constant per row, so linear in the mass)."""
    doubt_N = 1 - logits_NC.detach().softmax(dim=1).amax(dim=1) + 0.1
    return soft_cross_entropy(logits_NC, assignment_NC, weights_N * doubt_N)


def keep_clear_gains(gains_AK, labels_AK, upstream_AK, penalty):
    """Keep rows whose own label is among the better half of their labels."""
    own_A = (gains_AK * upstream_AK).sum(dim=1)
    return (own_A >= gains_AK.median(dim=1).values).to(gains_AK.dtype)


class Jitter:
    """Noise on a row."""

    def on(self, row, seed: int):
        """Return the row with noise."""
        return row + np.random.default_rng(seed).normal(0, 0.3, row.shape).astype(row.dtype)


# An editor: no diffusers, no model.


class Fog:
    """Blends a picture with grey."""

    identity = {"model": "fog", "revision": "1"}  # noqa: RUF012 - a toy

    def __init__(self, settings, device) -> None:
        self.settings = settings

    def output_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Keep the size."""
        return width_px, height_px

    def edit(self, requests):
        """Fog every picture; thicker for longer texts."""
        return [Image.blend(r.image, Image.new("RGB", r.image.size, "grey"), min(len(r.text) / 50, 0.9)) for r in requests]


@pytest.fixture
def additions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line per table."""
    monkeypatch.setitem(DATASETS, "clouds", read_clouds)
    monkeypatch.setitem(TASKS, "mlp-on-features", MlpTask)
    monkeypatch.setitem(OBJECTIVES, "focal", Objective(loss=focal_mass, over="classes"))
    monkeypatch.setitem(METHODS, "mlp", Method(task="mlp-on-features", objective="cross-entropy"))
    monkeypatch.setitem(METHODS, "mlp-focal", Method(task="mlp-on-features", objective="focal"))
    monkeypatch.setitem(METRICS, "nll", Metric(title="NLL", short="NLL", compute=negative_log_likelihood, is_fraction=False,
                                                larger_is_better=False))  # fmt: skip
    monkeypatch.setitem(WEIGHT_RULES, "clear", keep_clear_gains)
    monkeypatch.setitem(UPSTREAMS, "jitter", Upstream(operation=lambda size_px: Jitter()))
    monkeypatch.setitem(EDITORS, "fog", EditorKind(text="instruction", usual={"model": "fog"}, load=Fog))


@pytest.fixture
def clouds(additions: None) -> Callable[..., Config]:
    """`clouds("saflex.enabled=true", ...)`: a recipe on the toy dataset with the toy task."""
    common = [
        "data.name=clouds",
        "train.method=mlp",
        "train.select_metric=nll",
        "train.steps=30",
        "train.batch_size=12",
        "train.lr=1e-2",
        "train.head_lr=1e-2",
        "train.evaluate_every=10",
        "train.log_augmented=true",
        "augment.on_train=[]",
        "augment.upstream=jitter",
        "evaluate.bootstrap=0",
    ]
    return lambda *changes: recipe.load("folder", [*common, *changes])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SAFLEX = ("saflex.enabled=true", "saflex.weight_rule=clear", "saflex.agreement=ignore", "saflex.validation_rows=12")


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("method", ["mlp", "mlp-focal"])
def test_a_toy_of_everything_trains_with_saflex_is_evaluated_and_reported(
    clouds: Callable[..., Config], tmp_path: Path, method: str, scope: str
) -> None:
    run, plain = tmp_path / "saflex", tmp_path / "plain"
    train(clouds(*SAFLEX, f"train.method={method}", f"saflex.scope={scope}", "recipe=saflex"), run)
    train(clouds(f"train.method={method}", "recipe=plain"), plain)
    decided = rows_of(run / "augmented.jsonl")
    assert 0 < sum(row["weight"] > 0 for row in decided) < len(decided), "the rule decides"
    assert {row["learned_label"] for row in decided} <= {0, 1, 2}
    chosen = [row for row in rows_of(run / "metrics.jsonl") if "nll" in row]
    results = {path: evaluate(path)["results"] for path in (run, plain)}
    (far,) = [row for row in results[run] if row["split"] == "far"]
    (val,) = [row for row in results[run] if row["split"] == "id_val"]
    assert val["nll"] == pytest.approx(min(row["nll"] for row in chosen)), "the least NLL selects"
    assert far["accuracy"] > 0.6
    text = report([run, plain], out=tmp_path / "report.md", baseline="plain")
    assert "### NLL, out of distribution (OOD): mean ± standard deviation (n seeds)" in text
    assert f"{far['nll']:.3f} (1)" in text
    assert "<html" in report([run, plain], out=tmp_path / "report.html", baseline="plain")


def test_the_toy_task_goes_on_where_it_stopped(clouds: Callable[..., Config], tmp_path: Path) -> None:
    """Steps in parts and decisions first are steps of any network; a resumed run ends in the same weights."""
    whole = rows_after(clouds(*SAFLEX), tmp_path / "whole")
    assert rows_after(clouds(*SAFLEX, "saflex.select=always"), tmp_path / "first") == pytest.approx(whole, abs=1e-5)
    assert rows_after(clouds(*SAFLEX, "train.rows_at_once=5"), tmp_path / "parts") == pytest.approx(whole, abs=1e-5)


def rows_after(config: Config, run: Path) -> list[float]:
    train(config, run)
    return [row["loss"] for row in rows_of(run / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("data.name=cluods", "data.name = 'cluods': expected one of .*clouds.*did you mean 'clouds'"),
        ("train.method=mpl", "train.method = 'mpl': expected one of .*did you mean 'mlp'"),
        ("train.objective=focl", "train.objective = 'focl': expected one of .*did you mean 'focal'"),
        ("train.select_metric=nl", "train.select_metric = 'nl': expected one of .*did you mean 'nll'"),
        ("saflex.weight_rule=claer", "saflex.weight_rule = 'claer': expected one of .*did you mean 'clear'"),
        ("augment.upstream=jiter", "augment.upstream = 'jiter': expected one of .*did you mean 'jitter'"),
    ],
)
def test_a_typo_names_what_was_added(clouds: Callable[..., Config], change: str, line: str) -> None:
    with pytest.raises(recipe.ConfigError, match=line):
        clouds(change)


def test_an_objective_by_option_is_that_of_a_method(clouds: Callable[..., Config], tmp_path: Path) -> None:
    by_option = rows_after(clouds("train.objective=focal"), tmp_path / "option")
    assert by_option == rows_after(clouds("train.method=mlp-focal"), tmp_path / "method")
    assert by_option != rows_after(clouds(), tmp_path / "plain")


def test_an_objective_over_captions_needs_a_task_with_captions(clouds: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(recipe.ConfigError, match="needs captions, but its task 'mlp-on-features' has none"):
        METHODS["toy-flyp"] = Method(task="mlp-on-features", objective="contrastive")
        try:
            train(clouds("train.method=toy-flyp"), tmp_path / "run")
        finally:
            del METHODS["toy-flyp"]


def test_an_editor_without_diffusers_edits(additions: None, make_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "texts.toml").write_text('dataset = "folder"\n[[edits]]\ndomain = "fog"\ninstruction = "put the {} in fog"\n')
    config = make_config(f"editor.prompts={tmp_path / 'texts.toml'}", "editor.kind=fog", "cache.key=fog")
    entry = generate(config)
    edits = AugmentCache.open(entry).edits
    assert len(edits) == 12
    sources = {sample.sample_id: sample.path for sample in DATASETS["folder"](config.data).train.samples}
    with Image.open(edits[0].path) as edit, Image.open(sources[edits[0].source_id]) as source:
        assert np.asarray(edit).std() < 0.8 * np.asarray(source.convert("RGB")).std(), "fog"
    assert json.loads((entry / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0])["kind"] == "fog"


CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def contributed() -> Iterator[None]:
    """The four blocks of CONTRIBUTING, executed; what they add is taken away again."""
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
    assert len(blocks) == 4
    names = {"__name__": "contributing"}
    before = {table.option: set(table) for table in (DATASETS, METRICS, WEIGHT_RULES, EDITORS)}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    yield
    for table in (DATASETS, METRICS, WEIGHT_RULES, EDITORS):
        added = set(table) - before[table.option]
        assert len(added) == 1, table.option
        for name in added:
            del table[name]


def test_what_contributing_shows_works(
    contributed: None, additions: None, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    options = [
        "data.name=two-clouds",
        "train.method=mlp",
        "train.steps=5",
        "train.batch_size=10",
        "train.select_metric=balanced_accuracy",
    ]
    options += [
        "augment.on_train=[]",
        "augment.upstream=jitter",
        "saflex.enabled=true",
        "saflex.weight_rule=best",
        "evaluate.bootstrap=0",
    ]
    train(recipe.load("folder", options), tmp_path / "run")
    assert all(0 <= row["balanced_accuracy"] <= 1 for row in evaluate(tmp_path / "run")["results"])
    (tmp_path / "texts.toml").write_text('dataset = "folder"\n[[edits]]\ndomain = "round"\ninstruction = "turn the {} round"\n')
    entry = generate(make_config(f"editor.prompts={tmp_path / 'texts.toml'}", "editor.kind=mirror", "cache.key=mirror"))
    assert len(AugmentCache.open(entry).edits) == 12
