"""Progress in log files: lines at intervals, and none on a terminal."""

from __future__ import annotations

import sys

import pytest

from flyp_saflex import runtime
from flyp_saflex.runtime import ProgressLines, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_every_interval_with_rate_and_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines("training", total=400, done=100, unit="steps")
    for step in range(101, 221):  # two steps a second, for a minute
        clock[0] += 0.5
        lines.update(step, "loss 1.234")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training: 160 of 400 steps, loss 1.234, 2 steps a second, 2:00 left",
        "training: 220 of 400 steps, loss 1.234, 2 steps a second, 1:30 left",
    ]


def test_a_terminal_and_other_processes_get_no_line(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = ProgressLines("training", total=4, done=0, unit="steps", shown=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for lines in (silent, ProgressLines("training", total=4, done=0, unit="steps")):
        clock[0] += 100
        lines.update(1)
        lines.say("something")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03")])
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text
