"""The command line: help without heavy imports, exit codes, one-line messages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from flyp_saflex import __version__, arguments, cli, errors, recipe

COMMANDS = sorted(cli.build_parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr]
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "pandas", "numpy", "open_clip", "wilds", "PIL"}


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def imported(*argv: str) -> set[str]:
    result = subprocess.run([sys.executable, "-X", "importtime", *argv], capture_output=True, text=True, check=True, timeout=60)
    return {match[1].split(".")[0] for match in re.finditer(r"\|\s+([\w.]+)$", result.stderr, flags=re.MULTILINE)}


@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "flyp_saflex", "--help"],
        ["-m", "flyp_saflex", "--version"],
        ["-m", "flyp_saflex", "options"],
        ["-m", "flyp_saflex", "train", "folder", "--print-config"],
        ["-c", "import flyp_saflex"],
    ],
)
def test_help_and_import_load_nothing_heavy(argv: list[str]) -> None:
    modules = imported(*argv)
    assert "flyp_saflex" in modules  # the listing was read
    assert modules & HEAVY == set()


def test_contract_commands_exist() -> None:
    assert {"demo", "data", "train", "evaluate", "report"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: flyp-saflex {command}")
    assert len(out.split("\n\n")[1]) > 20  # its description


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--version")
    assert (code, err) == (0, "")
    assert out.startswith(f"flyp-saflex {__version__} (Python ")
    for name, package in arguments.VERSIONS.items():
        assert f"{name} {metadata.version(package)}" in out


def test_version_of_a_missing_library_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arguments.VERSIONS, "other", "no-such-package")
    assert "other not installed" in run(capsys, "--version")[1]


def test_options_of_a_section_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "options", "train")
    assert (code, err) == (0, "")
    assert "train.lr\n    number above 0; default: 1e-05\n    Peak learning rate.\n" in out
    code, out, err = run(capsys, "options", "trian")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "did you mean 'train'?" in err


def test_help_of_a_command_with_a_recipe_names_the_sections(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "generate"):
        text = " ".join(run(capsys, command, "--help")[1].split())
        assert f"options by section: {', '.join(recipe.SECTIONS)}" in text


def test_print_config_prints_toml_that_loads_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "train", "folder", "--print-config", "--set", "train.lr=3e-6", "--set", "seed=4")
    assert code == 0
    assert "# Peak learning rate." in out
    (tmp_path / "again.toml").write_text(out, encoding="utf-8")
    _, again, _ = run(capsys, "train", str(tmp_path / "again.toml"), "--print-config")
    assert again == out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "foldr"], ["unknown recipe 'foldr'", "did you mean 'folder'?"]),
        (["train", "no/such.toml"], ["no/such.toml", "there is no such file"]),
        (["train", "folder", "--set", "train.lrr=1"], ["unknown key 'train.lrr'", "did you mean 'train.lr'?"]),
        (["train", "folder", "--set", "trian.lr=1"], ["unknown key 'trian'", "did you mean 'train'?"]),
        (["train", "folder", "--set", "lr=1"], ["unknown key 'lr'"]),
        (["train", "folder", "--set", "train.lr=fast"], ["train.lr", "float", "str"]),
        (["train", "folder", "--set", "train.lr=-1"], ["train.lr", "> 0"]),
        (["train", "folder", "--set", "train.method=clip"], ["train.method", "'clip'", "flyp"]),
        (["train", "folder", "--set", "train.lr"], ["--set train.lr", "section.field=value"]),
        (["train", "folder", "--run-dir", ""], ["--run-dir ''", "expected a folder"]),
        (["evaluate", ""], ["RUN ''", "expected a folder"]),
        (["demo", "--out", " "], ["--out ' '", "expected a folder"]),
        (["evaluate", "somewhere", "--wise-alphas", "0,2"], ["--wise-alphas 0,2", "from 0 to 1"]),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("flyp-saflex: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"], ["train", "folder", "--limit", "many"]])
def test_wrong_usage_is_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert "usage: flyp-saflex" in err


def test_interrupt_is_code_130_and_our_bug_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> None:
        raise error

    monkeypatch.setattr(cli.recipe, "load", lambda *_: fail(KeyboardInterrupt()))
    assert run(capsys, "train", "folder") == (130, "", "flyp-saflex: interrupted\n")
    monkeypatch.setattr(cli.recipe, "load", lambda *_: fail(errors.DataError("labels.csv row 7: what")))
    assert run(capsys, "train", "folder") == (2, "", "flyp-saflex: labels.csv row 7: what\n")
    monkeypatch.setattr(cli.recipe, "load", lambda *_: fail(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):  # the interpreter turns it into a traceback and code 1
        run(capsys, "train", "folder")


@pytest.mark.parametrize(
    "command", [["--help"], ["data", "folder", "--print-config"], ["data", "folder", "--set", "data.root={}/day"]]
)
def test_a_closed_pipe_ends_a_command_without_a_traceback(tiny_images_dir, command):
    arguments = [part.format(tiny_images_dir) for part in command]
    reading, writing = os.pipe()
    os.close(reading)  # the reader is gone before the first line, as `| head -0`
    try:
        run = subprocess.run(
            [sys.executable, "-m", "flyp_saflex", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert run.returncode in (0, 141)  # argparse itself says nothing where its help cannot be written
    assert "Traceback" not in run.stderr
    assert "BrokenPipe" not in run.stderr
