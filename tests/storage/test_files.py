"""Safe files: writes are whole or invisible, lines survive a kill, a file is replaced at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flyp_saflex.errors import RunError
from flyp_saflex.storage.files import (
    WITHOUT_LOCKS,
    append_rows,
    atomic_write,
    entry_lock,
    held_by_other,
    hold,
    mend_tail,
    replace_lines,
    whole_lines,
    write_json,
)
from flyp_saflex.storage.run_folder import RunDir


def test_interrupted_write_is_invisible(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(error), atomic_write(path) as file:
            file.write("half a li")
            file.flush()
            raise error
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    code = f"""
import os, pathlib
from flyp_saflex.storage.files import atomic_write
with atomic_write(pathlib.Path({str(path)!r})) as file:
    file.write("half")
    file.flush()
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 9
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


def test_a_full_disk_is_a_run_error_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"results\.json: No space left on device; free disk space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_rows_are_appended_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}])
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        append_rows(path, [{"a": 2}, {"a": 3}])
    append_rows(path, [])
    assert path.read_bytes() == b'{"a":1}\n'


def test_a_line_that_a_kill_cut_off_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n\n{"a":2}\n{"a"')
    assert whole_lines(path) == [b'{"a":1}', b'{"a":2}']
    mend_tail(path)
    assert path.read_bytes() == b'{"a":1}\n\n{"a":2}\n'
    assert whole_lines(tmp_path / "missing") == []


def test_replacing_lines_by_none_removes_the_file_unless_it_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    replace_lines(path, [b"one", b"two"])
    assert path.read_bytes() == b"one\ntwo\n"
    before = path.stat().st_mtime_ns
    replace_lines(path, [b"one", b"two"])
    assert path.stat().st_mtime_ns == before, "an equal file is left alone"
    replace_lines(path, [], keep_empty=True)
    assert path.read_bytes() == b""
    replace_lines(path, [])
    assert not path.exists()


def test_a_killed_process_frees_its_lock_and_its_children_do_not_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"""
import os, pathlib, time
from flyp_saflex.storage.files import hold
lock = hold(pathlib.Path({str(path)!r}))
if os.fork() == 0:
    os.close(1)
    time.sleep(60)
print(lock.is_locked, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "True\n"
            assert held_by_other(path) is True
            holder.kill()
            holder.wait(timeout=60)
            assert held_by_other(path) is False
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


@pytest.mark.parametrize("code", sorted(WITHOUT_LOCKS))
def test_a_file_system_without_locks_is_worked_on_without_them(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with entry_lock(tmp_path) as locked:
        assert not locked
    assert held_by_other(tmp_path / ".lock") is None
    with RunDir(tmp_path / "run") as run, RunDir(tmp_path / "run"):
        run.mark_done()
    assert run.done


def test_a_lock_file_of_another_user_is_taken_for_a_held_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("os.open", refuse)
    assert held_by_other(tmp_path / "lock") is True
    with pytest.raises(PermissionError):
        hold(tmp_path / "lock")
