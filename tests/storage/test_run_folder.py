"""The run folder: the lock, metrics that survive a kill."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from flyp_saflex.config import Config
from flyp_saflex.errors import RunError
from flyp_saflex.storage.files import write_json
from flyp_saflex.storage.results import read_results
from flyp_saflex.storage.run_folder import RunDir, environment


def test_a_folder_that_cannot_be_written_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=r"file.run cannot be written: .*--run-dir"):
        RunDir(tmp_path / "file" / "run")
    with pytest.raises(RunError, match=r"cannot write .*missing.x\.json"):
        write_json(tmp_path / "missing" / "x.json", {})


def test_one_process_holds_a_run_folder(tmp_path: Path) -> None:
    code = f"""
import pathlib
from flyp_saflex.storage.run_folder import RunDir
with RunDir(pathlib.Path({str(tmp_path)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="in use by another process"):
            RunDir(tmp_path)
        RunDir(tmp_path, lock=False)  # the other processes of a distributed run
        holder.stdin.write("\n")
        holder.stdin.close()
        assert holder.wait(timeout=60) == 0
    with RunDir(tmp_path):
        pass
    with RunDir(tmp_path):  # released on leaving
        pass


def test_metrics_survive_a_kill_and_are_rewound(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run:
        assert run.read_rows() == []
        for step in (10, 20, 30):
            run.append_metrics({"step": step, "loss": math.nan if step == 20 else 0.1 * step})
            run.append_rows([{"step": step, "weight": 1.0}, {"step": step, "weight": 0.0}])
        with open(run.path / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 40, "lo')  # cut off by a kill
        assert [row["step"] for row in run.read_rows()] == [10, 20, 30]
        assert run.read_rows()[1]["loss"] is None
        run.rewind(20)
        run.append_metrics({"step": 30, "loss": 1.5})
        rows = run.read_rows()
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[0]["loss"] == 0.1 * 10  # to the last digit
    assert rows[2]["loss"] == 1.5
    assert [row["step"] for row in run.read_rows("augmented.jsonl")] == [10, 10, 20, 20]


def test_config_round_trip_and_done(tmp_path: Path) -> None:
    config = Config(recipe="mine", seed=5)
    with RunDir(tmp_path / "run") as run:
        with pytest.raises(RunError, match=r"is not a run folder: it has no config\.toml"):
            run.read_config()
        run.write_config(config)
        assert run.read_config() == config
        assert not run.done
        run.mark_done()
        assert run.done


def test_environment_names_versions_and_command(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run:
        run.write_environment(device="cpu")
        written = json.loads((run.path / "env.json").read_text(encoding="utf-8"))
    assert written["device"] == "cpu"
    assert written["command"] == sys.argv
    assert {"torch", "open_clip_torch", "numpy"} <= set(environment()["packages"])


def test_seconds_of_a_stage_are_noted_beside_the_environment(tmp_path):
    with RunDir(tmp_path / "run") as run:
        run.note_seconds("evaluation", "test", 1.0)
        run.write_environment(seconds=5.0)
        run.note_seconds("evaluation", "test", 2.0)
        run.note_seconds("evaluation", "val", 0.5)
    values = json.loads((tmp_path / "run" / "env.json").read_text())
    assert values["seconds"] == 5.0
    assert values["stage_seconds"] == {"evaluation": {"test": 2.0, "val": 0.5}}


@pytest.mark.parametrize(
    "text", ["[1, 2]", "7", "{", '{"stage_seconds": 5}', '{"stage_seconds": {"evaluation": "x"}}', "[" * 50_000]
)
def test_a_damaged_environment_costs_only_itself(text: str, tmp_path: Path) -> None:
    (tmp_path / "env.json").write_text(text)
    RunDir(tmp_path, lock=False).note_seconds("evaluation", "id_test", 1.5)
    assert json.loads((tmp_path / "env.json").read_text())["stage_seconds"] == {"evaluation": {"id_test": 1.5}}


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"step": ', b"[1]", b"7", b"[" * 50_000])
def test_a_damaged_row_is_named_and_no_row_after_it_is_lost(line: bytes, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    before = log.read_bytes()
    run = RunDir(tmp_path, lock=False)
    for read in (run.read_rows, lambda: run.rewind(1)):
        with pytest.raises(RunError, match=r"metrics.jsonl line 2: no valid row") as error:
            read()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    assert log.read_bytes() == before


ROW = {"split": "id_test", "role": "test", "shift": "id", "wise_alpha": 1.0, "n": 4, "accuracy": 0.5, "macro_f1": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "\xff",
        "{",
        "[]",
        "7",
        "[" * 50_000,
        '{"results": [], "recipe": "a", "seed": Infinity}',
        '{"results": 3, "recipe": "a", "seed": 1}',
        *(json.dumps({"recipe": "a", "seed": 1, "results": [{k: v for k, v in ROW.items() if k != name}]}) for name in ROW),
        *(json.dumps({"recipe": "a", "seed": 1, "results": [{**ROW, name: float("nan")}]}) for name in ROW),
        json.dumps({"recipe": "a", "seed": 1, "results": [{**ROW, "x" * 10_000: 1, "split": None}]}),
    ],
)
def test_results_that_evaluate_did_not_write_are_one_short_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=r"results.json is not what evaluate writes") as error:
        read_results(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
