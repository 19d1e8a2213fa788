"""MLP on a table, from recipe to report: SAFLEX decides, a killed run goes on bit for bit, other encodings are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vanishing import train_until

from flyp_saflex import recipe
from flyp_saflex.comparison.compare import compare
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, RunError, UserError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.exporting.export_run import export_run
from flyp_saflex.predicting.predict_images import PredictOptions, predict_images
from flyp_saflex.reporting.report import report
from flyp_saflex.training.train import train

CARD = """
title = "Toy"
file = "toy.csv"
target = "ill"
categorical = ["town"]
[classes]
healthy = ["0"]
ill = ["1"]
"""


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Config]:
    """`table("saflex.enabled=true", ...)`: the QSAR recipe on a drawn table with one telling number and one telling town."""
    rng = np.random.default_rng(0)
    lines = ["age,size,town,ill"]
    for place in range(400):
        ill = place % 3 == 0
        town = rng.choice(["Bern", "Rome", "Oslo"], p=[0.6, 0.2, 0.2] if ill else [0.2, 0.2, 0.6])
        lines.append(f"{rng.normal(1.2 * ill):.5f},{rng.normal():.5f},{town},{int(ill)}")
    (tmp_path / "toy.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "toy.toml").write_text(CARD, encoding="utf-8")
    common = [
        f"data.root={tmp_path}",
        f"data.card={tmp_path / 'toy.toml'}",
        "network.hidden=[16,16]",
        "train.steps=24",
        "train.batch_size=32",
        "train.lr=1e-2",
        "train.head_lr=1e-2",
        "train.evaluate_every=8",
        "train.checkpoint_every=8",
        "train.log_augmented=true",
        "evaluate.bootstrap=0",
    ]
    return lambda *changes: recipe.load("tabular-qsar", [*common, *changes])


SAFLEX = ("saflex.enabled=true", "recipe=saflex")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("upstream", ["cutmix", "mixup"])
def test_a_table_is_trained_with_saflex_evaluated_and_reported(
    table: Callable[..., Config], tmp_path: Path, upstream: str
) -> None:
    run, plain = tmp_path / "saflex", tmp_path / "plain"
    train(table(*SAFLEX, f"augment.upstream={upstream}"), run)
    train(table("augment.upstream=[]", "recipe=plain"), plain)
    decided = rows_of(run / "augmented.jsonl")
    assert 0 < sum(row["weight"] > 0 for row in decided) < len(decided), "Eq. (11) drops some"
    for path in (run, plain):
        (tested,) = [row for row in evaluate(path)["results"] if row["split"] == "id_test"]
        assert tested["auroc"] > 0.75
        assert 0.4 < tested["average_precision"] <= 1
    text = report([run, plain], out=tmp_path / "report.md", baseline="plain")
    assert "### AUROC" in text


@pytest.mark.parametrize("preset", ["paper-log", "robust"])
def test_a_killed_run_goes_on_bit_for_bit(
    table: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    schedule = {"paper-log": "cosine", "robust": "one-cycle"}[preset]
    config = table(*SAFLEX, f"saflex.preset={preset}", "train.optimizer=sgd", f"train.schedule={schedule}")
    train(config, tmp_path / "whole")
    train_until(monkeypatch, 13, config, tmp_path / "killed")
    train(config, tmp_path / "killed", resume=True)
    weights = [load_file(tmp_path / name / "model/weights.safetensors") for name in ("whole", "killed")]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    logs = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1]


def test_a_run_is_not_scored_on_rows_of_another_encoding(table: Callable[..., Config], tmp_path: Path) -> None:
    train(table("train.steps=2"), tmp_path / "run")
    with pytest.raises(RunError, match=r"is of other training rows: 5 features, here 5.*data.split_seed of the run") as error:
        evaluate(tmp_path / "run", overrides=["data.split_seed=3"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        "augment.upstream=randaugment",
        "augment.upstream=autoaugment-svhn",
        "augment.on_train=random-crop",
        "augment.on_train=flip",
    ],
)
def test_an_operation_on_images_is_refused_in_one_line(table: Callable[..., Config], tmp_path: Path, option: str) -> None:
    with pytest.raises(
        ConfigError, match=r"changes images, but train.method takes rows of numbers: set augment.on_train="
    ) as error:
        train(table(option), tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["translate", "soft-crop", "copy-paste"])
def test_an_upstream_that_needs_images_is_refused_in_one_line(table: Callable[..., Config], tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"takes rows of numbers: use mixup or cutmix") as error:
        train(table(f"augment.upstream={name}"), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_cached_edits_of_a_table_are_asked_for_in_one_line(table: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="augment cache") as error:
        train(table("augment.upstream=cache", f"cache.root={tmp_path}"), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_commands_that_need_clip_refuse_a_tables_run_in_one_line(table: Callable[..., Config], tmp_path: Path) -> None:
    train(table("train.steps=1"), tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for use in (
        lambda: predict_images(tmp_path / "run", [tmp_path / "a.png"], PredictOptions(out=tmp_path / "p.csv")),
        lambda: export_run(tmp_path / "run", to="open_clip", out=tmp_path / "exported"),
    ):
        with pytest.raises(RunError, match=r"train.method = mlp has no CLIP model, which this command needs") as error:
            use()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.slow
def test_the_recipes_comparison_ends_in_a_verdict_and_every_seed_has_its_own_split(
    table: Callable[..., Config], tmp_path: Path
) -> None:
    config = table("train.steps=4", "compare.seeds=[0,1]", "train.log_augmented=false")
    assert compare(config, tmp_path / "out")
    runs = sorted(path.name for path in (tmp_path / "out/runs").iterdir())
    assert len(runs) == 2 * len(config.compare.conditions)
    fingerprints = {
        json.loads((tmp_path / "out/runs" / name / "data.json").read_text(encoding="utf-8"))["fingerprint"] for name in runs
    }
    assert len(fingerprints) >= 2
    assert "AUROC" in (tmp_path / "out/report.md").read_text(encoding="utf-8")


def test_images_are_no_rows_of_numbers(make_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.method = mlp takes rows of numbers, but data.name = folder has images"):
        train(make_config("train.method=mlp"), tmp_path / "run")


def test_a_batch_larger_than_the_table_is_refused(table: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size = 999 is larger than the training split"):
        train(table("train.batch_size=999"), tmp_path / "run")
