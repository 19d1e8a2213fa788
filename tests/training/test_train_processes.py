"""Two processes that share a batch train what one process trains on the whole batch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import CPU_ONLY, run_ranks, start_ranks, with_overrides
from children import run as run_child
from PIL import Image
from safetensors.torch import load_file

from flyp_saflex.cli import main
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.train import train

pytestmark = pytest.mark.slow

CASES = {
    "Mixup of rows of both": ["augment.upstream=mixup", "saflex.enabled=true", "saflex.preset=paper-log"],
    "CutMix of rows of both, in parts, one column per row": [
        'augment.upstream=["flip", "cutmix"]',
        "train.proxies=batch",
        "train.accumulation=2",
        "saflex.enabled=true",
        "saflex.preset=robust",
    ],
    "a random filter drops the same rows": ["augment.upstream=randaugment", "augment.filter=random", "saflex.enabled=true"],
    "evidence decides, each process looks at half of the edits": [
        "augment.upstream=cache",
        "cache.key=third_swapped",
        "saflex.enabled=true",
    ],
    "head scope": ["augment.upstream=randaugment", "saflex.enabled=true", "saflex.scope=head"],
    "all parameters, one column per row, half the edits": [
        "augment.upstream=cache",
        "augment.per_train=0.5",
        "saflex.enabled=true",
        "saflex.preset=robust",
        "saflex.scope=all",
        "train.proxies=batch",
        "train.freeze_image_blocks=1",
    ],
    "all parameters, estimated and compared": [
        "augment.upstream=randaugment",
        "saflex.enabled=true",
        "saflex.scope=all",
        "saflex.check_every=4",
    ],
    "linear probe, then finetuning in parts": [
        "train.method=lp-ft",
        "train.probe_steps=3",
        "train.steps=5",
        "train.accumulation=2",
        "augment.upstream=flip",
        "saflex.enabled=true",
        "train.freeze_text=true",
    ],
    "select, then train: other numbers of rows kept on each": [
        "augment.upstream=randaugment",
        "saflex.enabled=true",
        "saflex.weight_rule=sum",
        "saflex.select=always",
    ],
    "features first, gradients in parts": [
        "augment.upstream=randaugment",
        "saflex.enabled=true",
        "saflex.weight_rule=sum",
        "saflex.scope=all",
        "train.proxies=batch",
        "train.accumulation=2",
        "train.rows_at_once=3",
    ],
    "distillation of logits from a running average, whose columns and rows are those of both": [
        "augment.upstream=randaugment",
        "saflex.enabled=true",
        "saflex.weight_rule=sum",
        "train.distill=logits",
        "train.distill_teacher=ema",
        "train.distill_decay=0.5",
        "train.distill_weight=20",
    ],
    "distillation of features, features first, and L2-SP": [
        "augment.upstream=randaugment",
        "saflex.enabled=true",
        "saflex.weight_rule=sum",
        "train.distill=features",
        "train.distill_weight=20",
        "train.rows_at_once=3",
        "train.l2_sp=1",
    ],
    "SupCon among the rows of both that the filter keeps": [
        "augment.upstream=randaugment",
        "augment.filter=random",
        "train.extra_loss=supcon",
    ],
    "LoRA on both towers": [
        "augment.upstream=randaugment",
        "saflex.enabled=true",
        "saflex.weight_rule=sum",
        "saflex.scope=all",
        "train.adapter=lora",
        "train.lora_rank=2",
    ],
}


def write_third_swapped(config):
    """Twelve edits of every training image, enough to calibrate evidence; four show an image of another class."""
    samples = load_dataset(config.data, seed=config.seed).train.samples
    cache = AugmentCache.create(Path(config.cache.root) / "folder" / "third_swapped", "folder")
    for sample in samples:
        others = [other for other in samples if other.label != sample.label]
        for number in range(12):
            shown = sample if number < 8 else others[number % len(others)]
            name = AugmentCache.file_name(sample.sample_id, "", number)
            row = {"file_name": name, "source_id": sample.sample_id, "label": sample.label, "instruction": ""}
            with Image.open(shown.path) as image:
                cache.append(image.point(lambda value, number=number: value * (20 - number) // 20), row)
    cache.finish()


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(make_config, tiny_options, edits, tmp_path, case):
    """To 1e-5: sums over the batch are taken in another order. A large epsilon keeps AdamW from blowing that up."""
    options = [*tiny_options, "train.steps=10", "train.eps=1e-3", "train.batch_size=8", "train.log_augmented=true", *CASES[case]]
    if "evidence" in case:
        write_third_swapped(make_config())
    train(make_config(*options), tmp_path / "one")
    words = with_overrides("train", "folder", "--run-dir", str(tmp_path / "two"), overrides=options)
    out, _ = run_ranks(words, tmp_path)
    assert "2 processes" in out
    assert out.count("done:") == 1, "only the main process prints"
    one, two = (RunDir(tmp_path / name, lock=False) for name in ("one", "two"))
    losses = [[row["loss"] for row in run.read_rows() if "loss" in row] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(losses[0]) == (8 if "lp-ft" in str(options) else 10)
    for name in ("model/open_clip_model.safetensors", "head.safetensors"):
        assert (one.path / name).is_file() == (two.path / name).is_file()
        if (one.path / name).is_file():
            a, b = load_file(one.path / name), load_file(two.path / name)
            for key in a:
                torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    rows = [list(run.read_rows("augmented.jsonl")) for run in (one, two)]
    decided = [
        sorted((row["step"], row["id"], row.get("learned_label", row["label"]) if row["weight"] > 0 else -1) for row in of_run)
        for of_run in rows
    ]
    assert decided[0] == decided[1]
    if "evidence" in case:
        assert {row["learned_label"] == row["label"] for row in rows[0]} == {True, False}, "evidence must relabel some"
        return
    assert {row["weight"] > 0 for row in rows[0]} == {True, False}, "SAFLEX must have something to decide"


def test_an_image_that_one_process_cannot_read_stops_both(make_config, tiny_options, tmp_path):
    from flyp_saflex.training.setup import prepare

    broken = prepare(make_config()).dataset.train.samples[0].path
    broken.write_bytes(b"no image")
    options = [*tiny_options, "data.max_unreadable=0", "train.select_split=", "train.batch_size=12"]
    words = with_overrides("train", "folder", "--run-dir", str(tmp_path / "run"), overrides=options)
    _, err = run_ranks(words, tmp_path, expected=2)
    assert "state after step 1 is saved" in err
    assert (tmp_path / "run" / "checkpoints" / "step-00000001.pt").is_file()


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "ended or cannot be reached"), (signal.SIGSTOP, "did not answer in time (train.process_timeout_s)")],
)
def test_a_lost_process_ends_the_other_in_one_line(tiny_options, tmp_path, number, said):
    changes = ["train.steps=10000", "train.checkpoint_every=1", "train.select_split=", "train.process_timeout_s=20"]
    run = tmp_path / "run"
    words = with_overrides("train", "folder", "--run-dir", str(run), overrides=[*tiny_options, *changes])
    left, lost = start_ranks(words, tmp_path)
    try:
        left.wait_for(lambda: list((run / "checkpoints").glob("step-*.pt")))
        lost.send_signal(number)
        code = left.wait()
    finally:
        lost.process.kill()
        lost.process.join()
    told = left.stderr
    assert code == 2, told
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("flyp-saflex:")]
    assert f"another process of this run {said}" in line
    assert "go on with --resume" in line
    with RunDir(run) as folder:  # it is not locked any more
        assert folder.read_config().train.steps == 10000


def test_a_launcher_that_starts_one_process_is_told(tmp_path, capsys):
    """`accelerate launch --num_processes 2` starts one process where there is no GPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "flyp_saflex", "evaluate"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "none"], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert "torchrun --nproc-per-node N -m flyp_saflex evaluate none" in done.stderr
    main(["evaluate", str(tmp_path / "none")])
    assert "torchrun" not in capsys.readouterr().err


def test_evaluation_in_two_processes_gives_every_digit_of_one(make_config, tiny_options, tmp_path):
    run = tmp_path / "run"
    train(make_config("train.select_split="), run)
    words = ["evaluate", str(run), "--set", "evaluate.batch_size=2", "--set", "data.max_unreadable=0.2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "flyp_saflex", *words]
    results = []
    for count in (1, 2):
        if count == 1:
            assert run_child(words, tmp_path).returncode == 0
        else:
            done = subprocess.run(launch, capture_output=True, text=True, env=os.environ | CPU_ONLY, check=False, timeout=280)
            assert done.returncode == 0, done.stderr
        results.append(((run / "results.json").read_bytes(), *(path.read_bytes() for path in sorted(run.glob("predictions/*")))))
        (run / "results.json").unlink()
    assert len(results[0]) > 2
    assert results[0] == results[1]
