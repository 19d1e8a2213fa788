"""The README is executed: its Python runs, its commands parse, the files it names are there."""

import re
import shlex
from pathlib import Path

import pytest

from flyp_saflex import recipe
from flyp_saflex.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
SHELL = [line for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines() if line.strip()]
COMMANDS = [line for line in SHELL if line.startswith("flyp-saflex ")]


def test_the_two_commands_are_on_the_first_screen():
    first = README.splitlines()[:25]
    assert any(line.startswith("./scripts/demo") for line in first)
    assert any(line.startswith("./scripts/test") for line in first)


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse_and_their_recipes_load(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("\n".join(text for kind, text in BLOCKS if kind == "toml"), encoding="utf-8")
    words = shlex.split(line.partition(" #")[0])[1:]
    if words == ["--help"]:
        return
    arguments = build_parser().parse_args(words)
    if hasattr(arguments, "recipe"):
        recipe.load(arguments.recipe, arguments.set)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 5


def test_files_that_it_names_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    scripts = re.findall(r"\./(scripts/\w+)", README)
    quoted = re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|md|toml|sh))`", README)
    modules = [name if (ROOT / name.partition("/")[0]).exists() else f"flyp_saflex/{name}" for name in quoted]
    missing = [name for name in {*links, *scripts, *modules} if "//" not in name and not (ROOT / name).exists()]
    assert not missing
    assert len(modules) > 15


def test_the_tree_is_true():
    """Every room and every module of the ground is in it, and nothing else."""
    (tree,) = [text for kind, text in BLOCKS if not kind and text.startswith("flyp_saflex/")]
    package = tree.partition("\nprompts/")[0]
    named = set(re.findall(r"(\w+)/", package.partition("\n")[2])) | set(re.findall(r"(\w+\.py)", package))
    found = {path.name for path in (ROOT / "flyp_saflex").iterdir() if path.suffix == ".py" and not path.name.startswith("__")}
    found |= {path.name for path in (ROOT / "flyp_saflex").iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert named == found
    assert all((ROOT / name).is_dir() for name in ("prompts", "augment_cache", "scripts", "tests"))


def test_every_option_that_it_names_exists():
    sections = set(recipe.SECTIONS)
    named = {match for match in re.findall(r"`(\w+\.\w+)[=`]", README) if match.split(".")[0] in sections}
    defaults = recipe.load("folder")
    unknown = [name for name in named if not hasattr(getattr(defaults, name.split(".")[0]), name.split(".")[1])]
    assert named
    assert not unknown
