"""Editor presets: values of `editor.preset`, today's editors with advised options, licence and memory; imports no library.

    preset                 kind              a list is   steps  guidance                        size_px  licence of the weights
    instruct-pix2pix       instruct-pix2pix  a batch     20     guidance 5, image_guidance 1.3  512     MIT
    sdxl-instruct-pix2pix  instruct-pix2pix  a batch     30     guidance 3, image_guidance 1.5  768     openrail++
    flux-kontext           auto              a batch     28     guidance 2.5 (distilled)        1024    non-commercial
    flux2-klein            auto              references  4      none (distilled)                1024    Apache-2.0
    qwen-image-edit        auto              a batch     50     true_cfg_scale 4                1024    Apache-2.0
    img2img                img2img           a batch     50     guidance 7.5, strength 0.5      512     CreativeML OpenRAIL-M
    text2img               text2img          a batch     50     guidance 7.5                    512     CreativeML OpenRAIL-M
    inpaint                inpaint           a batch     50     guidance 7.5, strength 1        512     CreativeML OpenRAIL-M
    controlnet-canny       controlnet-canny  a batch     20     guidance 7.5                    512     the same, and OpenRAIL

Sources: instruct-pix2pix: ALIA's configuration (guidance), ours (steps; the authors take 100), the code's licence. SDXL: the
card and diffusers' example. Kontext: diffusers' default steps, Black Forest Labs' guidance and licence
(black-forest-labs/flux). Klein: published examples of the card (4 steps, guidance 1), licence from black-forest-labs/flux2.
Qwen: QwenLM/Qwen-Image, README. img2img: ALIA's configuration; text2img and inpaint: diffusers' defaults; ControlNet:
diffusers' example. Licences of Stable Diffusion 1.5, its ControlNet and SDXL: pages of the hub. Cards change: read them before
use. Numbers of parameters: file sizes of Kontext's and Klein's denoisers and Klein's text encoder, Qwen's README (20 billion);
the others were counted (`scripts/benchmarks/edit_cost.py`) or are from memory. `references`: the pipeline reads a list of
images as several sources of one edit, so edits are made one at a time. A preset is one `EditorPreset` and one line in
`tables.PRESETS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flyp_saflex.errors import ModelError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.tables import PRESETS

SIZE_PX = 512
"""Value of `editor.size_px` for every kind, where it is unset and no preset says otherwise."""


@dataclass(frozen=True, kw_only=True)
class EditorPreset:
    """Entry of `tables.PRESETS`: an editor's kind, advised options and facts about its weights.

    Attributes:
        kind: name in `tables.EDITORS`.
        values: advised values of options of `EditorConfig` that are unset or empty by default; others are the kind's.
        pipeline: diffusers' class that the weights have to be of; empty: the kind decides.
        batched: whether the pipeline reads a list of images as a batch; False: as references of one edit.
        source_area_px: area to which the pipeline scales a single source, but not a list of sources; 0: none.
        licence: licence of the weights.
        parameters: billions of parameters per part of the pipeline, the denoiser first.
        layer: billions of parameters of the largest layer, the text encoder's embedding.
        linear: part of the denoiser's parameters that is in linear layers, which can be quantised.
        teraflops: 10^12 operations of one forward pass of the denoiser at `size_px`, ControlNet included.
        passes: forward passes per step with guidance.
    """

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    batched: bool = True
    source_area_px: int = 0
    licence: str
    parameters: Mapping[str, float]
    layer: float
    linear: float = 1.0
    teraflops: float
    passes: int

    @property
    def size_px(self) -> int:
        """Shorter side in pixels for which `teraflops` holds."""
        return int(self.values.get("size_px", SIZE_PX))

    @property
    def denoiser(self) -> str:
        """Name of the part that runs at every step."""
        return next(iter(self.parameters))


STABLE_DIFFUSION = {"unet": 0.86, "text encoder": 0.12, "vae": 0.08, "safety checker": 0.3}
FIGURES: dict[str, Any] = {"layer": 0.038, "linear": 0.31, "teraflops": 0.80}
"""Of Stable Diffusion 1.5 (`scripts/benchmarks/edit_cost.py`)."""
INSTRUCT_PIX2PIX = EditorPreset(kind="instruct-pix2pix", licence="MIT", parameters=STABLE_DIFFUSION, passes=3, **FIGURES)
SDXL_INSTRUCT_PIX2PIX = EditorPreset(
    kind="instruct-pix2pix",
    values={
        "model": "diffusers/sdxl-instructpix2pix-768", "steps": 30, "guidance": 3.0, "image_guidance": 1.5, "size_px": 768,
    },
    pipeline="StableDiffusionXLInstructPix2PixPipeline",
    licence="openrail++",
    parameters={"unet": 2.57, "text encoders": 0.82, "vae": 0.08},
    layer=0.063,
    linear=0.87,
    teraflops=3.64,
    passes=3,
)  # fmt: skip
FLUX_KONTEXT = EditorPreset(
    kind="auto",
    values={"model": "black-forest-labs/FLUX.1-Kontext-dev", "steps": 28, "guidance": 2.5, "size_px": 1024},
    pipeline="FluxKontextPipeline",
    licence="FLUX.1 [dev] non-commercial; gated: log in at the hub and accept it",
    parameters={"transformer": 11.9, "text encoders": 4.9, "vae": 0.08},
    layer=0.13,
    teraflops=165.0,
    passes=1,
)
FLUX2_KLEIN = EditorPreset(
    kind="auto",
    values={"model": "black-forest-labs/FLUX.2-klein-4B", "steps": 4, "guidance": 1.0, "size_px": 1024},
    pipeline="Flux2KleinPipeline",
    batched=False,
    licence="Apache-2.0",
    parameters={"transformer": 3.9, "text encoder": 4.0, "vae": 0.08},
    layer=0.39,
    teraflops=76.7,
    passes=1,
)
QWEN_IMAGE_EDIT = EditorPreset(
    kind="auto",
    values={"model": "Qwen/Qwen-Image-Edit", "steps": 50, "guidance": 4.0, "size_px": 1024},
    pipeline="QwenImageEditPipeline",
    source_area_px=1024 * 1024,
    licence="Apache-2.0",
    parameters={"transformer": 20.4, "text encoder": 8.3, "vae": 0.13},
    layer=0.55,
    teraflops=188.0,
    passes=2,
)
IMG2IMG = EditorPreset(kind="img2img", licence="CreativeML OpenRAIL-M", parameters=STABLE_DIFFUSION, passes=2, **FIGURES)
TEXT2IMG = EditorPreset(kind="text2img", licence="CreativeML OpenRAIL-M", parameters=STABLE_DIFFUSION, passes=2, **FIGURES)
INPAINT = EditorPreset(kind="inpaint", licence="CreativeML OpenRAIL-M", parameters=STABLE_DIFFUSION, passes=2, **FIGURES)
CONTROLNET_CANNY = EditorPreset(
    kind="controlnet-canny",
    licence="CreativeML OpenRAIL-M; of the ControlNet OpenRAIL",
    parameters=STABLE_DIFFUSION | {"controlnet": 0.36},
    passes=2,
    **FIGURES | {"teraflops": 1.09},
)


def check_preset(diffusers: Any, settings: EditorConfig, class_name: str = "") -> None:
    """Check that diffusers has the preset's pipeline and, if a class name is given, that the weights are of it.

    Raises:
        ModelError: they do not fit.
    """
    needed = PRESETS[settings.preset].pipeline if settings.preset else ""
    if needed and not hasattr(diffusers, needed):
        raise ModelError(
            f"editor.preset = {settings.preset} needs diffusers' {needed}, which diffusers {diffusers.__version__} does not "
            "have: install a newer one (pip install -U diffusers), or use another preset"
        )
    if needed and class_name not in ("", needed):
        fitting = [name for name, preset in PRESETS.items() if preset.pipeline == class_name]
        use = f"editor.preset = {fitting[0]}" if fitting else "editor.kind = auto without a preset"
        raise ModelError(
            f"editor.model = {settings.model} is a {class_name}, but editor.preset = {settings.preset} needs a {needed}: use "
            f"{use}, or another editor.model"
        )


def area_size(width_px: int, height_px: int, area_px: int) -> tuple[int, int]:
    """Return (width, height) with about this area and aspect ratio, sides multiples of 32, stable under itself."""
    size = (width_px, height_px)
    for _ in range(8):  # rounding changes the aspect ratio, from which the pipeline calculates anew
        width = (area_px * size[0] / size[1]) ** 0.5
        scaled = (max(1, round(width / 32)) * 32, max(1, round(width * size[1] / size[0] / 32)) * 32)
        if scaled == size:
            break
        size = scaled
    return size
