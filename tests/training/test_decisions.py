"""Decisions about edits before training: they reach the rows, survive a stop, and step aside where they cannot be made."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flyp_saflex.saflex.evidence import decide
from flyp_saflex.tasks.clip_task import ClipTask
from flyp_saflex.training import decisions as module
from flyp_saflex.training import train as train_module
from flyp_saflex.training.decisions import Decisions
from flyp_saflex.training.train import train

SAFLEX = ("augment.upstream=cache", "saflex.enabled=true", "train.log_augmented=true")


def rows(run, name="augmented.jsonl"):
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def planted(monkeypatch):
    """A verdict that every edit of class 0 shows class 1, and the others what they came with; returns the kinds asked for."""
    asked = []

    def evidence(self, kinds, edits, loader, *, rank=0, num_processes=1):
        asked.append(tuple(kinds))
        return {"zero-shot": torch.zeros(len(edits), 3)}

    def verdict(evidence, own_N, *, threshold):
        labels_NK = F.one_hot(torch.where(own_N == 0, 1, own_N), 3).float()
        parts = {"weights_N": torch.ones(len(own_N)), "labels_NK": labels_NK, "candidates_NK": labels_NK > 0, "rho": 0.25}
        found = decide(evidence, own_N, threshold=threshold)
        return replace(found, status="calibrated", kept_fraction=1.0, relabelled_fraction=0.33, **parts)

    monkeypatch.setattr(ClipTask, "edit_evidence", evidence)
    monkeypatch.setattr(module, "decide", verdict)
    return asked


@pytest.mark.parametrize("method", ["flyp", "ce-text", "ce-linear"])
@pytest.mark.parametrize("penalty", ["1", "1e6"])
def test_relabelled_edits_are_trained_on_under_their_class(make_config, edits, tmp_path, planted, method, penalty, capsys):
    run = tmp_path / "run"
    train(make_config(*SAFLEX, f"train.method={method}", f"saflex.penalty={penalty}", "train.steps=4"), run)
    assert planted == [("zero-shot", "source", "source-middle")]
    decided = rows(run)
    assert {row["learned_label"] for row in decided if row["label"] == 0} == {1}
    assert all(row["learned_label"] == row["label"] for row in decided if row["label"] != 0)
    assert all(row["weight"] > 0 for row in decided)
    assert ("gain" in decided[0]) == (penalty == "1")
    assert all(len(row["posterior"]) == 2 and 0 <= sum(row["posterior"]) <= 1.001 for row in decided)
    assert "rho" in rows(run, "metrics.jsonl")[0]
    assert "under another class" in capsys.readouterr().out


def test_dropped_edits_have_no_weight_and_labels_may_be_shared(make_config, edits, tmp_path, monkeypatch):
    count = 24
    weights, shares = torch.ones(count), torch.ones(count)
    weights[::2], shares[1::4] = 0.0, 0.7
    labels = torch.stack([torch.arange(count) % 3, (torch.arange(count) + 1) % 3], dim=1)
    monkeypatch.setattr(train_module, "decide_about_edits", lambda *args: Decisions(weights, labels, shares))
    run = tmp_path / "run"
    train(make_config(*SAFLEX, "saflex.penalty=1e6", "train.steps=4"), run)
    place = {edit.aug_id: number for number, edit in enumerate(edits.edits)}
    for row in rows(run):
        number = place[row["id"]]
        assert (row["weight"] > 0) == (number % 2 == 1)
        assert row["learned_label"] == number % 3
        soft = dict(map(tuple, row["soft_labels"]))
        assert soft == (pytest.approx({number % 3: 0.7, (number + 1) % 3: 0.3}) if number % 4 == 1 else {number % 3: 1.0})


def test_a_resumed_run_reads_its_decisions(make_config, edits, tmp_path, planted):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(make_config(*SAFLEX), whole)
    after = train_module._Trainer._after

    def stop(self, step, *args):
        after(self, step, *args)
        if step == 2:
            self.state.save(step, args[4], seconds=0.0)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module._Trainer, "_after", stop)
        train(make_config(*SAFLEX), run)
    assert len(planted) == 2
    train(make_config(*SAFLEX), run, resume=True)
    assert len(planted) == 2, "not asked again"
    assert [row["loss"] for row in rows(run, "metrics.jsonl") if "loss" in row] == [
        row["loss"] for row in rows(whole, "metrics.jsonl") if "loss" in row
    ]


def test_too_few_edits_are_all_kept(make_config, edits, tmp_path, capsys):
    run = tmp_path / "run"
    train(make_config(*SAFLEX, "train.steps=2"), run)
    assert "too few edits to calibrate: all are kept" in capsys.readouterr().out
    assert all(row["weight"] == 1 and row["learned_label"] == row["label"] for row in rows(run))
    assert all("posterior" not in row for row in rows(run)), "nothing was calibrated"


def test_without_cached_edits_gains_decide_and_say_so(make_config, tmp_path, capsys):
    options = ("augment.upstream=randaugment", "saflex.enabled=true", "train.steps=3")
    found = []
    for preset in ("posterior", "robust"):
        train(make_config(*options, f"saflex.preset={preset}"), tmp_path / preset)
        told = "saflex.evidence has no effect without augment.upstream=cache" in capsys.readouterr().out
        assert told == (preset == "posterior")
        found.append([row["loss"] for row in rows(tmp_path / preset, "metrics.jsonl") if "loss" in row])
    assert found[0] == found[1]


def test_decisions_keep_two_candidates():
    scores = torch.tensor([[5.0, 6.0, 5.0], [9.0, 0.0, 0.0]]).repeat(60, 1) + 0.5 * torch.randn(
        120, 3, generator=torch.Generator().manual_seed(0)
    )
    own_N = torch.zeros(120, dtype=torch.long)
    made = Decisions.of(decide({"zero-shot": scores}, own_N, min_edits=10), own_N)
    assert made.labels_N2.shape == (120, 2)
    assert bool(((made.shares_N >= 0.5) & (made.shares_N <= 1)).all())
    own_N1, none_N1 = made.posteriors_N2.split(1, dim=1)
    assert bool(((own_N1 >= 0) & (none_N1 >= 0) & (own_N1 + none_N1 <= 1.001)).all())
    assert own_N1[1::2].mean() > own_N1[::2].mean(), "the others look like another class"
