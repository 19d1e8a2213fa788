"""Seconds of edits: a batch's are shared evenly, a kill costs a row of times at most, and a broken row is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flyp_saflex.errors import DataError
from flyp_saflex.storage import edit_times as module
from flyp_saflex.storage.edit_times import EditTimes, seconds_of_edits


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Have the clock show the given seconds, one after the other."""

    def show(*seconds: float) -> None:
        shown = iter(seconds)
        monkeypatch.setattr(module.time, "monotonic", lambda: next(shown))

    return show


def test_seconds_are_those_since_the_last_batch_shared_evenly(tmp_path: Path, clock):
    clock(10.0, 16.0, 17.0, 21.0)
    times = EditTimes(tmp_path, "cpu")
    times.add(["a", "b", "c"])
    times.add([])
    times.add(["d"])
    assert seconds_of_edits(tmp_path) == {"a": 2.0, "b": 2.0, "c": 2.0, "d": 4.0}
    assert [json.loads(line)["device"] for line in (tmp_path / "times.jsonl").read_text().splitlines()] == ["cpu", "cpu"]


def test_writers_have_files_of_their_own_and_times_of_one_edit_add_up(tmp_path: Path, clock):
    clock(0.0, 0.0, 1.0, 3.0)
    one, two = (EditTimes(tmp_path, "cpu", index=index, count=2) for index in range(2))
    one.add(["a"])
    two.add(["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["times-0-of-2.jsonl", "times-1-of-2.jsonl"]
    assert seconds_of_edits(tmp_path) == {"a": 4.0}


def test_a_half_row_of_a_killed_writer_is_mended(tmp_path: Path, clock):
    clock(0.0, 1.0, 0.0, 2.0)
    EditTimes(tmp_path, "cpu").add(["a"])
    with open(tmp_path / "times.jsonl", "ab") as file:
        file.write(b'{"aug_ids":["b"],"sec')
    EditTimes(tmp_path, "cpu").add(["c"])
    assert seconds_of_edits(tmp_path) == {"a": 1.0, "c": 2.0}


def test_a_broken_row_is_told_in_one_line(tmp_path: Path):
    (tmp_path / "times.jsonl").write_text('{"aug_ids": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"times\.jsonl line 1: no row of times .*; remove the line") as caught:
        seconds_of_edits(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_link_in_place_of_the_log_is_refused(tmp_path: Path):
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "times.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="symbolic link"):
        EditTimes(tmp_path / "entry", "cpu")
