"""Editors made of diffusers' pipelines; the only file that imports diffusers.

Requests of the same output size and level form one batch. An edit depends on its request alone, not on its batch, on the
batches before, or on the device's random numbers: every request has its own generator on the CPU for all of its noise, and
every text is encoded once, by itself. Only rounding remains: in float32 a batch of 5 and batches of 1 differ by at most 2 of 255
(tests/editing/test_diffusers_editor.py; 0 or 1 with 16 schedulers on small random models).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from flyp_saflex.editing.control_image import USUAL_CONTROLNET, canny, load_controlnet
from flyp_saflex.editing.editor import Request
from flyp_saflex.editing.pipeline_files import Source, locate, quiet, reason
from flyp_saflex.editing.presets import area_size, check_preset
from flyp_saflex.editing.prompt_encoder import Texts
from flyp_saflex.editing.schedulers import check_scheduler, make_scheduler
from flyp_saflex.editing.settings import MAX_ASPECT, EditorKind, levels_of, output_size, scale_box
from flyp_saflex.errors import ConfigError, ModelError, RunError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.tables import EDITORS, PRESETS

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DiffusersEditor:
    """A loaded pipeline of diffusers as an `Editor`.

    Attributes:
        settings: the options, with the usual values of the kind filled in.
        identity: `model` (hub id or name of the folder) and `revision` (the hub's commit, or a digest of the folder).
        grid_px: sides of edits are multiples of this.
        batch_size: most edits per call of the pipeline; 1 for kinds that go one by one. It is halved, for good, when a batch
            does not fit into the GPU's memory.
        tell: function that is called with a line about each halving.
    """

    tell: Callable[[str], object] = staticmethod(tqdm.write)

    def __init__(self, pipeline: Any, settings: EditorConfig, identity: dict[str, str]) -> None:
        self.settings, self.identity, self._pipeline, self._kind = settings, identity, pipeline, EDITORS[settings.kind]
        preset = PRESETS[settings.preset] if settings.preset else None
        self._single = self._kind.one_by_one and not (preset and preset.batched)
        self._source_area_px = preset.source_area_px if preset else 0
        self.batch_size = 1 if self._single else settings.batch_size
        self._accepted = inspect.signature(type(pipeline).__call__).parameters
        self.grid_px = _grid_px(pipeline)
        self._level_name = {"image_guidance": "image_guidance_scale"}.get(name := levels_of(settings)[0], name)
        self._options = self._fixed_options()
        self._texts = Texts(pipeline, settings.negative_prompt, self._accepted, one_by_one=self._kind.one_by_one)
        if (too_long := self._texts.too_long(settings.negative_prompt)) is not None:
            raise ConfigError(f"editor.negative_prompt: {too_long}")

    def output_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Return (width, height) in pixels of an edit of a source; kinds without a source make squares."""
        size_px = self.settings.size_px
        assert size_px is not None, "settings are resolved"
        if not self._kind.needs:
            width_px = height_px = size_px
        return output_size(width_px, height_px, size_px=size_px, grid_px=self.grid_px)

    def edit(self, requests: Sequence[Request]) -> list[Image.Image | str]:
        """Make the edits, in batches of equal output size.

        Args:
            requests: any number, in any mix of sizes.

        Returns:
            Per request an RGB image of `output_size`, or the reason why there is none: the safety checker flagged the
            image, there is no usable box, the source is too long and thin, or the text is too long for the text encoder.

        Raises:
            RunError: a single edit does not fit into the GPU's memory.
            ModelError: the pipeline of `auto` cannot be called with an image and a text.
        """
        outcomes: dict[int, Image.Image | str] = {}
        rows_of: dict[tuple[tuple[int, int], float | None], list[int]] = {}
        for row, request in enumerate(requests):
            assert 0 <= request.seed < 2**63, f"seed {request.seed} is not in 0..2**63-1"
            if (refusal := self._refusal(request)) is not None:
                outcomes[row] = refusal
            else:
                size = self.output_size(*(request.image.size if request.image else (1, 1)))
                rows_of.setdefault((size, request.level), []).append(row)
        for (size, _), rows in rows_of.items():
            start = 0
            while start < len(rows):
                part = rows[start : start + self.batch_size]
                try:
                    images = self._run([requests[row] for row in part], size)
                except torch.OutOfMemoryError:
                    images = None
                if images is None:  # behind the handler: the error holds on to the memory of what it interrupted
                    self._halve(len(part), size)
                else:
                    outcomes |= zip(part, images, strict=True)
                    start += len(part)
        return [outcomes[row] for row in range(len(requests))]

    def _halve(self, count: int, size: tuple[int, int]) -> None:
        """Halve the batch size after a batch of `count` edits did not fit into memory."""
        if count == 1:
            raise RunError(
                f"an edit of {size[0]} x {size[1]} px does not fit into the GPU's memory: lower editor.size_px, or set "
                "editor.precision=fp16; edits that were written are kept"
            )
        self.batch_size = (count + 1) // 2
        torch.cuda.empty_cache()
        self.tell(
            f"{count} edits of {size[0]} x {size[1]} px do not fit into the GPU's memory: going on with {self.batch_size} at once"
        )

    def _refusal(self, request: Request) -> str | None:
        if (too_long := self._texts.too_long(request.text)) is not None:
            return too_long
        if "image" not in self._kind.needs:
            return None
        if request.image is None:
            return "there is no source image"
        short, long = sorted(request.image.size)
        if long > MAX_ASPECT * short:
            return (
                f"the source is {request.image.width} x {request.image.height} px, more than {MAX_ASPECT} times as long as wide"
            )
        if "box" in self._kind.needs:
            if request.box is None:
                return "there is no box to keep: inpaint repaints what is around one"
            size = self.output_size(*request.image.size)
            if (kept := scale_box(request.box, request.image.size, size)) is None:
                return (
                    f"its box {tuple(request.box)} lies outside of the {request.image.width} x {request.image.height} px source"
                )
            if kept == (0, 0, *size):
                return "its box covers the whole source: there is nothing to repaint"
        return None

    def _run(self, requests: list[Request], size: tuple[int, int]) -> list[Image.Image | str]:
        """Edit one batch of one output size and level."""
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        batch: dict[str, Any] = {"generator": generators} | self._texts.arguments([request.text for request in requests])
        sources, masks = [], []
        if "image" in self._kind.needs:
            seen = area_size(*size, self._source_area_px) if self._source_area_px else size
            sources = [_resized(request.image, seen) for request in requests]
            batch["image"] = [canny(source) for source in sources] if self._kind.edges else sources
        if "box" in self._kind.needs:
            masks = batch["mask_image"] = [_repaint_mask(request, size) for request in requests]
        if "true_cfg_scale" in self._accepted and self._guidance_name() == "true_cfg_scale":
            batch.setdefault("negative_prompt", [" "] * len(requests))  # without one, these pipelines ignore the guidance
        if self._single:  # single things instead of lists of one, which every pipeline takes
            batch = {name: values[0] for name, values in batch.items()}
        area = {"width": size[0], "height": size[1], "max_area": size[0] * size[1], "_auto_resize": False}
        batch |= {name: value for name, value in area.items() if name in self._accepted}
        if (level := requests[0].level) is not None:
            batch[self._level_name] = level
        images, flagged = self._call(batch, len(requests), size)
        images = [_resized(image, size) for image in images]
        if masks:  # the autoencoder blurs what it should keep
            images = [Image.composite(*layers) for layers in zip(images, sources, masks, strict=True)]
        return ["the safety checker flagged it" if bad else image for image, bad in zip(images, flagged, strict=True)]

    def _call(self, batch: dict[str, Any], count: int, size: tuple[int, int]) -> tuple[list[Image.Image], list[bool]]:
        try:
            with quiet():
                output = self._pipeline(**self._options | batch)
        except (TypeError, ValueError) as error:
            if not self._kind.one_by_one:
                raise
            raise ModelError(
                f"editor.model = {self.identity['model']}: {type(self._pipeline).__name__} cannot be called with an image and "
                f"an instruction ({reason(error)}); use another editor.model or editor.kind"
            ) from error
        images = getattr(output, "images", None)
        if not isinstance(images, list) or len(images) != count:
            raise ModelError(
                f"editor.model = {self.identity['model']}: {type(self._pipeline).__name__} does not give one image per text, so "
                "it is no editor of images; use another editor.model"
            )
        return images, list(getattr(output, "nsfw_content_detected", None) or [False] * count)

    def _fixed_options(self) -> dict[str, Any]:
        """Return the arguments that are the same for every batch, by their names in the pipeline's call."""
        settings, name = self.settings, type(self._pipeline).__name__
        for needed in ("prompt", *(["image"] if "image" in self._kind.needs else [])):
            if needed not in self._accepted:
                raise ModelError(
                    f"editor.model = {settings.model}: {name} takes no {needed}, so it cannot be used with editor.kind = "
                    f"{settings.kind}; use another editor.model or editor.kind"
                )
        options = {
            "num_inference_steps": ("steps", settings.steps),
            self._guidance_name(): ("guidance", settings.guidance),
            "image_guidance_scale": ("image_guidance", settings.image_guidance),
            "strength": ("strength", settings.strength),
            "negative_prompt": ("negative_prompt", settings.negative_prompt or None),
        }
        for argument, (option, value) in options.items():
            if value is not None and argument not in self._accepted:
                raise ConfigError(
                    f"editor.{option} = {value!r}, but {name} of editor.model = {settings.model} has no {argument}: "
                    + ("remove the option" if self._kind.usual.get(option) is None else "use another editor.model or editor.kind")
                )
        if settings.negative_prompt and "true_cfg_scale" in self._accepted and self._guidance_name() != "true_cfg_scale":
            raise ConfigError(
                f"editor.negative_prompt has no effect on {name} of editor.model = {settings.model}, whose guidance is trained "
                "into it: remove the option"
            )
        del options["negative_prompt"]  # goes with the texts
        return {argument: value for argument, (_, value) in options.items() if value is not None} | {"output_type": "pil"}

    def _guidance_name(self) -> str:
        """Return the argument of `editor.guidance`: `true_cfg_scale` where it is on by default, else `guidance_scale`."""
        true_cfg = self._accepted.get("true_cfg_scale")
        return "true_cfg_scale" if true_cfg is not None and (true_cfg.default or 0) > 1 else "guidance_scale"


def load(settings: EditorConfig, *, device: torch.device | str = "cpu") -> DiffusersEditor:
    """Load a pipeline as an editor.

    Args:
        settings: the options with the usual values of the kind filled in.
        device: device of the pipeline.

    Raises:
        ConfigError, ModelError: see `editor.load_editor`.
    """
    kind = EDITORS[settings.kind]
    with quiet():
        import diffusers

        check_scheduler(diffusers, settings.scheduler)
        check_preset(diffusers, settings)
        source = locate(settings, diffusers.DiffusionPipeline)
        check_preset(diffusers, settings, source.class_name)
        options, identity = {}, source.identity
        if kind.edges and (settings.controlnet or "ControlNet" not in source.class_name):
            options["controlnet"], more = load_controlnet(
                diffusers, settings.controlnet or USUAL_CONTROLNET, PRECISIONS[settings.precision]
            )
            identity = identity | more
        pipeline = _load(diffusers, settings, kind, source, options)
    _check_channels(pipeline, settings, kind)
    with quiet():
        if settings.scheduler:
            pipeline.scheduler = make_scheduler(diffusers, pipeline.scheduler, settings)
        pipeline.set_progress_bar_config(disable=True)
        dtype = PRECISIONS[settings.precision]
        pipeline.to(device) if pipeline.dtype == dtype else pipeline.to(device, dtype)
        denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        if settings.compile and denoiser is not None:
            denoiser.compile()
    return DiffusersEditor(pipeline, settings, identity)


def _load(diffusers: Any, settings: EditorConfig, kind: EditorKind, source: Source, parts: dict[str, Any]) -> Any:
    """Load the pipeline of the kind from a folder; `parts` were loaded from elsewhere."""
    own_class = kind.family and kind.family in source.class_name
    options: dict[str, Any] = {"dtype": PRECISIONS[settings.precision]} | parts
    if source.has_safety_checker and not settings.safety_checker:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with _without_bars(diffusers):
            cls = getattr(diffusers, "DiffusionPipeline" if own_class else kind.pipeline)
            return cls.from_pretrained(source.folder, **options)
    except Exception as error:  # diffusers, transformers and safetensors raise a dozen types here
        raise ModelError(
            f"editor.model = {settings.model}: its {source.class_name} cannot be loaded for editor.kind = {settings.kind} "
            f"({reason(error)}); use another editor.kind, or fetch the model again"
        ) from error


def _check_channels(pipeline: Any, settings: EditorConfig, kind: EditorKind) -> None:
    """Refuse a UNet that was trained for another kind; diffusers would fail in the middle of an edit."""
    unet, vae = getattr(pipeline, "unet", None), getattr(pipeline, "vae", None)
    if unet is None or vae is None or not kind.unet_channels:
        return
    latent, found = vae.config.latent_channels, unet.config.in_channels
    fitting = [a * latent + b for a, b in kind.unet_channels]
    if found not in fitting:
        usual = {name: other.unet_channels[0] for name, other in EDITORS.items() if other.unet_channels}
        made_for = " or ".join(name for name, (a, b) in usual.items() if a * latent + b == found) or "auto"
        raise ModelError(
            f"editor.model = {settings.model}: its UNet has {found} input channels, but editor.kind = {settings.kind} needs "
            f"{fitting[0]}; use editor.kind = {made_for}, or another editor.model"
        )


def _grid_px(pipeline: Any) -> int:
    """Return the grid of output sides in pixels: the autoencoder's scale, times the patch of a transformer (UNets have none)."""
    scale = int(getattr(pipeline, "vae_scale_factor", 8))
    transformer = getattr(pipeline, "transformer", None)
    patch = getattr(transformer.config, "patch_size", 1) if transformer is not None else 1
    return scale if transformer is None else scale * max(2, patch if isinstance(patch, int) else 2)


@contextmanager
def _without_bars(diffusers: Any) -> Iterator[None]:
    """Hide the progress bars that the libraries draw for every file."""
    from transformers.utils import logging

    shown = [library for library in (diffusers.utils.logging, logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _resized(image: Image.Image | None, size: tuple[int, int]) -> Image.Image:
    assert image is not None, "refused before"
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _repaint_mask(request: Request, size: tuple[int, int]) -> Image.Image:
    """Return the mask of a request: white is repainted, black (the box) is kept."""
    assert request.image is not None
    assert request.box is not None
    mask = Image.new("L", size, 255)
    mask.paste(0, scale_box(request.box, request.image.size, size))
    return mask
