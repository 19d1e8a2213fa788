"""Options of the commands before training: a recipe's sections `[prompts]`, `[editor]` and `[filter]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flyp_saflex.ranges import Count, Fraction, Natural, NonNegative


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Edit prompts from captions of the training images (command `prompts`; ALIA, arXiv 2305.16289)."""

    name: str = "auto"
    """Name of the prompt file: prompts/<data.name>.<name>.toml."""
    captioner: str = "Salesforce/blip-image-captioning-large"
    """Image captioning model of transformers (hub id or folder); unused if `captions` is given."""
    captioner_revision: str = ""
    """Revision of the hub's repository; empty: the newest."""
    captions: str = ""
    """CSV file of captions with the columns `path` and `caption`, or only `caption`; replaces the captioner."""
    num_captions: Count = 200
    """Training images to caption, drawn with `seed`, balanced over classes as far as possible."""
    llm: str = "Qwen/Qwen2.5-7B-Instruct"
    """Chat model of transformers (hub id or folder) that summarises the captions."""
    llm_revision: str = ""
    """Revision of the hub's repository; empty: the newest."""
    max_domains: Natural = 8
    """Largest number of domain descriptions; 0: `conditions` alone, and no model is loaded."""
    conditions: tuple[str, ...] = ()
    """Conditions of deployment that you can name (`at dusk`, `in snow`, `infrared at night`): edit prompts of their own, before
    the domains of the captions."""
    attempts: Count = 3
    """Largest number of requests: an answer with malformed lines or no lines is requested again, with the reasons."""
    max_new_tokens: Count = 512
    """Largest length of an answer of the language model, in tokens."""
    batch_size: Count = 16
    """Images per captioning batch."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of both models' weights."""


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """Diffusion editor (command `generate`); an unset option takes the default of its `preset` or `kind`."""

    preset: str = ""
    """Editor by name, with kind, model and advised options: `instruct-pix2pix`, `sdxl-instruct-pix2pix`, `flux-kontext`,
    `flux2-klein`, `qwen-image-edit`, `img2img`, `text2img`, `inpaint`, `controlnet-canny`; empty: `kind` decides."""
    kind: str = "instruct-pix2pix"
    """`instruct-pix2pix`: follows an instruction; `img2img`: SDEdit; `text2img`: from text alone; `inpaint`: around the box;
    `controlnet-canny`: from text and the source's edges; `auto`: any newer instruction editor, called with image and instruction
    (or another name in the table `EDITORS`)."""
    model: str = ""
    """Diffusers model (hub id or folder); empty: the default of `kind`, for example `timbrooks/instruct-pix2pix`."""
    controlnet: str = ""
    """`controlnet-canny`: ControlNet (hub id or folder); empty: the one in the folder of `model`, else
    `lllyasviel/sd-controlnet-canny`."""
    revision: str = ""
    """Revision of the hub's repository; empty: the newest."""
    prompts: str = ""
    """File of edit prompts, as a path or a name (`iwildcam.alia`); empty: the only file for the dataset."""
    negative_prompt: str = ""
    """Negative prompt: content to avoid in the image."""
    steps: Count | None = None
    """Denoising steps; unset: 20 for instruction editors, 50 for the others."""
    guidance: NonNegative | None = None
    """Guidance scale of the text; unset: 5 for `instruct-pix2pix`, the pipeline's default for `auto`, 7.5 for the others."""
    image_guidance: NonNegative | None = None
    """`instruct-pix2pix`: guidance scale of the source image; unset: 1.3."""
    strength: Fraction | None = None
    """`img2img` and `inpaint`: noise added to the source image, 0 (none) to 1 (full); unset: 0.5 and 1."""
    strengths: tuple[Fraction, ...] = ()
    """`img2img` and `inpaint`: several levels of `strength`; every image and prompt is edited at each, with the same noise."""
    image_guidances: tuple[NonNegative, ...] = ()
    """`instruct-pix2pix`: several levels of `image_guidance`; every image and prompt is edited at each, with the same noise."""
    scheduler: str = ""
    """Class name of a diffusers scheduler (`DDIMScheduler`, `DPMSolverMultistepScheduler` ...); empty: the model's own."""
    size_px: Natural | None = None
    """Shorter side of the editor's input and output in pixels, rounded to the model's grid; unset: 512, or the preset's; 0: size
    of the source."""
    batch_size: Count = 8
    """Edits per batch, of different images and prompts. It changes edits only by rounding, and is halved until the batch fits
    into GPU memory."""
    per_text: Count = 1
    """Edits per image and prompt, each with its own noise."""
    texts_per_image: Natural = 0
    """Prompts drawn per image, with `seed`; 0: all."""
    plan: Literal["all", "quota", "bias", "hard"] = "all"
    """Edits to make among all images and prompts. `quota`: rare classes first, until images and edits of all classes are level;
    `bias`: per class, places where training never or rarely saw it first, until pairs of class and place are level; `hard`:
    images that `hard_run` gets wrong, or with a budget the hardest first."""
    budget: Natural = 0
    """Edits in all; 0: all, or as many as `quota`, `bias` and `hard` ask for. `generate --plan` needs one."""
    hard_run: str = ""
    """`hard`: run folder with predictions/train.parquet, written by `flyp-saflex evaluate RUN --split train`; best a run without
    training, or one that learned little, for a run knows the images that it has learned."""
    places: str = ""
    """`bias`: CSV file with the columns `domain` and `place`: the place, called as the `domain` of a prompt, of each of the
    dataset's domains (camera locations, for example); empty: they are called alike."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the editor's weights; `fp16` or `bf16` on a GPU."""
    compile: bool = False
    """Compile the denoiser (`torch.compile`): slow to start, then faster."""
    safety_checker: bool = True
    """Use the model's safety checker if it has one; images that it blacks out are rejected and not written."""
    image_format: Literal["png", "jpg"] = "png"
    """File format of the edits; `jpg` has quality 95 and a quarter of the size of `png`."""
    sheet_every: Natural = 200
    """Edits between contact sheets in `sheets/` of the cache entry; 0: one sheet at the end."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """ALIA's filters, source consistency, CLIPScore (command `filter`): scores for training with `augment.filter = "scores"`."""

    use: tuple[Literal["semantic", "confidence", "source", "clip-score"], ...] = ("semantic", "confidence")
    """Filters to run. `source` (source consistency) needs no run, and also writes CLIP's directional similarity. `clip-score`:
    CLIPScore of the edit and the name of its class."""
    drop: tuple[Literal["semantic", "unchanged", "corrupted", "foreign", "low-score"], ...] = (
        "semantic",
        "unchanged",
        "corrupted",
        "foreign",
        "low-score",
    )
    """Verdicts that set `keep` to false: the edit shows no object of the dataset (`semantic`), hardly differs from its source
    (`unchanged`), no longer shows its class (`corrupted`), resembles sources of another class more (`foreign`), or fits the
    name of its class too little (`low-score`)."""
    min_clip_score: NonNegative = 0.5
    """`clip-score`: smallest CLIPScore, 2.5 max(cosine, 0), that is kept. 0.5 is a cosine of 0.2, usual for CLIP ViT-B; scores of
    other models have another scale, so compare with the quantiles that are printed."""
    run: str = ""
    """`confidence`: run folder of a model trained on the clean images."""
    rule: Literal["predicted", "alia"] = "predicted"
    """`confidence`: `predicted`: the threshold of the class that the edit is predicted as, from the held-out images of
    `threshold_split` (confident learning, the paper's text). `alia`: that of the source's class, from the training images, as in
    ALIA's released code (filtering/filter.py at ce01c94); on images that the run has learned, thresholds are higher."""
    threshold_split: str = "id_val"
    """`confidence` with `rule = "predicted"`: split of role `select`; its mean confidence per class is the threshold."""
    model: str = ""
    """`semantic`: CLIP model; empty: `model.name` and `model.pretrained`."""
    pretrained: str = ""
    """`semantic`: pretrained tag of `filter.model`."""
    batch_size: Count = 256
    """Images per forward pass."""
    sheet_rows: Natural = 12
    """Rows of the contact sheets of kept and dropped edits; 0: no sheets."""
