"""README and docs are executed: commands parse and run on small data, Python runs, files and options exist, the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from documents import ELSEWHERE, PAGES, ROOT, Page, cells, make_small_data, on_small_data

from flyp_saflex import cli, recipe

DOCUMENTS = ["README.md", *PAGES]
WALK = "docs/start/walk.md"
"""Page whose blocks, commands and Python, need each other: they run in order."""
PYTHON_ELSEWHERE = ("docs/how-to/loops.md", WALK)
"""Pages whose Python other tests run: test_loops.py, and the walk below."""
EXECUTED = [name for name in PAGES if name.startswith(("docs/start/", "docs/how-to/")) and name != WALK]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_parse_and_their_recipes_load(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Page(name)
    page.write_files(tmp_path)
    for words in page.commands:
        if words in (["--help"], ["--version"]):
            continue
        arguments = cli.build_parser().parse_args(words)
        if hasattr(arguments, "recipe"):
            recipe.load(arguments.recipe, arguments.set)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_line_of_a_shell_block_is_looked_at(name):
    page = Page(name)
    others = [line for line in page.shell if not line.startswith(ELSEWHERE)]
    assert len(others) == len(page.commands), others
    for line in page.shell:
        for path in re.findall(r"(?:^|\s|\./)(scripts/[\w./]+)", line):
            assert (ROOT / path).exists(), line


def test_there_are_pages_and_commands_to_check():
    assert len(EXECUTED) >= 11
    assert sum(len(Page(name).commands) for name in EXECUTED) > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED)
def test_commands_run_on_small_data(name, tmp_path, tiny_images_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_small_data(tmp_path, tiny_images_dir, name)
    page = Page(name)
    page.write_files(tmp_path)
    for words in page.commands:
        if words == ["--version"]:
            continue
        if "--resume" in words:  # as a kill before the end leaves the run
            (Path(words[words.index("--run-dir") + 1]) / "DONE").unlink()
        code = cli.main(on_small_data(words))
        captured = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}: {captured.out[-1000:]}{captured.err[-1000:]}"


@pytest.mark.parametrize(
    "name",
    [name for name in DOCUMENTS if name not in PYTHON_ELSEWHERE and any(kind == "python" for kind, _ in Page(name).blocks)],
)
def test_python_runs(name):
    for kind, text in Page(name).blocks:
        if kind == "python":
            exec(compile(text, name, "exec"), {"__name__": "document"})


@pytest.mark.slow
def test_the_walk_runs_block_by_block(tmp_path, tiny_images_dir, tiny_clip_dir, monkeypatch, capsys):
    """The model is a tiny ViT, which transformers has; what it loads in the end classifies as `predict` did."""
    monkeypatch.chdir(tmp_path)
    make_small_data(tmp_path, tiny_images_dir, WALK)
    page = Page(WALK)
    page.write_files(tmp_path)
    num_commands, space = 0, {}
    for kind, text in page.blocks:
        if kind == "python":
            space = {"__name__": "document"}
            exec(compile(text, WALK, "exec"), space)
        for line in text.splitlines() if kind == "bash" else ():
            words = on_small_data(shlex.split(line.removeprefix("flyp-saflex ")))
            if words[0] in ("data", "train"):
                words += ["--set", f"model.name=local-dir:{tiny_clip_dir}"]
            code = cli.main(words)
            captured = capsys.readouterr()
            assert code == 0, f"{line}: {captured.out[-1000:]}{captured.err[-1000:]}"
            num_commands += 1
    assert num_commands == len(page.commands) == 5
    predicted = pandas.read_parquet("predictions.parquet").set_index("image")
    row = next(row for path, row in predicted.iterrows() if path.endswith("circle/0.png"))
    assert space["classes"]["class_names"][int(space["probabilities"].argmax())] == row["class"]
    assert len(predicted) == len(list(Path("my_images/sketch").rglob("*.png")))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_it_names_exist(name):
    text = Page(name).text
    quoted = re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|md|toml|sh))`", text)
    modules = [path if (ROOT / path.partition("/")[0]).exists() else f"flyp_saflex/{path}" for path in quoted]
    written = [f"prompts/{path}" for path in ("folder.auto.toml", "folder.mine.toml")]  # by the reader
    assert not [path for path in modules if path not in written and not (ROOT / path).exists()]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_option_that_it_names_exists(name):
    found = re.findall(r"`(\w+\.(?!json|toml)\w+)[=`]", Page(name).text)
    named = {match for match in found if match.split(".")[0] in recipe.SECTIONS}
    defaults = recipe.load("folder")
    assert not [one for one in named if not hasattr(getattr(defaults, one.split(".")[0]), one.split(".")[1])]


def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip('mkdocs is not installed: pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"?(https?:[^\s\">]+)", text)
        assert not loaded, (page, loaded)
    options = (tmp_path / "site" / "reference" / "options.html").read_text(encoding="utf-8")
    assert all(f'id="{section}"' in options for section in recipe.SECTIONS)
    assert "Peak learning rate." in options


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = cells(ROOT / "docs" / "tour.ipynb")
    assert 12 <= len(notebook) <= 18
    space: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(notebook, start=1):
        exec(compile(source, f"tour.ipynb cell {number}", "exec"), space)
    assert Path("tour").is_dir()
