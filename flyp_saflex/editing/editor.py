"""Interface of an editor, and its loading by the table of kinds; imports no torch and no diffusers.

    Request(image, text, seed, box) x R -> Editor.edit -> image, or the reason why there is none, x R

An edit depends on its request alone: not on its batch, on the batches before, or on global random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from flyp_saflex.editing.settings import resolve
from flyp_saflex.offline import EditorConfig
from flyp_saflex.tables import EDITORS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One edit to make.

    Attributes:
        image: the source, upright RGB; None only for kinds that need no image.
        text: instruction or prompt with the class name filled in.
        seed: of this edit's noise, 0..2**63-1.
        level: value of the option that `settings.levels_of` names; None: the editor's own.
        box: left, top, width, height in pixels of `image`, the part that `inpaint` keeps; None if unknown.
    """

    image: Image.Image | None
    text: str
    seed: int
    box: tuple[float, float, float, float] | None = None
    level: float | None = None


class Editor(Protocol):
    """An editor as `edit_images` and `generate` use it; `diffusers_editor.DiffusersEditor` is one.

    Attributes:
        settings: the options with the usual values of the kind (`settings.resolve`).
        identity: manifest fields that name the editor and its version: `model` and `revision`, never a path.
    """

    settings: EditorConfig
    identity: dict[str, str]

    def edit(self, requests: Sequence[Request]) -> list[Image.Image | str]:
        """Make the edits, each from its request alone.

        Args:
            requests: at most `editor.batch_size` of them in `generate`; any mix of sizes.

        Returns:
            Per request an RGB image of `output_size`, or the reason why there is none.
        """

    def output_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Return (width, height) in pixels of an edit of a source of this size."""


def load_editor(config: EditorConfig, *, device: torch.device | str = "cpu") -> Editor:
    """Load the editor that the options name, with the loader of its kind.

    Args:
        config: the recipe's section `editor`.
        device: device of the editor's weights.

    Raises:
        ConfigError: an unknown kind, options that do not fit the kind or the model, an unknown scheduler.
        ModelError: weights that cannot be loaded, or that belong to another kind of editor.
    """
    settings = resolve(config)
    load = EDITORS[settings.kind].load
    if isinstance(load, str):
        module, _, function = load.partition(":")
        load = getattr(import_module(module), function)
    editor: Editor = load(settings, device=device)
    return editor
