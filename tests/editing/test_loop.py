"""The loop pilot -> train -> plan -> generate --plan: even pilots, outcomes of a run, plans that are followed or refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flyp_saflex import cli, recipe
from flyp_saflex.config import Config
from flyp_saflex.editing.choice import spread
from flyp_saflex.editing.editor import Request
from flyp_saflex.editing.generate import generate
from flyp_saflex.editing.outcomes import read_outcomes
from flyp_saflex.editing.plan import EditPlan, Wording, plan_edits
from flyp_saflex.editing.plan_run import plan
from flyp_saflex.editing.settings import EditorKind
from flyp_saflex.errors import ConfigError, DataError, RunError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.offline import EditorConfig
from flyp_saflex.records import Sample
from flyp_saflex.tables import EDITORS
from flyp_saflex.training.decisions import FILE
from flyp_saflex.training.sampling import derived_seed
from flyp_saflex.training.train import train

TEXTS = """dataset = "folder"
[[edits]]
domain = "snow"
instruction = "put the {} in the snow"
[[edits]]
domain = "lake"
instruction = "put the {} near a lake"
"""
PILOT = 12
SAFLEX = ("augment.upstream=cache", "saflex.enabled=true", "saflex.preset=robust", "train.log_augmented=true")


class Paler:
    """An instant editor with a strength: mixes the source with grey."""

    def __init__(self, settings: EditorConfig, *, device: object) -> None:
        self.settings, self.identity = settings, {"model": "paler", "revision": "1"}

    def output_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        return width_px, height_px

    def edit(self, requests: Sequence[Request]) -> list[Image.Image | str]:
        edits: list[Image.Image | str] = []
        for request in requests:
            assert request.image is not None
            strength = self.settings.strength if request.level is None else request.level
            assert strength is not None
            edits.append(Image.blend(request.image, Image.new("RGB", request.image.size, "grey"), strength))
        return edits


@pytest.fixture
def options(tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """12 training images of 3 classes, 2 texts, an editor with a strength."""
    monkeypatch.setitem(EDITORS, "paler", EditorKind(text="instruction", usual={"strength": 0.5}, load=Paler))
    (tmp_path / "texts.toml").write_text(TEXTS)
    return [*tiny_options, "editor.kind=paler", f"editor.prompts={tmp_path / 'texts.toml'}", "editor.batch_size=5"]


@pytest.fixture
def config(options: list[str]) -> Callable[..., Config]:
    return lambda *overrides: recipe.load("folder", [*options, *overrides])


def rows(entry: Path) -> list[dict]:
    return [json.loads(line) for line in (entry / "metadata.jsonl").read_text().splitlines()]


def every_edit(num_classes: int, per_class: int, texts: int, levels: tuple[float, ...] = ()) -> EditPlan:
    images = [Sample(sample_id=f"{c}/{n}", item=Path(f"{c}/{n}"), label=c) for c in range(num_classes) for n in range(per_class)]
    return plan_edits(images, [Wording(f"d{t}", f"text {t} {{}}") for t in range(texts)], ["x"] * num_classes, levels=levels)


@pytest.mark.parametrize("num", [10, 37, 120, 240, 1000])
def test_a_pilot_is_even_over_classes_texts_and_levels(num: int) -> None:
    every = every_edit(10, 4, 4, (0.3, 0.6, 0.9))
    chosen = spread(every, num, seed=0)
    cells = chosen.cells()
    assert len(cells) == min(num, len(every))
    counts = [Counter(cell[part] for cell in cells) for part in range(3)]
    for part, kinds in ((0, 10), (1, 4), (2, 3)):
        assert len(counts[part]) == kinds
        assert max(counts[part].values()) - min(counts[part].values()) <= (1 if part == 0 else max(2, 0.35 * num / kinds))
    per_cell = Counter(cells)
    assert max(per_cell.values()) - min(per_cell[cell] for cell in every.cells()) <= 1
    assert spread(every, num, seed=0).file_names == chosen.file_names
    assert num > 400 or spread(every, num, seed=1).file_names != chosen.file_names
    assert set(spread(every, num // 2, seed=0).file_names) <= set(chosen.file_names), "a larger pilot adds edits"


def test_strengths_are_edits_of_their_own_with_one_noise_and_are_told_in_the_manifest(config, tmp_path: Path) -> None:
    entry = generate(config("editor.strengths=[0.25, 0.75]"))
    found = rows(entry)
    assert len(found) == 12 * 2 * 2
    assert Counter(row["strength"] for row in found) == {0.25: 24, 0.75: 24}
    seeds = {}
    for row in found:
        seeds.setdefault((row["source_id"], row["instruction"]), set()).add(row["seed"])
    assert all(len(one) == 1 for one in seeds.values())
    spread_of = {level: [] for level in (0.25, 0.75)}
    for row in found:
        spread_of[row["strength"]].append(np.asarray(Image.open(entry / row["file_name"])).std())
    assert np.mean(spread_of[0.75]) < np.mean(spread_of[0.25]), "the editor was given the level"
    assert json.loads((entry / "settings.json").read_text())["strengths"] == [0.25, 0.75]
    run = tmp_path / "run"
    train(config("editor.strengths=[0.25, 0.75]", *SAFLEX, "augment.levels=0.75"), run)
    assert {row["id"] for row in map(json.loads, (run / "augmented.jsonl").read_text().splitlines())} <= {
        row["aug_id"] for row in found if row["strength"] == 0.75
    }
    with pytest.raises(DataError, match=r"augment\.levels = \[0\.5\]: no edit in .* \(found: 0\.25, 0\.75\)"):
        train(config("editor.strengths=[0.25, 0.75]", *SAFLEX, "augment.levels=0.5"), tmp_path / "other")


def test_a_pilot_is_the_same_in_parts_and_after_a_stop_and_all_edits_go_on_from_it(config, tmp_path: Path) -> None:
    whole = generate(config(f"cache.root={tmp_path / 'one'}"), pilot=PILOT)
    for index in (2, 0, 1):
        entry = generate(config(), shard=(index, 3), pilot=PILOT)
    assert sorted(row["aug_id"] for row in rows(entry)) == sorted(row["aug_id"] for row in rows(whole))
    assert Counter((row["label"], row["domain"]) for row in rows(entry)) == {
        (label, domain): 2 for label in range(3) for domain in ("snow", "lake")
    }
    assert generate(config()) == entry, "edits of a pilot are part of all edits"
    assert len(rows(entry)) == 24


@pytest.fixture
def piloted(config, tmp_path: Path) -> tuple[Path, Path]:
    """A run on a pilot, and the entry."""
    entry = generate(config(), pilot=PILOT)
    train(config(*SAFLEX), tmp_path / "run")
    return tmp_path / "run", entry


def decide(run: Path, entry: Path, weight: Callable[[dict], float], *, rho: float = 0.5) -> None:
    """Write decisions as evidence makes them."""
    found = rows(entry)
    stored = {
        "weights": torch.tensor([float(weight(row)) for row in found]),
        "labels": torch.tensor([[row["label"], (row["label"] + 1) % 3] for row in found]),
        "rho": torch.tensor(rho),
        "names": torch.tensor([derived_seed(row["aug_id"]) for row in found]),
    }
    save_file(stored, run / FILE)


def test_a_run_tells_outcomes_by_its_log_or_by_its_decisions(piloted) -> None:
    run, entry = piloted
    logged = [json.loads(line) for line in (run / "augmented.jsonl").read_text().splitlines()]
    by_log = read_outcomes(run)
    assert len(by_log.outcomes) == len({row["id"] for row in logged})
    assert Counter(one.cell for one in by_log.outcomes).keys() <= {(label, text, None) for label in range(3) for text in (0, 1)}
    gains = {}
    for row in logged:
        gains.setdefault(row["id"], []).append(row["gain"])
    assert sorted(one.gain for one in by_log.outcomes) == pytest.approx(sorted(np.mean(values) for values in gains.values()))
    decide(run, entry, lambda row: row["domain"] == "snow")
    decided = read_outcomes(run)
    assert len(decided.outcomes) == PILOT
    assert all(one.kept == (one.cell[1] == 0) and one.useful == float(one.kept) for one in decided.outcomes)
    assert not decided.notes
    decide(run, entry, lambda row: 1, rho=float("nan"))
    assert "make a larger pilot" in read_outcomes(run).notes[0]


def test_a_plan_gives_more_to_what_was_kept_and_nothing_to_a_useless_text(piloted, config, capsys) -> None:
    run, entry = piloted
    decide(run, entry, lambda row: row["domain"] == "snow")
    batches = [{"aug_ids": [row["aug_id"] for row in rows(entry)], "seconds": 2.0 * PILOT}]
    (entry / "times.jsonl").write_text("".join(json.dumps(batch) + "\n" for batch in batches))
    assert cli.main(["plan", str(run), "--explore", "0"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["snow"][1:4] == ["6", "6", "100.0"]
    assert lines["lake"][1:4] == ["6", "0", "0.0"]
    assert lines["lake"][-3:] == ["-", "-", "0.0"]
    assert lines["snow"][-3:] == ["1.0", "2", "100.0"]
    assert lines["all"][-3:] == ["2.0", "4", "100.0"], "what was dropped was paid for"
    before = {row["aug_id"] for row in rows(entry)}
    budgeted = config("editor.budget=9")
    assert generate(budgeted, plan_file=run / "plan.json", dry_run=True) == entry
    assert "9 edits of" in capsys.readouterr().out
    for index in (1, 0):
        generate(budgeted, plan_file=run / "plan.json", shard=(index, 2))
    made = [row for row in rows(entry) if row["aug_id"] not in before]
    assert {row["domain"] for row in made} == {"snow"}
    assert Counter(row["label"] for row in rows(entry) if row["domain"] == "snow") == {0: 3, 1: 3, 2: 3}
    assert generate(budgeted, plan_file=run / "plan.json") == entry
    assert "nothing to do" in capsys.readouterr().out
    assert len(read_outcomes(run).outcomes) == PILOT, "edits made after the run have no outcome"


def test_plans_that_cannot_be_made_are_one_line(piloted, config, tmp_path: Path) -> None:
    run, entry = piloted
    decide(run, entry, lambda row: 0)
    with pytest.raises(RunError, match=r"no class and text reaches --floor 0\.9"):
        plan(run, floor=0.9)
    with pytest.raises(ConfigError, match=r"--explore 2: expected a number from 0 to 1"):
        plan(run, explore=2.0)
    with pytest.raises(RunError, match="there is no such folder"):
        plan(tmp_path / "nowhere")
    train(config(), tmp_path / "clean")
    with pytest.raises(RunError, match=r"has no augmented rows from a cache \(augment\.upstream = \[\]\)"):
        plan(tmp_path / "clean")
    train(config("augment.upstream=cache"), tmp_path / "trusted")
    with pytest.raises(RunError, match="has no record of its augmented rows: train with saflex"):
        plan(tmp_path / "trusted")
    (entry / "settings.json").unlink()
    with pytest.raises(DataError, match=r"its edits were not made by `flyp-saflex generate`"):
        plan(run)


def test_plan_files_and_pilots_that_cannot_be_followed_are_one_line(piloted, config, tmp_path: Path) -> None:
    run, entry = piloted
    decide(run, entry, lambda row: 1)
    file = tmp_path / "plan.json"
    plan(run, file)

    def refused(error: type[Exception], message: str, *overrides: str, pilot: int | None = None) -> None:
        with pytest.raises(error, match=message) as caught:
            generate(config("editor.budget=9", *overrides), plan_file=None if pilot else file, pilot=pilot)
        assert "\n" not in str(caught.value)

    refused(DataError, r"was made for other data", "data.select_fraction=0.5")
    refused(DataError, r"edits of another recipe \(seed: 3 -> 1\)", "seed=1")
    other = tmp_path / "other.toml"
    other.write_text(TEXTS.replace("near a lake", "in a lake"))
    refused(DataError, r"edits of another recipe \(other texts\)", f"editor.prompts={other}")
    refused(
        DataError,
        r"edits of another recipe \(strength: 0\.5 -> 0\.3\)",
        "editor.strengths=[0.3, 0.5]",
        "editor.strength=0.3",
    )
    refused(ConfigError, r"editor\.budget = 2 is below one edit per class, and training has 3 classes", "editor.budget=2")
    refused(ConfigError, r"editor\.budget = 0 is below one edit per class", "editor.budget=0")
    refused(ConfigError, r"--pilot = 2 is below one edit per class", pilot=2)
    refused(ConfigError, r"editor\.plan = quota and --pilot each say which edits", "editor.plan=quota", pilot=9)
    with pytest.raises(ConfigError, match="give one of them"):
        generate(config(), pilot=9, plan_file=file)
    for text in ("", "[]", '{"dataset": "folder"}', file.read_text().replace('"share": ', '"share": -')):
        file.write_text(text)
        refused(DataError, r"--plan .*plan\.json")


def test_hard_edits_the_images_that_a_run_gets_wrong_hardest_first(config, tmp_path: Path, capsys) -> None:
    run = tmp_path / "zero-shot"
    train(config("train.steps=0", "train.epochs=0"), run)
    hard = ("editor.plan=hard", f"editor.hard_run={run}")
    with pytest.raises(RunError, match=r"has no predictions of the training images: run `flyp-saflex evaluate .* --split train`"):
        generate(config(*hard))
    evaluate(run, splits=["train"])
    import pyarrow.parquet as pq

    found = pq.read_table(run / "predictions" / "train.parquet").to_pylist()
    wrong = {row["sample_id"]: row["confidence"] for row in found if row["label"] != row["prediction"]}
    assert 0 < len(wrong) < 12
    generate(config(*hard), dry_run=True)
    assert ["all", "12"] in [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    entry = generate(config(*hard))
    assert {row["source_id"] for row in rows(entry)} == wrong.keys()
    assert len(rows(entry)) == 2 * len(wrong)
    few = generate(config(*hard, "editor.budget=4"))
    assert few != entry
    assert {row["source_id"] for row in rows(few)} == set(sorted(wrong, key=wrong.get)[-2:])


def test_hard_without_a_run_of_this_data_is_one_line(config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"editor\.plan = hard needs editor\.hard_run"):
        generate(config("editor.plan=hard"))
    with pytest.raises(RunError, match=r"editor\.hard_run = .*nowhere has no data\.json"):
        generate(config("editor.plan=hard", f"editor.hard_run={tmp_path / 'nowhere'}"))
    train(config("train.steps=0", "train.epochs=0", "data.select_fraction=0.5"), tmp_path / "other")
    with pytest.raises(DataError, match=r"was trained on other data \(split 'train': 6 images became 12"):
        generate(config("editor.plan=hard", f"editor.hard_run={tmp_path / 'other'}", "data.select_fraction=0.25"))
