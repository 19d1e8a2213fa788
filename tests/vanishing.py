"""Training that ends as a kill would end it."""

from __future__ import annotations

from typing import Any

import pytest

from flyp_saflex.training import train as train_module


class Vanished(Exception):
    """Nothing of the trainer catches it."""


def train_until(monkeypatch: pytest.MonkeyPatch, step: int, *arguments: Any, **options: Any) -> None:
    """Train, and vanish right after `step` steps, as a kill would: nothing is saved on the way out."""
    after = train_module._Trainer._after

    def vanish(self, number, *rest):
        after(self, number, *rest)
        if number == step:
            raise Vanished

    with monkeypatch.context() as patch, pytest.raises(Vanished):
        patch.setattr(train_module._Trainer, "_after", vanish)
        train_module.train(*arguments, **options)
