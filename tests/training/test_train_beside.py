"""Runs with terms beside the objective: each pulls where it should, in every kind of step, and resumes bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from vanishing import train_until

from flyp_saflex.errors import ConfigError
from flyp_saflex.step.extra_terms import Teacher
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.setup import prepare
from flyp_saflex.training.train import train


def weights(run):
    return load_file(run / "model" / "open_clip_model.safetensors")


def losses(run):
    return [row["loss"] for row in RunDir(run, lock=False).read_rows() if "loss" in row]


def distance(run, start):
    return sum(float((value - start[name]).square().sum()) for name, value in weights(run).items())


@pytest.mark.parametrize(
    ("option", "share"),
    [("train.l2_sp=30", 0.9), ("train.distill=features", 0.9), ("train.distill=logits", 0.98)],
    ids=["l2-sp", "features", "logits"],
)
def test_a_pull_towards_the_start_keeps_the_weights_nearer(make_config, tiny_clip_dir, tmp_path, option, share):
    start = load_file(tiny_clip_dir / "open_clip_model.safetensors")
    common = ("train.steps=12", "train.distill_weight=50", "train.select_split=")
    train(make_config(*common), tmp_path / "plain")
    train(make_config(*common, option), tmp_path / "pulled")
    assert losses(tmp_path / "pulled")[0] == pytest.approx(losses(tmp_path / "plain")[0], rel=1e-5), "no distance at the start"
    assert distance(tmp_path / "pulled", start) < share * distance(tmp_path / "plain", start)
    assert ("l2_sp" in RunDir(tmp_path / "pulled", lock=False).read_rows()[-1]) == option.startswith("train.l2_sp")


STEPS = {
    "one pass": (),
    "GradCache": ("train.rows_at_once=4",),
    "select first": ("saflex.select=always", "augment.filter=random", "augment.keep_fraction=1"),
}


@pytest.mark.parametrize(
    "terms",
    [
        ("train.distill=logits", "train.distill_teacher=ema", "train.distill_decay=0.5"),
        ("train.distill=features", "train.distill_teacher=ema", "train.distill_decay=0.5"),
        ("train.extra_loss=cross-entropy",),
        ("train.extra_loss=supcon",),
        ("train.method=ce-linear", "train.extra_loss=supcon", "train.distill=logits"),
    ],
    ids=" ".join,
)
def test_every_kind_of_step_takes_the_same_steps(make_config, tmp_path, terms):
    runs = []
    for number, kind in enumerate(STEPS.values()):
        runs.append(tmp_path / str(number))
        train(make_config("augment.upstream=flip", "train.lr=1e-4", "train.steps=3", *terms, *kind), runs[-1])
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-4)


def test_a_run_with_an_ema_teacher_resumes_bit_for_bit(make_config, tmp_path, monkeypatch):
    config = make_config(
        "train.distill=features",
        "train.distill_teacher=ema",
        "train.distill_decay=0.5",
        "train.l2_sp=1",
        "train.checkpoint_every=2",
        "train.steps=6",
    )
    train(config, tmp_path / "whole")
    train_until(monkeypatch, 3, config, tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_average_by_hand(make_config):
    setup = prepare(make_config("train.distill=features", "train.distill_teacher=ema", "train.distill_decay=0.75"))
    teacher, student = setup.terms.teacher, setup.task.network
    assert isinstance(teacher, Teacher)
    before = teacher.network.clip.visual.proj.clone()
    with torch.no_grad():
        student.clip.visual.proj += 4
    teacher.follow(student)
    torch.testing.assert_close(teacher.network.clip.visual.proj, before + 1)
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())


def test_gains_do_not_change_with_distillation_and_l2_sp(make_config, tmp_path):
    """At the first step the weights are equal, and so are the decisions."""
    common = ("augment.upstream=flip", "saflex.enabled=true", "saflex.preset=robust", "train.steps=1", "train.log_augmented=true")
    train(make_config(*common), tmp_path / "plain")
    train(make_config(*common, "train.distill=logits", "train.l2_sp=1"), tmp_path / "pulled")
    one, other = (RunDir(tmp_path / name, lock=False).read_rows("augmented.jsonl") for name in ("plain", "pulled"))
    assert one == other


def test_what_cannot_be_combined_is_refused_in_one_line(make_config):
    with pytest.raises(ConfigError, match=r"gains do not see: set saflex\.enabled=false"):
        prepare(make_config("augment.upstream=flip", "saflex.enabled=true", "saflex.preset=robust", "train.extra_loss=supcon"))
    with pytest.raises(ConfigError, match=r"cross-entropy is the loss of train\.method = ce-text already"):
        prepare(make_config("train.method=ce-text", "train.extra_loss=cross-entropy"))
    with pytest.raises(ConfigError, match="did you mean 'supcon'"):
        make_config("train.extra_loss=subcon")
