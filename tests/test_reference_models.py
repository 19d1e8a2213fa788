"""scripts/reference_models.py: the splits and scores of the MLP, results that `report` reads, one line for a missing package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from flyp_saflex import recipe
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError
from flyp_saflex.reporting.report import report

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/reference_models.py"
CARD = 'title = "Toy"\nfile = "toy.csv"\ntarget = "ill"\n'


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path) -> recipe.Config:
    rng = np.random.default_rng(0)
    lines = ["age,size,ill"]
    for place in range(300):
        ill = place % 2
        lines.append(f"{rng.normal(1.5 * ill):.4f},{rng.normal():.4f},{ill}")
    (tmp_path / "toy.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "toy.toml").write_text(CARD, encoding="utf-8")
    return recipe.load("tabular-qsar", [f"data.root={tmp_path}", f"data.card={tmp_path / 'toy.toml'}"])


def test_logistic_regression_is_scored_on_the_mlps_splits_and_reported(
    script: ModuleType, config: recipe.Config, tmp_path: Path
) -> None:
    found = script.run(config, ["logistic"], [0, 1], tmp_path / "references")["logistic"]
    tested = [row for row in found if row["split"] == "id_test"]
    assert [row["seed"] for row in tested] == [0, 1]
    for row in tested:
        data = recipe.override(config, [f"data.split_seed={row['seed']}"], "here").data
        assert row["n"] == len(load_dataset(data).splits["id_test"])
        assert row["auroc"] > 0.75
    assert tested[0]["auroc"] != tested[1]["auroc"], "another split for every seed"
    runs = sorted((tmp_path / "references").iterdir())
    assert "logistic" in report(runs, out=tmp_path / "report.md")


def test_an_extra_that_is_not_installed_is_one_line(
    script: ModuleType, config: recipe.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, package in (("xgboost", "xgboost"), ("tabnet", "pytorch_tabnet.tab_model")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match="the package is not there: pip install") as error:
            script.run(config, [name], [0], tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"--models logistc: expected some of .*did you mean 'logistic'"):
        script.run(config, ["logistc"], [0], tmp_path)
