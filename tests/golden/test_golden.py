"""Golden runs: a change of the code's shape moves no digit; a change of method edits the stored digits and says why."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from golden_runs import ASSETS, BEFORE, command, differences, rounded, rows, run_all, stored, working_in

from flyp_saflex import load_recipe

TOLERANCE = 1e-3
"""One machine repeats every digit (`golden_runs.py` demands that); other processors sum in another order, 20 steps long."""


def test_every_command_gives_the_stored_digits(tmp_path: Path) -> None:
    found = json.loads(json.dumps(run_all(tmp_path)))
    assert list(differences(rounded(stored()), rounded(found), TOLERANCE)) == []


def test_the_comparison_sees_a_changed_digit() -> None:
    old = {"loss": [1.0, 2.0], "label": [1, 2]}
    assert list(differences(old, {"loss": [1.0, 2.0], "label": [1, 2]}, TOLERANCE)) == []
    assert list(differences(old, {"loss": [1.0, 2.01], "label": [1, 3]}, TOLERANCE)) == [
        "/label[1]: 2 stored, 3 found",
        "/loss[1]: 2.0 stored, 2.01 found",
    ]
    assert list(differences(old, {"loss": [1.0]}, TOLERANCE)) == ["/label: only stored", "/loss: [1.0, 2.0] stored, [1.0] found"]


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A working folder as the version of 2026-11-23 left it (`golden_runs.py --before`)."""
    with tarfile.open(BEFORE) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "tiny_editor").symlink_to(ASSETS / "tiny_editor")
    return tmp_path


@pytest.mark.parametrize("name", ["robust", "lp-ft"])
def test_run_folders_of_before_are_evaluated_alike(before: Path, name: str) -> None:
    with working_in(before):
        results = Path(f"runs/{name}/results.json")
        old = json.loads(results.read_text(encoding="utf-8"))
        results.unlink()
        command("evaluate", f"runs/{name}", "--wise-alphas", "0,0.5,1")
        found = json.loads(results.read_text(encoding="utf-8"))
        for row in found["results"]:
            assert any(
                row.items() >= {key: old_row[key] for key in ("split", "wise_alpha")}.items() for old_row in old["results"]
            )
        assert list(differences(old["results"], [pick(row, old["results"][0]) for row in found["results"]], TOLERANCE)) == []
        command("report", f"runs/{name}", "--out", "report.html")


def pick(row: dict, known: dict) -> dict:
    """Leave out fields that results.json did not have."""
    return {key: value for key, value in row.items() if key in known}


def test_a_run_that_stopped_before_goes_on_to_the_same_end(before: Path) -> None:
    with working_in(before):
        command("train", "runs/stopped/config.toml", "--run-dir", "runs/stopped", "--resume")
        ends = [
            [row["loss"] for row in rows(Path(f"runs/{name}/metrics.jsonl")) if "loss" in row] for name in ("stopped", "robust")
        ]
        assert len(ends[0]) == len(ends[1]) == 20
        assert list(differences(ends[1], ends[0], TOLERANCE)) == []


def test_caches_and_recipes_of_before_still_open(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with working_in(before):
        manifest = Path("augment_cache/folder/edits/metadata.jsonl").read_bytes()
        command("generate", "runs/robust/config.toml", "--limit", "3")
        assert "nothing to do" in capsys.readouterr().out
        assert Path("augment_cache/folder/edits/metadata.jsonl").read_bytes() == manifest
        assert load_recipe("mine.toml").data.train_domains == ("day",)
