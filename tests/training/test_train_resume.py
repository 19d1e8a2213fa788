"""A run that was killed, interrupted or stopped goes on as if nothing had happened, bit for bit."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from children import CPU_ONLY, start, with_overrides
from safetensors.torch import load_file
from vanishing import train_until

from flyp_saflex.errors import DataError, RunError
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training import train as train_module
from flyp_saflex.training.train import train

SAFLEX = (
    "augment.upstream=randaugment",
    "saflex.enabled=true",
    "saflex.preset=robust",
    "saflex.refresh_every=3",
    "saflex.average=0.5",
)


def read(run):
    """All that a run says about itself, but for the time it took."""
    folder = RunDir(run, lock=False)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in folder.read_rows()]
    return rows, folder.read_rows("augmented.jsonl")


def assert_same_run(one, other):
    for rows, expected in zip(read(one), read(other), strict=True):
        assert len(rows) == len(expected)
        for row, other_row in zip(rows, expected, strict=True):
            assert row == other_row
    for name in ("model/open_clip_model.safetensors", "head.safetensors", "checkpoints/best.safetensors"):
        assert (one / name).is_file() == (other / name).is_file()
        if (one / name).is_file():
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys()
            assert [key for key in a if not torch.equal(a[key], b[key])] == []


OPTIONS = {
    "head": ["saflex.scope=head"],
    "head, features renewed in turn": ["saflex.scope=head", "saflex.validation_renewed=1", "saflex.refresh_every=1"],
    "all, estimated": ["saflex.scope=all", "saflex.check_every=3"],
    "all": ["saflex.scope=all", "saflex.estimator=exact"],
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if "all" in name else []) for name in OPTIONS])
def test_resumed_run_equals_the_undisturbed_one(make_config, tmp_path, monkeypatch, name):
    config = make_config(
        *SAFLEX,
        *OPTIONS[name],
        "train.steps=8",
        "train.checkpoint_every=2",
        "train.evaluate_every=3",
        "train.log_augmented=true",
        "saflex.validation_rows=4",
    )
    train(config, tmp_path / "whole")
    train_until(monkeypatch, 5, config, tmp_path / "cut")  # checkpoint after 4: step 5 is taken again
    train(config, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_across_the_phases_of_lp_ft(make_config, tmp_path, monkeypatch, step):
    config = make_config(
        *SAFLEX,
        "train.method=lp-ft",
        "train.probe_steps=3",
        "train.steps=3",
        "train.checkpoint_every=1",
        "train.evaluate_every=1",
    )
    train(config, tmp_path / "whole")
    train_until(monkeypatch, step, config, tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_kill_before_the_first_checkpoint_starts_again(make_config, tmp_path, monkeypatch):
    config = make_config("train.steps=3")
    train(config, tmp_path / "whole")
    train_until(monkeypatch, 2, config, tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_kill_after_early_stopping_does_not_go_on_training(make_config, tmp_path, monkeypatch):
    config = make_config("train.steps=9", "train.evaluate_every=1", "train.patience=1", "train.lr=1e-9")
    train(config, tmp_path / "whole")
    train_until(monkeypatch, 2, config, tmp_path / "cut")
    assert train(config, tmp_path / "cut", resume=True)["steps"] == 2
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def words(options, run, *extra):
    return with_overrides("train", "folder", "--run-dir", str(run), *extra, overrides=options)


@pytest.mark.slow
def test_kill_9_and_resume_equals_the_undisturbed_run(make_config, tiny_options, edits, tmp_path):
    options = [
        *tiny_options,
        *SAFLEX,
        'augment.upstream=["cache", "randaugment"]',
        "train.steps=40",
        "train.checkpoint_every=3",
        "train.evaluate_every=7",
    ]
    run = tmp_path / "cut"
    child = start(words(options, run), tmp_path)
    # Some step after the first checkpoint: which one differs from machine to machine.
    child.wait_for(lambda: list(run.glob("checkpoints/step-*.pt")))
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (run / "DONE").exists()
    command = [sys.executable, "-m", "flyp_saflex", *words(options, run, "--resume")]  # a new Python, as after a reboot
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | CPU_ONLY, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    train(make_config(*options), tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_in_flight(make_config, tiny_options, tmp_path, number):
    options = [*tiny_options, *SAFLEX, "train.steps=30", "train.evaluate_every=4"]
    run = tmp_path / "cut"
    child = start(words(options, run), tmp_path)
    child.wait_for((run / "metrics.jsonl").is_file)
    child.send_signal(number)
    assert child.wait() == 130
    output = child.stdout + child.stderr
    assert "is saved, go on with --resume" in output
    assert "Traceback" not in output
    (saved,) = (run / "checkpoints").glob("step-*.pt")
    assert f"state after step {int(saved.stem[5:])} is saved" in output
    train(make_config(*options), run, resume=True)
    train(make_config(*options), tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole")


def test_a_run_that_is_there_is_not_overwritten(make_config, tmp_path):
    train(make_config("train.steps=1"), tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run: add --resume"):
        train(make_config("train.steps=1"), tmp_path / "run")
    with pytest.raises(RunError, match="is finished: evaluate it with flyp-saflex evaluate"):
        train(make_config("train.steps=1"), tmp_path / "run", resume=True)


def test_resume_with_another_recipe_names_the_option(make_config, tmp_path, monkeypatch):
    train_until(monkeypatch, 1, make_config("train.checkpoint_every=1"), tmp_path / "run")
    with pytest.raises(RunError, match=r"another recipe \(train\.lr: 0\.001 -> 0\.002\): undo the change"):
        train(make_config("train.checkpoint_every=1", "train.lr=2e-3"), tmp_path / "run", resume=True)
    with pytest.raises(RunError, match=r"--limit: None -> 5"):
        train(make_config("train.checkpoint_every=1", "train.batch_size=6"), tmp_path / "run", resume=True, limit=5)
    train(make_config("train.checkpoint_every=2", "data.workers=1"), tmp_path / "run", resume=True)  # changes no digit
    assert "checkpoint_every = 2" in (tmp_path / "run" / "config.toml").read_text()


def test_a_folder_in_use_is_refused(make_config, tmp_path):
    with RunDir(tmp_path / "run"), pytest.raises(RunError, match="is in use by another process: wait for it"):
        train(make_config(), tmp_path / "run")


def test_too_many_unreadable_images_stop_the_run_and_mending_them_lets_it_go_on(make_config, tiny_images_dir, tmp_path):
    config = make_config("train.batch_size=12", "train.steps=2", "data.max_unreadable=0.1", "train.select_split=")
    names = [sample.path for sample in train_module.prepare(config).dataset.train.samples][:2]
    whole = [path.read_bytes() for path in names]
    for path in names:
        path.write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"2 training images cannot be read, more than data.max_unreadable = 0\.1 allows"
    ) as error:
        train(config, tmp_path / "run")
    assert "state after step 1 is saved" in str(error.value)
    assert str(names[0]) in str(error.value) or str(names[1]) in str(error.value)
    assert set(json.loads((tmp_path / "run" / "env.json").read_text())["unreadable"]) == {str(path) for path in names}
    for path, data in zip(names, whole, strict=True):
        path.write_bytes(data)
    assert train(config, tmp_path / "run", resume=True) | {"seconds": 0} == {
        "steps": 2,
        "seconds": 0,
        "best": None,
        "unreadable": 0,
    }


def test_an_unreadable_image_is_replaced_counted_and_listed(make_config, tmp_path, capsys):
    config = make_config("train.batch_size=12", "data.max_unreadable=0.1", "train.select_split=", "train.steps=2")
    broken = train_module.prepare(config).dataset.train.samples[3].path
    broken.write_bytes(broken.read_bytes()[:200])
    assert train(config, tmp_path / "run")["unreadable"] == 1
    listed = json.loads((tmp_path / "run" / "env.json").read_text())["unreadable"]
    assert list(listed) == [str(broken)]
    assert "cannot be decoded" in listed[str(broken)]
    out = capsys.readouterr().out
    assert out.count("skipped:") == 1
    assert "1 images could not be read and were replaced" in out


def test_a_diverged_run_says_where_and_keeps_the_state_before(make_config, tmp_path, monkeypatch):
    """A NaN in the third step: the state after two is saved, the batch is named, and resuming equals an undisturbed run."""
    config = make_config(*SAFLEX, "train.select_split=", "saflex.refresh_every=1")
    train(config, tmp_path / "whole")
    build = train_module.RowBuilder.build

    def poison(self, batch, step, part):
        rows = build(self, batch, step, part)
        if step == 2:
            rows.inputs = rows.inputs * float("nan")
        return rows

    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match=r"step 3: the loss is nan \(train\.max_loss = 10000\)") as error,
    ):
        patch.setattr(train_module.RowBuilder, "build", poison)
        train(config, tmp_path / "run")
    row = RunDir(tmp_path / "run", lock=False).read_rows()[-1]
    assert (row["step"], row["diverged"], len(row["batch"])) == (3, True, 12)
    assert row["batch"][0] in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002.pt"]
    train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_loss_above_the_limit_stops_the_run(make_config, tmp_path):
    with pytest.raises(RunError, match=r"step 1: the loss is \d.* \(train\.max_loss = 0\.01\)"):
        train(make_config("train.max_loss=0.01"), tmp_path / "run")


def test_a_run_goes_on_with_its_own_classes_and_images_only(make_config, tiny_images_dir, tmp_path, monkeypatch, capsys):
    config = make_config("train.steps=3", "train.checkpoint_every=1")
    train_until(monkeypatch, 2, config, tmp_path / "run")
    for domain in ("day", "night"):
        (tiny_images_dir / domain / "circle").rename(tiny_images_dir / domain / "zz_circle")
    with pytest.raises(RunError, match=r"was started on other data \(class 0 was 'circle' and is 'square'\)"):
        train(config, tmp_path / "run", resume=True)
    for domain in ("day", "night"):
        (tiny_images_dir / domain / "zz_circle").rename(tiny_images_dir / domain / "circle")
    image = tiny_images_dir / "night" / "square" / "0.png"
    image.rename(tmp_path / "away.png")
    with pytest.raises(RunError, match=r"other data \(split 'night': 24 images became 23\)"):
        train(config, tmp_path / "run", resume=True)
    (tmp_path / "away.png").rename(image)
    (tmp_path / "run" / "data.json").unlink()  # a run of an older version goes on, and knows its data from then on
    assert train(config, tmp_path / "run", resume=True)["steps"] == 3
    assert "has no data.json" in capsys.readouterr().out
    assert (tmp_path / "run" / "data.json").is_file()
