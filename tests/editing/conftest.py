"""Fixtures of the editing tests: pipelines with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_editor(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_editor("img2img")`: folder of a diffusers pipeline with random weights (`tiny_models.py`), built once."""
    from functools import cache

    from tiny_models import build_tiny_editor

    root = tmp_path_factory.mktemp("tiny_editors")

    @cache
    def build(kind: str, safety_checker: str = "") -> Path:
        return build_tiny_editor(root / f"{kind}-{safety_checker or 'unchecked'}", kind, safety_checker=safety_checker)

    return build
