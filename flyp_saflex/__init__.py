"""Toolkit that finetunes CLIP with FLYP and makes augmented images safe to train on with SAFLEX.

Public names are imported on first use, so that `import flyp_saflex` and `flyp-saflex --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AugmentCache": "storage.augment_cache",
    "Config": "config",
    "UserError": "errors",
    "load_recipe": "recipe:load",
    "load_dataset": "data.registry",
    "load_clip": "clip.model",
    "load_editor": "editing.editor",
    "Saflex": "saflex.saflex",
    "clip_loss": "saflex.losses",
    "edit_dataset": "editing.edit_images",
    "evaluate": "evaluation.evaluate",
    "train": "training.train",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the names are strings

if TYPE_CHECKING:
    from flyp_saflex.clip.model import load_clip as load_clip
    from flyp_saflex.config import Config as Config
    from flyp_saflex.data.registry import load_dataset as load_dataset
    from flyp_saflex.editing.edit_images import edit_dataset as edit_dataset
    from flyp_saflex.editing.editor import load_editor as load_editor
    from flyp_saflex.errors import UserError as UserError
    from flyp_saflex.evaluation.evaluate import evaluate as evaluate
    from flyp_saflex.recipe import load as load_recipe  # noqa: F401 - in __all__ by way of _HOMES
    from flyp_saflex.saflex.losses import clip_loss as clip_loss
    from flyp_saflex.saflex.saflex import Saflex as Saflex
    from flyp_saflex.storage.augment_cache import AugmentCache as AugmentCache
    from flyp_saflex.training.train import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flyp_saflex' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(f"flyp_saflex.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
