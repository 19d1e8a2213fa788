"""Every mistake of a user in `train` is one line that says what, found, expected and the fix; exit code 2."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from flyp_saflex.cli import main
from flyp_saflex.errors import ConfigError, DataError, ModelError, RunError
from flyp_saflex.training import checkpoint
from flyp_saflex.training.train import train

MISTAKES = {
    "model": (
        ["model.name=ViT-B-61", "model.pretrained=openai"],
        ModelError,
        r"ViT-B-61: open_clip has no such model; did you mean 'ViT-B-16'",
    ),
    "tag": (
        ["model.name=ViT-B-16", "model.pretrained=opemai"],
        ModelError,
        r"'opemai': no such tag of ViT-B-16.*did you mean 'openai'",
    ),
    "split": (["train.select_split=id_vol"], DataError, r"'id_vol'.*id_val"),
    "test split": (["train.select_split=night"], DataError, r"'night' cannot be used as a 'select' split"),
    "validation": (
        ["augment.upstream=flip", "saflex.enabled=true", "saflex.validation_split=id_test"],
        DataError,
        r"'id_test' cannot",
    ),
    "batch": (["train.batch_size=13"], ConfigError, r"train\.batch_size = 13 is larger than the training split \(12 images\)"),
    "blocks": (["train.freeze_image_blocks=7"], ModelError, r"freeze_image_blocks = 7: it has 2 blocks"),
    "shares": (
        ["train.accumulation=2", "augment.upstream=flip", "augment.per_train=0.5"],
        ConfigError,
        r"6 training and 3 augmented rows",
    ),
    "rates": (["train.min_lr=1"], ConfigError, r"train\.min_lr = 1 is above train\.lr = 0\.001"),
    "cache": (["augment.upstream=cache"], DataError, r"holds no entry, expected <key>/metadata\.jsonl"),
    "saflex": (
        ["augment.upstream=flip", "saflex.enabled=true", "saflex.average=1"],
        ConfigError,
        r"saflex\.average = 1: Expected `float` < 1",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_nothing_is_written(make_config, tmp_path, name):
    overrides, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message) as error:
        train(make_config(*overrides), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["augment.upstream=randaugmnt"], "randaugment"),
        (["augment.upstream=[]", "saflex.enabled=true"], "augment.upstream is empty"),
        (["train.batch_size=13"], "larger than the training split"),
        (["train.stepz=3"], "did you mean 'train.steps'"),
    ],
)
def test_command_line_says_it_in_one_line_with_exit_code_2(tiny_options, tmp_path, capsys, overrides, message):
    sets = [word for option in (*tiny_options, *overrides) for word in ("--set", option)]
    assert main(["train", "folder", *sets, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flyp-saflex: ")
    assert error.count("\n") == 1
    assert message in error


def test_missing_images_are_named(make_config, tiny_images_dir, tmp_path):
    shutil.rmtree(tiny_images_dir)
    with pytest.raises(DataError, match="tiny_images"):
        train(make_config(), tmp_path / "run")


def test_cache_of_another_dataset_is_refused(make_config, edits, tmp_path):
    shutil.move(edits.folder, edits.folder.parent / "other")
    manifest = edits.folder.parent / "other" / "metadata.jsonl"
    manifest.write_text(manifest.read_text().replace('"dataset":"folder"', '"dataset":"cub"'))
    with pytest.raises(DataError, match=r"was made from the dataset 'cub', but data\.name is 'folder'"):
        train(make_config("augment.upstream=cache"), tmp_path / "run")


@pytest.mark.slow
def test_weights_that_cannot_be_had_are_said_in_one_line(tmp_path, tiny_options):
    sets = [word for option in tiny_options for word in ("--set", option)]
    sets += ["--set", "model.name=ViT-B-32", "--set", "model.pretrained=laion2b_s34b_b79k"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flyp_saflex", "train", "folder", *sets, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "model.pretrained = laion2b_s34b_b79k: the weights cannot be loaded" in done.stderr
    assert "model.name=local-dir:FOLDER" in done.stderr
    assert len(done.stderr) < 600


def test_run_folder_below_a_file_is_refused(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        train(make_config(), tmp_path / "file" / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds 24 MB: one checkpoint of the tiny model with its optimiser (20 MB), not two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs rights that this process does not have")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_older_checkpoint(small_disk, tmp_path):
    state = {"weights": torch.ones(1_000_000)}
    checkpoint.save(small_disk, 1, state, keep=1)
    with pytest.raises(RunError, match=r"step-00000002\.pt: .*free disk space and go on with --resume") as error:
        checkpoint.save(small_disk, 2, {"weights": torch.ones(10_000_000)}, keep=1)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in small_disk.iterdir()) == ["step-00000001.pt"]
    step, loaded = checkpoint.load_newest(small_disk)
    assert step == 1
    assert torch.equal(loaded["weights"], state["weights"])


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(make_config, small_disk):
    config = make_config("train.steps=3", "train.checkpoint_every=1", "train.evaluate_every=1", "train.keep_checkpoints=1")
    with pytest.raises(RunError, match="free disk space and go on with --resume") as error:
        train(config, small_disk / "run")
    assert "\n" not in str(error.value)
    assert not list((small_disk / "run").rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert train(config, small_disk / "run", resume=True)["steps"] == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign"])
def test_damaged_files_of_a_run_are_one_line_for_every_command(make_config, tmp_path, capsys, damage):
    """best.safetensors and a checkpoint when training goes on, the head and the model when the run is evaluated."""
    run = tmp_path / "run"
    config = make_config("train.method=ce-linear", "train.steps=2", "train.checkpoint_every=1", "train.evaluate_every=1")
    train(config, run)

    def spoil(path):
        if damage == "foreign":
            torch.save({"x": 1}, path) if path.suffix == ".pt" else save_file({"x": torch.zeros(1)}, path)
        else:
            path.write_bytes({"cut": path.read_bytes()[:200], "empty": b"", "text": b"no tensors at all"}[damage])

    for name in ("head.safetensors", "model/open_clip_model.safetensors"):
        whole = (run / name).read_bytes()
        spoil(run / name)
        capsys.readouterr()
        assert main(["evaluate", str(run)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1, told
        assert name.rpartition("/")[2] in told or "model.name = " in told
        (run / name).write_bytes(whole)
    (run / "DONE").unlink()
    newest = max((run / "checkpoints").glob("step-*.pt"))
    for path in (run / "checkpoints" / "best.safetensors", newest):
        whole = path.read_bytes()
        spoil(path)
        with pytest.raises(RunError, match=r"best\.safetensors|checkpoint") as error:
            train(config, run, resume=True)
        assert "\n" not in str(error.value)
        path.write_bytes(whole)
    train(config, run, resume=True)
    assert (run / "DONE").is_file()
