"""Kinds of editors, and the options `editor.*` with the usual values of the kind; imports no library.

    kind               text          needs   guidance  image guidance  strength  model left empty
    instruct-pix2pix   instruction   image   5         1.3             -         timbrooks/instruct-pix2pix
    img2img            prompt        image   7.5       -               0.5       Stable Diffusion 1.5
    text2img           prompt        -       7.5       -               -         Stable Diffusion 1.5
    inpaint            prompt        box     7.5       -               1         Stable Diffusion 1.5 for inpainting
    controlnet-canny   prompt        image   7.5       -               -         Stable Diffusion 1.5
    auto               instruction   image   the pipeline's own values           has to be named

The values of `instruct-pix2pix` and `img2img` are ALIA's (arXiv 2305.16289). A new kind is one
`EditorKind` and one line in `tables.EDITORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from flyp_saflex.errors import ConfigError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.tables import EDITORS, PRESETS

MAX_ASPECT = 8
"""Largest ratio of the longer to the shorter side of a source that is edited."""
PER_KIND = ("model", "steps", "guidance", "image_guidance", "strength")
"""Options with a usual value per kind; left unset they are None, `model` the empty string."""
LEVELS = {"strengths": "strength", "image_guidances": "image_guidance"}
"""Options that list levels, and the option that each is a level of."""
SIZE_PX = 512
"""Value of `editor.size_px` for every kind, where it is unset and no preset says otherwise."""


@dataclass(frozen=True, kw_only=True)
class EditorKind:
    """Entry of `tables.EDITORS`: usual values, inputs and loader of one kind of editor.

    Attributes:
        text: field of `EditText` that the editor is given.
        usual: value per option of `PER_KIND` that the kind has; None leaves the pipeline its own value, an empty `model` has to
            be named by the user. An option that is absent here is refused.
        needs: `image`: the source; `box`: the object's box in it as well.
        load: function that is called with (resolved `EditorConfig`, device=...) and returns an `editor.Editor`, or its name
            as `module:function`, imported when used. It refuses options that it cannot honour.
        pipeline: diffusers' class that the weights are loaded as.
        family: weights that were saved as a class with this in its name are loaded as that class instead; empty: none are.
        unet_channels: (a, b) per possible number a * latent channels + b of the UNet's input channels, the usual one first;
            empty: unchecked.
        one_by_one: leave the text encoding to the pipeline, and call it with one image and one text instead of lists (unless the
            preset knows that lists are batches).
        edges: give the pipeline the source's edges instead of the source.
    """

    text: Literal["instruction", "prompt"]
    usual: Mapping[str, Any]
    needs: tuple[Literal["image", "box"], ...] = ("image",)
    load: str | Callable[..., Any] = "flyp_saflex.editing.diffusers_editor:load"
    pipeline: str = ""
    family: str = ""
    unet_channels: tuple[tuple[int, int], ...] = ()
    one_by_one: bool = False
    edges: bool = False


INSTRUCT_PIX2PIX = EditorKind(
    text="instruction",
    usual={"model": "timbrooks/instruct-pix2pix", "steps": 20, "guidance": 5.0, "image_guidance": 1.3},
    pipeline="StableDiffusionInstructPix2PixPipeline",
    family="InstructPix2Pix",  # Stable Diffusion XL has a class of its own
    unet_channels=((2, 0),),
)
IMG2IMG = EditorKind(
    text="prompt",
    usual={"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "steps": 50, "guidance": 7.5, "strength": 0.5},
    pipeline="AutoPipelineForImage2Image",
    unet_channels=((1, 0),),
)
TEXT2IMG = EditorKind(
    text="prompt",
    usual={"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "steps": 50, "guidance": 7.5},
    needs=(),
    pipeline="AutoPipelineForText2Image",
    unet_channels=((1, 0),),
)
INPAINT = EditorKind(
    text="prompt",
    usual={"model": "stable-diffusion-v1-5/stable-diffusion-inpainting", "steps": 50, "guidance": 7.5, "strength": 1.0},
    needs=("image", "box"),
    pipeline="AutoPipelineForInpainting",
    unet_channels=((2, 1), (1, 0)),
)
CONTROLNET_CANNY = EditorKind(
    text="prompt",
    usual={"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "steps": 20, "guidance": 7.5},
    pipeline="StableDiffusionControlNetPipeline",
    unet_channels=((1, 0),),
    edges=True,
)
AUTO = EditorKind(
    text="instruction",
    usual={"model": "", "steps": 20, "guidance": None, "image_guidance": None, "strength": None},
    pipeline="DiffusionPipeline",
    one_by_one=True,  # a list of images may mean several sources of one edit
)


def resolve(config: EditorConfig) -> EditorConfig:
    """Fill in the values of the preset, then of the kind, for the options left unset; load nothing.

    An option that is still None has no meaning for the kind, or leaves the pipeline its own value.

    Raises:
        ConfigError: an unknown preset or kind, or options that do not fit the kind or each other.
    """
    config = _with_preset(config)
    kind = EDITORS[config.kind]
    values = {name: _value(config, kind, name) for name in PER_KIND}
    for name, single in LEVELS.items():
        if levels := getattr(config, name):
            _check_levels(config, kind, name, single)
            values[single] = levels[0]
    values["size_px"] = SIZE_PX if config.size_px is None else config.size_px
    if "model" in kind.usual and not values["model"]:
        raise ConfigError(
            f"editor.kind = {config.kind} has no usual model: set editor.model to a diffusers pipeline, its hub id or folder, or "
            f"editor.kind to one of {', '.join(name for name, other in EDITORS.items() if other.usual.get('model'))}"
        )
    if config.controlnet and not kind.edges:
        raise ConfigError(
            f"editor.controlnet is set but editor.kind = {config.kind} has no such thing: remove it or use controlnet-canny"
        )
    if not kind.needs and not values["size_px"]:
        raise ConfigError(
            f"editor.size_px = 0 keeps the source's size, but editor.kind = {config.kind} has no source: set editor.size_px, "
            "for example 512"
        )
    weakest = min(config.image_guidances or (values["image_guidance"] or 0,))
    if kind.usual.get("image_guidance") is not None and weakest < 1:
        raise ConfigError(
            f"editor.image_guidance = {weakest:g} would switch all guidance off: expected at least 1 (usual: 1 to 2)"
        )
    if kind.usual.get("guidance") is not None and values["guidance"] <= 1:
        for option in ("negative_prompt", "image_guidance", "image_guidances"):
            if getattr(config, option):
                raise ConfigError(
                    f"editor.guidance = {values['guidance']:g} switches guidance off, so editor.{option} has no effect: remove "
                    "it or set editor.guidance above 1"
                )
        values["image_guidance"] = None  # it is off as well, and provenance says so
    strength, steps = min(config.strengths, default=values["strength"]), values["steps"]
    if strength is not None and steps is not None and int(steps * strength) < 1:
        raise ConfigError(
            f"editor.strength = {strength:g} of editor.steps = {steps} is not one whole step: raise one of them "
            f"(strength at least {1 / steps:.2g})"
        )
    return replace(config, **values)


def levels_of(settings: EditorConfig) -> tuple[str, tuple[float, ...]]:
    """Return the option whose levels edits are made at, and the levels; without levels two empty values."""
    return next(((single, levels) for name, single in LEVELS.items() if (levels := getattr(settings, name))), ("", ()))


def _check_levels(config: EditorConfig, kind: EditorKind, name: str, single: str) -> None:
    """Check a list of levels against the kind and the other options."""
    levels = getattr(config, name)
    other = next(option for option in LEVELS if option != name)
    if single not in kind.usual:
        able = [known for known, entry in EDITORS.items() if entry.usual.get(single) is not None]
        instead = f"editor.{other}" if LEVELS[other] in kind.usual else f"one of {', '.join(able)}"
        raise ConfigError(f"editor.{name} is set but editor.kind = {config.kind} has no {single}: remove it, or use {instead}")
    if getattr(config, single) not in (None, levels[0]) or getattr(config, other):
        beside = other if getattr(config, other) else single
        raise ConfigError(
            f"editor.{name} is set beside editor.{beside}, but edits are made at the levels of one list: remove one"
        )
    if len(set(levels)) < len(levels):
        raise ConfigError(f"editor.{name} = {list(levels)} holds a level twice: remove it")


def _with_preset(config: EditorConfig) -> EditorConfig:
    """Fill in kind and advised values of the preset."""
    PRESETS.check(config.preset)
    if not config.preset:
        return config
    preset = PRESETS[config.preset]
    if config.kind not in (EditorConfig.kind, preset.kind):
        raise ConfigError(
            f"editor.preset = {config.preset} is of the kind {preset.kind}, but editor.kind = {config.kind}: remove editor.kind"
        )
    unset = {name: value for name, value in preset.values.items() if getattr(config, name) in (None, "")}
    return replace(config, kind=preset.kind, **unset)


def _value(config: EditorConfig, kind: EditorKind, name: str) -> Any:
    """Return the value set for an option, else the kind's usual one."""
    given = getattr(config, name)
    if given in (None, ""):
        return kind.usual.get(name, given)
    if name not in kind.usual:
        other = next(known for known, entry in EDITORS.items() if name in entry.usual)
        raise ConfigError(f"editor.{name} is set but editor.kind = {config.kind} has no such thing: remove it or use {other}")
    return given


def output_size(width_px: int, height_px: int, *, size_px: int, grid_px: int) -> tuple[int, int]:
    """Return (width, height) of an edit: the source scaled to a shorter side of `size_px`, and rounded to the grid.

    With `size_px` = 0 nothing is scaled. A side is at least one cell of the grid; the aspect ratio is kept up to rounding.
    """
    scale = size_px / min(width_px, height_px) if size_px else 1.0
    width, height = (max(1, round(side * scale / grid_px)) * grid_px for side in (width_px, height_px))
    return width, height


def scale_box(
    box: tuple[float, float, float, float], size: tuple[int, int], new_size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Rescale and clip a box (left, top, width, height) to (left, top, right, bottom); None if nothing is left.

    Edges are rounded outwards, so that no part of the object is lost.
    """
    left, top, width, height = box
    x, y = new_size[0] / size[0], new_size[1] / size[1]
    edges = (left * x, top * y, (left + width) * x, (top + height) * y)
    if not all(abs(edge) < 1e9 for edge in edges):  # also false for NaN
        return None
    inside = (
        max(0, int(edges[0] // 1)),
        max(0, int(edges[1] // 1)),
        min(new_size[0], int(-(-edges[2] // 1))),
        min(new_size[1], int(-(-edges[3] // 1))),
    )
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None
