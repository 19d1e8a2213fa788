"""scripts/pacs: conditions of a comparison, ALIA's scores by the run without edits, tables of its run folders."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from flyp_saflex import recipe
from flyp_saflex.assets import TINY_CLIP
from flyp_saflex.comparison.conditions import conditions_of, role_of
from flyp_saflex.demo.scene import Scene, render

PACS = Path(__file__).resolve().parents[1] / "scripts" / "pacs"
sys.path.append(str(PACS))
import experiment  # noqa: E402

RENAMED = {
    "random-half": "filter-random",
    "lowest-loss-told": "filter-lowest-loss",
    "argmax": "filter-argmax",
    "alia": "filter-alia",
    "alia-corrupted-only": "filter-alia-corrupted",
    "validation-added": "validation-trained",
    "ood-select-added": "ood-select-trained",
}
"""Names of conditions in RESULTS.md that were measured before names started with a part in the verdict."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes in the three domains, nine drawn pictures each."""
    root = tmp_path_factory.mktemp("pacs")
    for number, domain in enumerate(("photo", "art_painting", "cartoon")):
        for species in ("zebra", "tiger", "fox"):
            (root / domain / species).mkdir(parents=True)
            for picture in range(9):
                scene = Scene(species=species, place="meadow", camera=number, x=0.3 + 0.01 * picture, seed=picture)
                render(scene, 32).save(root / domain / species / f"{picture}.jpg")
    return root


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> int:
    """Run a script as from the command line; return its exit code."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(PACS / script), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def arguments(pictures: Path, out: Path, conditions: str) -> list[object]:
    small = (
        "data.select_per_class=2",
        "train.steps=2",
        "train.warmup_steps=1",
        "train.freeze_image_blocks=0",
        "train.batch_size=4",
    )
    sets = [part for option in (*small, "train.frozen_cache=") for part in ("--set", option)]
    where = ["--data", pictures, "--model", TINY_CLIP, "--out", out]
    return [*where, "--seeds", "0", "--rates", "0.5", "--conditions", conditions, *sets]


def test_conditions_of_the_table_are_there_and_play_their_part_in_the_verdict() -> None:
    text = (PACS.parent / "RESULTS.md").read_text(encoding="utf-8")
    table = text[text.index("### Corruption 0.5\n") : text.index("### Corruption 0.75")].splitlines()
    rows = {line.split("|")[1].strip() for line in table if line.startswith("|")} - {"condition", "---"}
    assert len(rows) > 10
    assert {RENAMED.get(name, name) for name in rows} <= experiment.CONDITIONS.keys()
    assert [name for name in experiment.CONDITIONS if not role_of(name)] == ["ood-select-trained"]


@pytest.mark.slow
def test_experiment_compares_and_the_table_reads_its_runs(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "no-edits,trusted,oracle,filter-lowest-loss,filter-alia"
    command = arguments(pictures, tmp_path, asked)
    assert run(monkeypatch, "experiment.py", *command, "--worker", "0/2") == 0
    assert not (tmp_path / "verdict.txt").exists()
    assert run(monkeypatch, "experiment.py", *command) == 0
    assert "Are edits worth having?" in (tmp_path / "verdict.txt").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("runs/oracle*/model"))
    told = recipe.load(str(tmp_path / "runs" / "filter-lowest-loss-corruption-0.5-seed0" / "config.toml"))
    assert told.augment.keep_fraction == 0.5
    rows = (tmp_path / "edits" / "folder" / "seed0-rate0.5" / "alia.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(row)["confidence"] is None for row in rows} == {False}
    capsys.readouterr()
    assert run(monkeypatch, "table.py", "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("|")[1].strip() for line in lines if line.startswith("|")} == {"condition", "---", *asked.split(",")}


def test_every_condition_is_a_recipe_that_can_be_run(pictures: Path, tmp_path: Path) -> None:
    options = experiment.parser().parse_args([str(part) for part in arguments(pictures, tmp_path, "trusted")])
    config = experiment.study(options, list(experiment.CONDITIONS))
    experiment.write_edits(options, config)
    made = conditions_of(config)
    assert [condition.name.partition(" @ ")[0] for condition in made] == list(experiment.CONDITIONS)
    assert {condition.edits for condition in made} == {"", "corruption 0.5"}


def test_unknown_condition_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "experiment.py", *arguments(tmp_path, tmp_path, "trusted,argmx")) == 2
    assert "invalid names value" in capsys.readouterr().err
