"""The comparison as a whole: plan, runs, stop and go on, shares, report, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flyp_saflex import recipe
from flyp_saflex.comparison import compare as module
from flyp_saflex.comparison import estimate
from flyp_saflex.comparison.compare import compare
from flyp_saflex.comparison.runs import kept_share
from flyp_saflex.config import Config
from flyp_saflex.errors import UserError
from flyp_saflex.storage.results import read_results
from flyp_saflex.storage.run_folder import RunDir

CACHE = "augment.upstream=cache"
THREE = {
    "no-edits": ["augment.upstream=[]"],
    "saflex": [CACHE, "saflex.enabled=true"],
    "filter-random": [CACHE, "augment.filter=random", "augment.keep_fraction={kept}"],
}
TWO_SEEDS = ("compare.seeds=[0, 1]", "train.steps=2")


@pytest.fixture
def study(tiny_options: list[str], edits: object) -> Callable[..., Config]:
    """`study({condition: overrides}, "compare.seeds=[0]", ...)`: the tiny recipe with these conditions."""

    def make(conditions: dict[str, list[str]] | None = None, *overrides: str) -> Config:
        chosen = [f"compare.conditions.{name}={json.dumps(own)}" for name, own in (conditions or {}).items()]
        return recipe.load("folder", [*tiny_options, *TWO_SEEDS, *chosen, *overrides])

    return make


def results(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("runs/*/results.json"))}


def test_usual_conditions_end_in_three_answers_on_top_of_the_report(study, tmp_path, capsys):
    out = tmp_path / "out"
    lines = compare(study(None, "compare.seeds=[4]", "train.log_augmented=true"), out)
    questions = ["Are edits worth having?", "Does SAFLEX earn its keep?", "At what cost?"]
    assert [line.partition("?")[0] + "?" for line in lines[:3]] == questions
    assert "one seed: no interval" in lines[0]
    assert any("One seed has no interval, so nothing is shown" in line for line in lines)
    assert (out / "verdict.txt").read_text(encoding="utf-8").splitlines() == lines
    assert (out / "report.md").read_text(encoding="utf-8").startswith(lines[0])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.index(questions[0]) < page.index(questions[1]) < page.index("<h2")
    assert "is not another seed of" not in page
    printed = capsys.readouterr().out
    assert lines[1] in printed
    assert "ALIA" in printed  # no scores: said, not skipped in silence
    by_name = {path.name.removesuffix("-seed4"): RunDir(path, lock=False) for path in (out / "runs").iterdir()}
    assert set(by_name) == {
        "zero-shot",
        "no-edits",
        "no-edits-same-rows",
        "trusted",
        "saflex",
        "filter-argmax",
        "filter-lowest-loss",
        "filter-random",
        "validation-trained",
        "permuted",
    }
    configs = {name: run.read_config() for name, run in by_name.items()}
    assert {config.seed for config in configs.values()} == {4}
    assert configs["no-edits-same-rows"].train.batch_size == 12
    assert configs["no-edits-same-rows"].augment.upstream == ()
    assert configs["validation-trained"].data.add_to_train == ("id_val",)
    assert configs["filter-random"].augment.keep_fraction == round(kept_share(by_name["saflex"].path), 4)
    assert configs["permuted"].saflex.permute_gains
    assert not any(run.checkpoints.exists() for run in by_name.values())
    assert all(run.done and run.model.is_dir() for run in by_name.values())


def test_stopped_between_and_within_runs_it_ends_as_an_undisturbed_one(study, tmp_path, monkeypatch):
    config = study(THREE)
    compare(config, tmp_path / "undisturbed")
    evaluate, calls = module.evaluate, []

    def interrupted(run, **options):
        calls.append(run.name)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return evaluate(run, **options)

    monkeypatch.setattr(module, "evaluate", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare(config, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "verdict.txt").exists()
    compare(config, tmp_path / "stopped")
    assert len(calls) == 6 + 2  # nothing finished is done again
    assert results(tmp_path / "stopped") == results(tmp_path / "undisturbed")
    texts = [(tmp_path / name / "verdict.txt").read_text(encoding="utf-8").splitlines() for name in ("stopped", "undisturbed")]
    assert [line for line in texts[0] if "cost" not in line] == [line for line in texts[1] if "cost" not in line]


def test_two_shards_are_one(study, tmp_path):
    config = study(THREE)
    compare(config, tmp_path / "one")
    assert compare(config, tmp_path / "two", shard=(1, 2)) == []
    halves = set(results(tmp_path / "two"))
    assert {"saflex-seed0", "filter-random-seed0"} <= halves  # who needs the kept share runs after it, in the same share
    assert compare(config, tmp_path / "two", shard=(0, 2)) != []
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert halves < set(results(tmp_path / "one"))


def test_further_seeds_go_on_with_the_same_folder(study, tmp_path):
    compare(study(THREE, "compare.seeds=[0]"), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*-seed0/**/*") if path.is_file()}
    assert "n = 2" in compare(study(THREE), tmp_path / "out")[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_dry_run_tells_runs_steps_hours_and_disk_and_writes_nothing(study, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert compare(study(THREE), tmp_path / "out", dry_run=True) == []
    printed = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    line = next(line for line in printed.splitlines() if line.startswith("filter-random"))
    assert line.split() == ["filter-random", "filter", "2", "0", "2", "12"]
    assert "6 runs; 6 to do, about" in printed
    assert "4 timed steps" in printed
    assert "disk: about" in printed
    compare(study(THREE), tmp_path / "out")
    capsys.readouterr()
    compare(study(THREE), tmp_path / "out", dry_run=True)
    assert "6 runs; 0 to do" in capsys.readouterr().out


def test_sets_of_edits_have_a_verdict_each_and_share_what_needs_none(study, tmp_path):
    sets = ["compare.edits.half=augment.per_train=0.5", "compare.edits.all=augment.per_train=1", "compare.seeds=[0]"]
    lines = compare(study({"no-edits": THREE["no-edits"], "trusted": [CACHE]}, *sets), tmp_path / "out")
    assert sorted(results(tmp_path / "out")) == ["no-edits-seed0", "trusted-all-seed0", "trusted-half-seed0"]
    assert lines[0].startswith("[half] Are edits worth having?")
    assert lines[3].startswith("[all] Are edits worth having?")
    assert RunDir(tmp_path / "out/runs/trusted-half-seed0", lock=False).read_config().augment.per_train == 0.5


def test_seed_is_filled_into_overrides(study, tmp_path):
    config = study({"no-edits": [], "trusted": [CACHE]}, "compare.seeds=[7]", 'compare.common=["train.max_loss={seed}0"]')
    compare(config, tmp_path / "out")
    assert RunDir(tmp_path / "out/runs/trusted-seed7", lock=False).read_config().train.max_loss == 70


def test_keep_results_removes_models(study, tmp_path):
    compare(study({"trusted": [CACHE]}, "compare.seeds=[0]", "compare.keep=results"), tmp_path / "out")
    run = tmp_path / "out/runs/trusted-seed0"
    assert not (run / "model").exists()
    assert read_results(run)["results"]
    compare(study({"trusted": [CACHE]}, "compare.seeds=[0]", "compare.keep=results"), tmp_path / "out")  # finished all the same


@pytest.mark.parametrize(
    ("conditions", "overrides", "words"),
    [
        ({"no-edits": []}, [], ["nothing to compare", "augment.upstream"]),
        ({"zero-shot-evidence": [CACHE]}, [], ["'zero-shot-evidence' begins with 'zero-shot'", "trains on cached edits"]),
        ({"mine": [CACHE, "train.lrr=1"]}, [], ["condition 'mine'", "unknown key 'train.lrr'", "did you mean 'train.lr'?"]),
        ({"mine": [CACHE, "train.lr"]}, [], ["condition 'mine'", "section.field=value"]),
        ({"mine": [CACHE, "train.batch_size=0"]}, [], ["condition 'mine'", "train.batch_size", ">= 1"]),
        ({"mine": [CACHE, "seed=4"]}, [], ["condition 'mine'", "seed=4", "compare.seeds"]),
        ({"trusted": [CACHE]}, ["compare.baseline=no-edit"], ["compare.baseline = no-edit", "no such condition", "trusted"]),
        ({"filter-random": THREE["filter-random"]}, [], ["'filter-random'", "{kept}", "saflex"]),
        ({"mine": [CACHE], "Mine": [CACHE]}, [], ["'Mine'", "folder name", "'mine'"]),
        ({"mine": [CACHE, "cache.key=v{seed}"]}, ["compare.seeds=[1, 3]"], ["condition 'mine', seed 3", "no entry 'v3'"]),
        ({"trusted": [CACHE]}, ["compare.split=nihgt"], ["compare.split = nihgt", "did you mean 'night'?"]),
        ({"trusted": [CACHE]}, ["compare.split=id_val"], ["compare.split = id_val", "no test split"]),
        (None, ["cache.root=nowhere"], ["nothing to compare", "nowhere"]),
    ],
)
def test_bad_input_is_one_line_before_anything_is_run(study, tmp_path, conditions, overrides, words):
    with pytest.raises(UserError) as caught:
        compare(study(conditions, *overrides), tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compare.seeds=[]", "compare.seeds = []: Expected `array` of length >= 1"),
        ("compare.seed=1", "did you mean 'compare.seeds'?"),
        ("compare.metric=acuracy", "compare.metric = 'acuracy': expected one of accuracy"),
    ],
)
def test_mistakes_in_the_section_are_found_when_the_recipe_is_read(study, override, words):
    with pytest.raises(UserError, match="recipe folder") as caught:
        study(THREE, override)
    assert words in str(caught.value)


@pytest.mark.parametrize(("override", "limit"), [("train.lr=1e-4", None), ("seed=5", 2)])
def test_folder_of_another_study_is_refused_and_left_alone(study, tmp_path, override, limit):
    conditions = {"trusted": [CACHE]}
    compare(study(conditions, "compare.seeds=[0]"), tmp_path / "out")
    before = results(tmp_path / "out")
    with pytest.raises(UserError, match=r"trusted-seed0 belongs to another comparison \((train\.lr|--limit)"):
        compare(study(conditions, override), tmp_path / "out", limit=limit)
    assert results(tmp_path / "out") == before


def test_a_study_does_not_go_on_with_other_data(study, tmp_path, tiny_images_dir):
    conditions = {"trusted": [CACHE]}
    compare(study(conditions, "compare.seeds=[0]"), tmp_path / "out")
    (tiny_images_dir / "night" / "square" / "0.png").unlink()
    with pytest.raises(UserError, match=r"another comparison \(data: split 'night': 24 images became 23\)"):
        compare(study(conditions, "compare.seeds=[0,1]"), tmp_path / "out")


def test_too_small_a_disk_is_one_line_before_anything_is_run(study, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "free_bytes", lambda _: 2**20)
    with pytest.raises(UserError, match=r"the pending runs need about \d+ MB, but 1 MB are free: choose another disk"):
        compare(study(THREE), tmp_path / "out")
    assert not (tmp_path / "out").exists()
