"""Docstrings of the package: they exist, and their first lines are short and say what a thing is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "flyp_saflex").rglob("*.py"))
MAX_WORDS = 20
QUESTIONS = {"what", "which", "how", "where", "when", "why", "whether"}
FLOOR = re.compile(r"\bfloors? \d", re.IGNORECASE)
"""The order of imports is in `test_architecture.py`; a layer number in a docstring would be a second copy."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, Documented]]:
    """Yield a module or class and, below it, the public classes, functions and methods, with their names."""
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            inner = f"{name}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from documented(child, inner)
            else:
                yield inner, child


def problems(source: str) -> list[str]:
    """Return one line per missing docstring, long first line, question word or layer number in a module's source."""
    found = []
    for name, node in documented(ast.parse(source), "module"):
        text = ast.get_docstring(node)
        if not text:
            found.append(f"{name}: no docstring")
            continue
        words = text.splitlines()[0].split()
        if len(words) > MAX_WORDS:
            found.append(f"{name}: first line of {len(words)} words, expected at most {MAX_WORDS}")
        if (opening := re.match(r"\w*", text)[0]).lower() in QUESTIONS:
            found.append(f"{name}: first line begins with '{opening}'")
        if floor := FLOOR.search(text):
            found.append(f"{name}: layer number '{floor[0]}'")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_lines_are_short_and_name_their_subject(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1", ["module: no docstring"]),
        ('"""Module."""\ndef f():\n    pass', ["module.f: no docstring"]),
        ('"""Module."""\nclass C:\n    """Class."""\n    def m(self):\n        pass', ["module.C.m: no docstring"]),
        ('"""What a thing does."""', ["module: first line begins with 'What'"]),
        ('"""' + "word " * 21 + '\n\nMore."""', ["module: first line of 21 words, expected at most 20"]),
        ('"""Module (floor 2: tensors only)."""', ["module: layer number 'floor 2'"]),
        ('"""Module.\n\nWhat follows may be long: ' + "word " * 30 + '"""\ndef _private():\n    pass', []),
    ],
)
def test_the_reader_finds_each_problem(source: str, expected: list[str]) -> None:
    assert problems(source) == expected
