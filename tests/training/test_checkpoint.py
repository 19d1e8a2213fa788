"""Checkpoints are whole or absent, and only the newest are kept."""

import os

import pytest
import torch

from flyp_saflex.errors import RunError
from flyp_saflex.training import checkpoint

STATE = {"tensor": torch.arange(3.0), "nested": {"number": 0.1, "none": None, "text": "x"}, "list": [1, 2]}


def test_what_was_saved_is_loaded(tmp_path):
    path = checkpoint.save(tmp_path / "checkpoints", 7, STATE, keep=2)
    assert path.name == "step-00000007.pt"
    step, state = checkpoint.load_newest(tmp_path / "checkpoints")
    assert step == 7
    assert torch.equal(state.pop("tensor"), STATE["tensor"])
    assert state == {key: value for key, value in STATE.items() if key != "tensor"}


def test_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    for step in (2, 10, 9, 100):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    assert checkpoint.saved_steps(tmp_path) == [10, 100]
    assert checkpoint.load_newest(tmp_path) == (100, {"step": 100})


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "missing") is None


def test_an_interrupted_write_is_invisible(tmp_path):
    class Unwritable:
        def __reduce__(self):
            raise RuntimeError("the write stops here")

    checkpoint.save(tmp_path, 1, STATE, keep=1)
    with pytest.raises(RunError, match=r"cannot write .*step-00000002\.pt: the write stops here; free disk space"):
        checkpoint.save(tmp_path, 2, {"tensor": torch.ones(3), "bad": Unwritable()}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    (tmp_path / ".step-00000003.pt.1.tmp").write_bytes(b"half of it")  # what a kill leaves
    assert checkpoint.load_newest(tmp_path)[0] == 1


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path):
    checkpoint.save(tmp_path, 1, STATE, keep=2)
    path = checkpoint.save(tmp_path, 2, STATE, keep=2)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        RunError, match=r"step-00000002\.pt cannot be read \(.*\): delete it to resume from the one before"
    ) as error:
        checkpoint.load_newest(tmp_path)
    assert "\n" not in str(error.value)
    path.unlink()
    assert checkpoint.load_newest(tmp_path)[0] == 1


def test_a_checkpoint_runs_no_code_when_it_is_read(tmp_path):
    torch.save({"surprise": print}, tmp_path / "step-00000001.pt")
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load_newest(tmp_path)


def test_unfinished_files_of_a_killed_run_are_tidied_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("step-00000002.pt", "best.safetensors", "note.tmp", ".hidden")]
    left = [tmp_path / name for name in (".step-00000004.pt.4711.tmp", ".step-00000002.pt.1.tmp", ".best.safetensors.tmp")]
    for path in (*kept, *left):
        path.write_bytes(b"x")
    checkpoint.tidy(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    checkpoint.tidy(tmp_path / "nowhere")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("size", [1, 3_000_000])
def test_a_full_disk_is_named_and_the_older_checkpoint_stays(size, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(1)}, keep=1)
    (tmp_path / f".step-00000002.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*step-00000002.pt: No space left on device; free disk space") as error:
        checkpoint.save(tmp_path, 2, {"x": torch.zeros(size)}, keep=1)
    assert "\n" not in str(error.value)
    assert checkpoint.saved_steps(tmp_path) == [1]


def test_a_file_of_something_else_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "step-00000001.pt")
    with pytest.raises(RunError, match=r"step-00000001.pt cannot be read \(it holds list"):
        checkpoint.load_newest(tmp_path)


def test_an_environment_of_any_content_has_a_limit_or_none(tmp_path):
    for text, limit in (('{"limit": 3}', 3), ('{"limit": "x"}', None), ("[]", None), ("[" * 50_000, None), ("{", None)):
        (tmp_path / "env.json").write_text(text)
        assert checkpoint.limit_of(tmp_path) == limit
