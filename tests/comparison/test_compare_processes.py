"""A comparison on two processes: every run is shared, one report is written, and it can be dried and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from children import run_ranks, with_overrides

from flyp_saflex import recipe
from flyp_saflex.comparison.compare import compare
from flyp_saflex.storage.results import read_results

pytestmark = pytest.mark.slow

CONDITIONS = {
    "no-edits": ["augment.upstream=[]"],
    "saflex": ["augment.upstream=cache", "saflex.enabled=true"],
    "filter-random": ["augment.upstream=cache", "augment.filter=random", "augment.keep_fraction={kept}"],
}


def two_processes(out: Path, options: list[str], *further: str) -> str:
    words = with_overrides("compare", "folder", "--run-dir", str(out), *further, overrides=options)
    return run_ranks(words, out.parent)[0]


def test_two_processes_share_every_run(tiny_options, edits, tmp_path):
    options = [*tiny_options, "compare.seeds=[0]", "train.steps=3", "train.eps=1e-3"]
    options += [f"compare.conditions.{name}={json.dumps(own)}" for name, own in CONDITIONS.items()]
    dry = two_processes(tmp_path / "two", options, "--dry-run")
    assert dry.count("3 runs; 3 to do") == 1
    assert not (tmp_path / "two").exists()
    printed = two_processes(tmp_path / "two", options)
    assert printed.count("Are edits worth having?") == 1
    assert printed.count("run 3 of 3") == 1
    assert "2 processes" in (tmp_path / "two/logs/saflex-seed0.log").read_text(encoding="utf-8")
    compare(recipe.load("folder", options), tmp_path / "one")
    for name in ("no-edits", "saflex", "filter-random"):
        one, two = (read_results(tmp_path / folder / "runs" / f"{name}-seed0")["results"] for folder in ("one", "two"))
        assert [row["accuracy"] for row in two] == [row["accuracy"] for row in one]
    assert "run 1 of" not in two_processes(tmp_path / "two", options)  # nothing is left to do
