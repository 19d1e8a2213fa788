"""What decides how an edit looks, resolved from the options `editor.*` (floor 3, shared by stages; imports no library).

    kind               text          source   guidance  image guidance  strength  model left empty
    instruct-pix2pix   instruction   image    5         1.3             -         timbrooks/instruct-pix2pix
    img2img            prompt        image    7.5       -               0.5       Stable Diffusion 1.5
    text2img           prompt        -        7.5       -               -         Stable Diffusion 1.5
    inpaint            prompt        box      7.5       -               1         Stable Diffusion 1.5 for inpainting
    auto               instruction   image    pipeline  if it has one   likewise  has to be named

The values of `instruct-pix2pix` and `img2img` are ALIA's (arXiv 2305.16289).
"""

from __future__ import annotations

from dataclasses import replace

from flyp_saflex.config import EditorConfig
from flyp_saflex.errors import ConfigError

DEFAULT_MODELS = {
    "instruct-pix2pix": "timbrooks/instruct-pix2pix",
    "img2img": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "text2img": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "inpaint": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
"""Hub repository per kind that is used when `editor.model` is empty; `auto` has none."""
GUIDANCE = {"instruct-pix2pix": 5.0, "img2img": 7.5, "text2img": 7.5, "inpaint": 7.5}
STRENGTH = {"img2img": 0.5, "inpaint": 1.0}
IMAGE_GUIDANCE = 1.3
MAX_ASPECT = 8
"""Sources that are longer than this times their width (or the other way round) are not edited."""


def uses_instruction(kind: str) -> bool:
    """Whether editors of the kind are given `EditText.instruction`; the others are given `EditText.prompt`."""
    return kind in ("instruct-pix2pix", "auto")


def resolve(config: EditorConfig) -> EditorConfig:
    """Fill in the usual values of the kind for the options left unset; loads nothing.

    An option that is still None has no meaning for the kind, or (`auto`) leaves the pipeline its own value.

    Raises:
        ConfigError: options that do not fit the kind, or each other.
    """
    kind = config.kind
    if kind == "auto" and not config.model:
        raise ConfigError(
            "editor.kind = auto has no model of its own: set editor.model to a diffusers pipeline, its hub id or folder, "
            "or editor.kind to one of " + ", ".join(DEFAULT_MODELS)
        )
    if config.image_guidance is not None and kind not in ("instruct-pix2pix", "auto"):
        raise ConfigError(
            f"editor.image_guidance is set but editor.kind = {kind} has no such thing: remove it or use instruct-pix2pix"
        )
    if config.strength is not None and kind not in (*STRENGTH, "auto"):
        raise ConfigError(f"editor.strength is set but editor.kind = {kind} has no such thing: remove it or use img2img")
    if kind == "text2img" and not config.size_px:
        raise ConfigError(
            "editor.size_px = 0 keeps the source's size, but editor.kind = text2img has no source: set editor.size_px, "
            "for example 512"
        )
    image_guidance, guidance, strength = config.image_guidance, config.guidance, config.strength
    if kind == "instruct-pix2pix":
        image_guidance = IMAGE_GUIDANCE if image_guidance is None else image_guidance
        if image_guidance < 1:
            raise ConfigError(
                f"editor.image_guidance = {image_guidance:g} would switch all guidance off: expected at least 1 (usual: 1 to 2)"
            )
    guidance = GUIDANCE.get(kind) if guidance is None else guidance
    if guidance is not None and guidance <= 1 and kind != "auto":
        for option in ("negative_prompt", "image_guidance"):
            if getattr(config, option):
                raise ConfigError(
                    f"editor.guidance = {guidance:g} switches guidance off, so editor.{option} has no effect: remove it or set "
                    "editor.guidance above 1"
                )
        image_guidance = None  # it is off as well, and provenance says so
    steps = config.steps or (20 if uses_instruction(kind) else 50)
    strength = STRENGTH.get(kind) if strength is None else strength
    if strength is not None and int(steps * strength) < 1:
        raise ConfigError(
            f"editor.strength = {strength:g} of editor.steps = {steps} is not one whole step: raise one of them "
            f"(strength at least {1 / steps:.2g})"
        )
    return replace(
        config,
        model=config.model or DEFAULT_MODELS[kind],
        steps=steps,
        guidance=guidance,
        image_guidance=image_guidance,
        strength=strength,
    )


def output_size(width_px: int, height_px: int, *, size_px: int, grid_px: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side at `size_px` (0: as it is), both rounded to the grid, at least one cell.

    The aspect ratio is kept up to that rounding.
    """
    scale = size_px / min(width_px, height_px) if size_px else 1.0
    width, height = (max(1, round(side * scale / grid_px)) * grid_px for side in (width_px, height_px))
    return width, height


def scale_box(
    box: tuple[float, float, float, float], size: tuple[int, int], new_size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Return (left, top, right, bottom) of a box (left, top, width, height), rescaled and clipped; None if nothing is left.

    Rounded outwards, so that no part of the object is lost.
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
