"""The paper's tracks are tasks, readers and recipes: no other module asks whether it trains CLIP, an MLP or a ResNet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from flyp_saflex.tables import DATASETS, METHODS, TASKS

PACKAGE = Path(__file__).resolve().parents[1] / "flyp_saflex"
OWN = {"tasks", "data", "tables.py"}
"""Homes of tasks and readers, and the tables that name them."""
NEW = {"mlp", "image-classifier", "contrastive-images", "tabular", "medmnist", "MlpTask", "ImageClassifierTask"}
NEW |= {"ContrastiveTask", "ViewNetwork", "nt-xent"}


def asked(tree: ast.AST) -> Iterator[str]:
    """Yield the names of tracks that conditions, comparisons and `isinstance` mention."""
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            parts = [node.test]
        elif isinstance(node, (ast.Compare, ast.Match)):
            parts = [node]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            parts = list(node.args)
        for part in parts:
            for inner in ast.walk(part):
                value = inner.value if isinstance(inner, ast.Constant) else getattr(inner, "id", getattr(inner, "attr", None))
                if isinstance(value, str) and value in NEW:
                    yield value


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if method == 'mlp': pass", {"mlp"}),
        ("x = 1 if name in ('tabular', 'folder') else 2", {"tabular"}),
        ("assert isinstance(task, MlpTask)", {"MlpTask"}),
        ("x = {'mlp': 3}", set()),
    ],
)
def test_the_search_sees_questions(source: str, found: set[str]) -> None:
    assert set(asked(ast.parse(source))) == found


def test_no_module_asks_for_the_track_outside_of_its_task_and_reader() -> None:
    asking = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        home = path.relative_to(PACKAGE).parts[0]
        if home not in OWN and (found := set(asked(ast.parse(path.read_text(encoding="utf-8"))))):
            asking[str(path.relative_to(PACKAGE))] = found
    assert asking == {}


def test_the_tables_have_the_tracks() -> None:
    assert {"mlp", "image-classifier", "contrastive-images"} <= set(METHODS)
    assert {"mlp", "image-classifier", "contrastive"} <= set(TASKS)
    assert {"tabular", "medmnist"} <= set(DATASETS)
