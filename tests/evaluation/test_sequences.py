"""Bursts: mean probabilities and most frequent label per sequence, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flyp_saflex.cli import main
from flyp_saflex.evaluation.metrics import Scores, sequence_row


def row(logits, labels, sequences):
    return sequence_row(Scores.of(np.log(np.array(logits)), labels, [""] * len(labels)), sequences)


def test_a_burst_is_judged_by_the_mean_of_its_probabilities():
    logits = [[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.7, 0.3]]  # burst a: means 0.43, 0.57, though two of three say 0
    found = row(logits, [1, 1, 1, 0], ["a", "a", "a", "b"])["sequences"]
    assert found == {"n": 2, "mixed": 0, "accuracy": 1.0, "macro_f1": 1.0}


def test_the_most_frequent_label_is_the_bursts_and_mixed_bursts_are_counted():
    found = row([[0.9, 0.1]] * 4, [0, 0, 1, 1], ["a", "a", "a", "b"])["sequences"]
    assert (found["n"], found["mixed"], found["accuracy"]) == (2, 1, 0.5)


def test_images_without_a_sequence_are_bursts_of_one_and_without_any_there_is_no_row():
    assert row([[0.9, 0.1]] * 4, [0, 1, 0, 0], ["", "", "a", "a"])["sequences"]["n"] == 3
    assert row([[0.9, 0.1]] * 2, [0, 1], ["", ""]) == {}


def test_the_order_of_images_does_not_matter():
    rng = np.random.default_rng(0)
    logits, labels = rng.dirichlet(np.ones(3), 30), rng.integers(0, 3, 30)
    sequences = [f"s{n}" for n in rng.integers(0, 9, 30)]
    turn = rng.permutation(30)
    assert row(logits, labels, sequences) == row(logits[turn], labels[turn], [sequences[n] for n in turn])


def test_evaluate_scores_the_bursts_of_a_table(tmp_path: Path, tiny_options, tiny_images_dir: Path, capsys):
    lines = ["path,label,split,burst"]
    for name in ("circle", "square", "stripes"):
        for number in range(8):
            split = ("train", "train", "train", "train", "id_val", "id_val", "test", "test")[number]
            lines.append(f"day/{name}/{number}.png,{name},{split},{name}{number // 2}")
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    data = ["data.name=table", f"data.root={tiny_images_dir}", f"data.table={tmp_path / 't.csv'}", "data.split_column=split"]
    sets = [o for o in tiny_options if not o.startswith("data.")] + [*data, "data.sequence_column=burst"]
    run = tmp_path / "run"
    assert main(["train", "folder", *(f"--set={option}" for option in sets), f"--run-dir={run}"]) == 0
    assert main(["evaluate", str(run)]) == 0
    rows = {r["split"]: r for r in json.loads((run / "results.json").read_text(encoding="utf-8"))["results"]}
    assert rows["test"]["n"] == 6
    assert rows["test"]["sequences"]["n"] == 3
    assert rows["test"]["sequences"]["mixed"] == 0
    assert "per burst on test (alpha 1): accuracy" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--wilds-submission"]) == 2
    assert "--wilds-submission: data.name = table, expected iwildcam" in capsys.readouterr().err
