"""Labels of edits into another class: Diff-Mix' formula, what reaches the rows of a step, and rows that state no class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flyp_saflex import recipe
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.records import Edit
from flyp_saflex.training.batches import read_steps
from flyp_saflex.training.decisions import decide_about_edits
from flyp_saflex.training.inter_class import source_share, stated_labels
from flyp_saflex.training.rows import RowBuilder
from flyp_saflex.training.setup import prepare
from flyp_saflex.training.train import train

NAMES = ("circle", "square", "stripes")


def edit(**provenance: object) -> Edit:
    return Edit(aug_id="a", path=Path("a.png"), source_id="s", label=0, provenance=provenance)


@pytest.mark.parametrize(
    ("strength", "gamma", "share"),
    [(0.25, 0.5, 0.5), (0.81, 0.5, 0.1), (0.5, 1.0, 0.5), (0.5, 2.0, 0.75), (1.0, 0.5, 0.0), (0.04, 0.5, 0.8)],
)
def test_diff_mix_leaves_the_source_one_minus_s_to_the_gamma(strength: float, gamma: float, share: float) -> None:
    assert source_share("diff-mix", strength, gamma) == pytest.approx(share)
    assert (source_share("source", strength, gamma), source_share("target", strength, gamma)) == (1, 0)


def test_a_target_is_a_name_or_an_index_and_edits_without_one_keep_their_label() -> None:
    edits = [edit(target="stripes", strength=0.25), edit(target=1, strength=1), edit()]
    labels, shares = stated_labels(edits, NAMES, "diff-mix", 0.5)
    assert labels.tolist() == [[0, 2], [1, 1], [0, 0]]
    assert shares.tolist() == [0.5, 1.0, 1.0], "all of the second edit's label is its target's"
    labels, shares = stated_labels(edits, NAMES, "target", 0.5)
    assert (labels[:, 0].tolist(), shares.tolist()) == ([2, 1, 0], [1, 1, 1])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "none of the 1 edits states the class"),
        ({"target": "strips", "strength": 0.5}, "did you mean 'stripes'"),
        ({"target": 3, "strength": 0.5}, "is no class, expected a name or an index below 3"),
        ({"target": True, "strength": 0.5}, "is no class"),
        ({"target": 1}, "strength None, expected a number above 0"),
        ({"target": 1, "strength": 1.5}, "strength 1.5"),
        ({"target": 1, "strength": 0}, "strength 0,"),
    ],
)
def test_a_row_that_states_it_wrongly_is_one_line(row: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        stated_labels([edit(**row)], NAMES, "diff-mix", 0.5)
    assert "\n" not in str(caught.value)


@pytest.fixture
def into_another_class(edits) -> Path:
    """The shared edits, each of them moved halfway (s = 0.25) towards the next class."""
    path = edits.folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    moved = [row | {"target": NAMES[(row["label"] + 1) % 3], "strength": 0.25} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in moved), encoding="utf-8")
    return path


@pytest.mark.parametrize(("rule", "shares"), [("source", None), ("target", [0.0, 1.0]), ("diff-mix", [0.5, 0.5])])
def test_the_label_reaches_the_rows_of_a_step(make_config, into_another_class, tmp_path, rule, shares) -> None:
    setup = prepare(make_config("augment.upstream=cache", f"augment.inter_class={rule}", "augment.inter_class_gamma=0.5"))
    decisions = decide_about_edits(setup, Accelerator(), tmp_path)
    if shares is None:
        assert decisions is None, "labels as they came"
        return
    (batch,) = next(iter(read_steps(setup, None, 0, 1)))
    rows = RowBuilder(setup, torch.device("cpu"), decisions).build(batch, 0, 0)
    for place in range(rows.num_train, len(rows.labels_N)):
        own = setup.edits[int(rows.ids_N[place])].label
        mass = torch.zeros(3)
        mass[rows.labels_N[place]] += rows.share_N[place]
        mass[rows.partner_labels_N[place]] += 1 - rows.share_N[place]
        assert [float(mass[own]), float(mass[(own + 1) % 3])] == shares
    assert (rows.prior_N == 1).all()
    assert (rows.share_N[: rows.num_train] == 1).all(), "training rows keep their labels"


def test_runs_by_different_rules_train_differently_and_with_saflex(make_config, into_another_class, tmp_path) -> None:
    losses = []
    for rule in ("source", "target", "diff-mix"):
        options = ("augment.upstream=cache", f"augment.inter_class={rule}", "saflex.enabled=true", "saflex.preset=robust")
        train(make_config(*options, "train.steps=2"), tmp_path / rule)
        rows = [json.loads(line) for line in (tmp_path / rule / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len({tuple(run) for run in losses}) == 3


@pytest.mark.parametrize(
    "options",
    [["augment.upstream=flip"], ['augment.upstream=["cache", "mixup"]'], ["augment.upstream=cache", "saflex.enabled=true"]],
)
def test_it_goes_with_cached_edits_and_no_other_labels(options: list[str]) -> None:
    with pytest.raises(ConfigError, match="labels cached edits"):
        recipe.load("folder", [*options, "augment.inter_class=diff-mix"])
