"""The README as a door: the two commands first, a true tree, at most 150 lines; test_documents.py executes its blocks."""

import re

from documents import ROOT, Page

README = Page("README.md")


def test_the_two_commands_are_on_the_first_screen():
    first = README.text.splitlines()[:25]
    assert any(line.startswith("./scripts/demo") for line in first)
    assert any(line.startswith("./scripts/test") for line in first)


def test_it_is_short_enough_to_be_read():
    assert len(README.text.splitlines()) <= 150


def test_there_are_commands_to_check():
    assert len(README.commands) >= 5


def test_files_that_it_names_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README.text)
    missing = [name for name in links if "//" not in name and not (ROOT / name).exists()]
    assert not missing
    assert len(re.findall(r"`((?:[\w-]+/)+[\w.-]+\.py)`", README.text)) > 8  # the tour; test_documents.py looks for them


def test_the_tree_is_true():
    """Every room and every module of the ground is in it, and nothing else."""
    (tree,) = [text for kind, text in README.blocks if not kind and text.startswith("flyp_saflex/")]
    package = tree.partition("\ndocs/")[0]
    named = set(re.findall(r"(\w+)/", package.partition("\n")[2])) | set(re.findall(r"(\w+\.py)", package))
    found = {path.name for path in (ROOT / "flyp_saflex").iterdir() if path.suffix == ".py" and not path.name.startswith("__")}
    found |= {path.name for path in (ROOT / "flyp_saflex").iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert named == found
    assert all((ROOT / name).is_dir() for name in ("docs", "prompts", "augment_cache", "scripts", "tests"))
