"""Every option, once: its name, type, range, default and meaning (imports no torch).

`recipe.py` turns a TOML file with these sections into a `Config` and says which combinations cannot work. A string under a
field documents it (`--print-config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]

LINEAR_METHODS = ("ce-linear", "linear-probe", "lp-ft")
"""Values of `train.method` whose classes are columns of a linear head instead of captions."""

WeightRule = Literal["upstream", "sum", "label", "soft", "all"]
Upstream = Literal["cache", "randaugment", "autoaugment", "augmix", "trivialaugment", "random-crop", "flip", "mixup", "cutmix"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are split."""

    name: Literal["folder", "table", "iwildcam", "iwildcam-mini", "cub"] = "folder"
    """Which reader. `folder`: root/<domain>/<class>/* or root/<split>/<class>/*; `table`: a CSV, TSV or Parquet file."""
    root: str = ""
    """The dataset's folder (for `iwildcam`: the folder that holds, or is, `iwildcam_v2.0`)."""
    train_domains: tuple[str, ...] = ()
    """`folder` and `table` with domains: the domains to train on. Held-out parts of them give `id_val` and `id_test`."""
    select_domains: tuple[str, ...] = ()
    """Domains that may select a model or give SAFLEX's validation gradient (OOD splits of role `select`)."""
    test_domains: tuple[str, ...] = ()
    """Domains that are only tested on (OOD splits of role `test`)."""
    select_fraction: Fraction = 0.1
    """Part of each class of the training domains held out as `id_val`."""
    select_per_class: Natural = 0
    """Images per class held out as `id_val`; 0: use `select_fraction`."""
    test_fraction: Fraction = 0.2
    """Part of each class of the training domains held out as `id_test`."""
    split_seed: int = 0
    """Seed of the held-out parts. Apart from `seed`, so that every seed is tested on the same images."""
    shots: Natural = 0
    """Training images per class (few-shot), drawn with `seed`; 0: all of them."""
    add_to_train: tuple[str, ...] = ()
    """`select` splits whose images, all of them, are trained on as well; they can then select nothing."""
    table: str = ""
    """`table`: the file. Image paths in it are relative to `root`."""
    path_column: str = "path"
    """`table`: column of the image's path."""
    label_column: str = "label"
    """`table`: column of the class, a name or an index."""
    split_column: str = ""
    """`table`: column of the split (`train`, `val`, `test` or any name); empty: the file has none."""
    domain_column: str = ""
    """`table`: column of the domain; empty: the file has none."""
    caption_column: str = ""
    """`table`: column of a caption per image; empty: class captions are used."""
    prompts: str = ""
    """Folder with `classes.txt` and `templates.txt`; empty: the dataset's own, or the folder names and `a photo of a {}.`"""
    box_crop: bool = False
    """`cub`: crop every image to its bounding box before anything else."""
    max_unreadable: Fraction = 0.01
    """Unreadable images are skipped and counted; above this part of a split the run stops."""
    workers: Natural = 0
    """Processes that read images; 0: read in the main process."""
    decoding: Literal["scaled", "exact"] = "scaled"
    """`scaled`: large JPEGs are decoded at a half or a quarter of their size, but at least twice what the model sees (PSNR of
    photographs: 50 dB and more), for training, evaluation and filters; `exact`: whole."""
    materialised: str = ""
    """Folder of resized copies that training and evaluation read instead of the files; `data RECIPE --materialise` makes them."""
    materialised_px: Count = 256
    """Shorter side of the copies, no less than the model's image size: 8/7 of it is usual (224: 256, 336: 384)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The CLIP model to start from."""

    name: str = "ViT-B-16"
    """Any open_clip model: `ViT-B-16`, `hf-hub:org/name`, or `local-dir:/path` with `open_clip_config.json` in it."""
    pretrained: str = "openai"
    """Pretrained tag or checkpoint file. Empty for `hf-hub:` and `local-dir:`, which carry their own weights."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where edited images are kept."""

    root: str = "augment_cache"
    """Folder of augmented images: <root>/<data.name>/<key>/metadata.jsonl and images/."""
    key: str = ""
    """Entry to read or to make; empty: the only one there, and for `generate` a name made from the editor's settings."""
    scores: str = "scores.jsonl"
    """Scores beside the manifest, keyed by `aug_id`, read by `augment.filter = "scores"`."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """The command `prompts`: from captions of the training images to edit texts (ALIA, arXiv 2305.16289)."""

    name: str = "auto"
    """The file written is prompts/<data.name>.<name>.toml."""
    captioner: str = "Salesforce/blip-image-captioning-large"
    """Image captioning model of transformers (hub id or folder); unused if `captions` is given."""
    captioner_revision: str = ""
    """Revision of the hub's repository; empty: the newest."""
    captions: str = ""
    """Your own captions: a CSV with the columns `path` and `caption`, or only `caption`."""
    num_captions: Count = 200
    """Training images that are captioned, drawn with `seed`, every class alike as far as possible."""
    llm: str = "Qwen/Qwen2.5-7B-Instruct"
    """Instruction-tuned chat model of transformers (hub id or folder) that summarises the captions."""
    llm_revision: str = ""
    """Revision of the hub's repository; empty: the newest."""
    max_domains: Count = 8
    """At most this many domain descriptions."""
    attempts: Count = 3
    """How often the model is asked at most: again, with the reasons, while an answer has malformed lines or no line at all."""
    max_new_tokens: Count = 512
    """Longest answer of the language model."""
    batch_size: Count = 16
    """Images captioned at once."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of both models' weights."""


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """The command `generate`: the diffusion editor; an option left unset has the usual value of its `kind`."""

    kind: Literal["instruct-pix2pix", "img2img", "text2img", "inpaint", "auto"] = "instruct-pix2pix"
    """`instruct-pix2pix`: follows an instruction; `img2img`: SDEdit; `text2img`: from text alone; `inpaint`: around the box;
    `auto`: any newer instruction editor, called with image and instruction."""
    model: str = ""
    """Diffusers model (hub id or folder); empty: the usual one of `kind`, for example `timbrooks/instruct-pix2pix`."""
    revision: str = ""
    """Revision of the hub's repository; empty: the newest."""
    prompts: str = ""
    """File of edit texts, its path or name (`iwildcam.alia`); empty: the only one for the dataset."""
    negative_prompt: str = ""
    """What should not be in the picture."""
    steps: Count | None = None
    """Denoising steps; unset: 20 for instructions, 50 for the others."""
    guidance: NonNegative | None = None
    """Classifier-free guidance of the text; unset: 5 for `instruct-pix2pix`, 7.5 for the others, `auto`: the pipeline's own."""
    image_guidance: NonNegative | None = None
    """`instruct-pix2pix`: guidance of the source image; unset: 1.3."""
    strength: Fraction | None = None
    """`img2img` and `inpaint`: how much noise the source gets, 1 all; unset: 0.5 and 1."""
    scheduler: str = ""
    """Class of diffusers' schedulers (`DDIMScheduler`, `DPMSolverMultistepScheduler` ...); empty: the model's own."""
    size_px: Natural = 512
    """Shorter side of what the editor sees and writes, rounded to its grid; 0: the source's own size."""
    batch_size: Count = 8
    """Edits made at once, of different images and texts; changes no edit beyond rounding, and is halved until it fits into the
    GPU's memory."""
    per_text: Count = 1
    """Edits of every image with every text, each with its own noise."""
    texts_per_image: Natural = 0
    """Texts drawn for every image, with `seed`; 0: all of them."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the editor's weights; `fp16` or `bf16` on a GPU."""
    compile: bool = False
    """Compile the denoiser (`torch.compile`): slow to start, then faster."""
    safety_checker: bool = True
    """Use the model's safety checker where it has one; what it blacks out is rejected, not written."""
    image_format: Literal["png", "jpg"] = "png"
    """Format of the edits on disk; `jpg` has quality 95 and a quarter of the size."""
    sheet_every: Natural = 200
    """Edits between contact sheets in `sheets/` of the cache entry; 0: one at the end."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The command `filter`: ALIA's filters as scores beside the cache; `augment.filter = "scores"` makes training read them."""

    use: tuple[Literal["semantic", "confidence"], ...] = ("semantic", "confidence")
    """Filters to run."""
    drop: tuple[Literal["semantic", "unchanged", "corrupted"], ...] = ("semantic", "unchanged", "corrupted")
    """Verdicts that make `keep` false: shows no object of the dataset; hardly changed; no longer shows its class."""
    run: str = ""
    """`confidence`: run folder of a model trained on the clean images."""
    threshold_split: str = "id_val"
    """`confidence`: split of role `select` whose mean confidence per class is the threshold."""
    model: str = ""
    """`semantic`: CLIP model; empty: `model.name` and `model.pretrained`."""
    pretrained: str = ""
    """`semantic`: its pretrained tag."""
    batch_size: Count = 256
    """Images per forward pass."""
    sheet_rows: Natural = 12
    """Rows of the contact sheets of kept and dropped edits; 0: no sheets."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to training images, and what makes the augmented rows."""

    upstream: tuple[Upstream, ...] = ()
    """What makes the augmented rows, applied in order; `cache` starts from edited images instead of training images."""
    per_train: Positive = 1.0
    """Augmented rows per training row of a batch."""
    on_train: tuple[Literal["random-crop", "flip"], ...] = ("random-crop",)
    """Transformations of the training rows themselves (FLYP: `random-crop`, a crop of 90..100 % of the area)."""
    filter: Literal["none", "scores", "argmax", "lowest-loss", "random"] = "none"
    """Which augmented rows are used at all: `scores` reads the `keep` column of `cache.scores`; `argmax` drops rows that
    the current model assigns to another class; `lowest-loss` keeps the `keep_fraction` with the lowest loss of each
    batch; `random` keeps that fraction at random. The last three are baselines."""
    keep_fraction: Fraction = 0.5
    """For `lowest-loss` and `random`."""
    mixup_alpha: Positive = 0.2
    """`mixup`: both parameters of the Beta distribution of the mixing share."""
    cutmix_alpha: Positive = 1.0
    """`cutmix`: the same."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Loss, optimiser, what is trained, and how long."""

    method: Literal["flyp", "ce-text", "ce-linear", "linear-probe", "lp-ft"] = "flyp"
    """`flyp`: contrastive loss between image and caption. `ce-text`: cross entropy over the class captions. `ce-linear`:
    cross entropy with a linear head. `linear-probe`: only that head. `lp-ft`: `linear-probe`, then `ce-linear`."""
    proxies: Literal["captions", "batch"] = "captions"
    """FLYP's columns: every distinct caption of the batch once, or one column per row as published."""
    steps: Natural = 0
    """Optimiser steps; 0: use `epochs`."""
    epochs: NonNegative = 10.0
    """Passes over the training split. With `steps = 0` and `epochs = 0` nothing is trained: the zero-shot model."""
    probe_steps: Natural = 200
    """`lp-ft`: steps of the linear probe before finetuning."""
    batch_size: Count = 256
    """Training rows per optimiser step, over all processes and accumulated parts."""
    accumulation: Count = 1
    """Parts that a batch is split into; each part is its own contrastive problem."""
    lr: Positive = 1e-5
    """Peak learning rate (AdamW)."""
    head_lr: Positive = 1e-3
    """Peak learning rate of a linear head."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the cosine."""
    warmup_steps: Natural = 500
    """Steps of linear warm-up; never more than a tenth of a short run."""
    weight_decay: NonNegative = 0.1
    """Not applied to biases, norms and `logit_scale`."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """AdamW's moment decays (open_clip's for ViT)."""
    eps: Positive = 1e-6
    """AdamW's epsilon."""
    clip_norm: NonNegative = 1.0
    """Largest gradient norm; 0: no clipping."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of forward and backward pass."""
    rows_at_once: Natural = 0
    """Image rows per forward and backward pass and process; 0: all at once. With a number, features come first and gradients
    in parts after them (GradCache): the same step in less memory, for one forward pass more."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    freeze_text: bool = False
    """Keep the text tower as pretrained."""
    freeze_image: bool = False
    """Keep the image tower as pretrained, its projection included."""
    freeze_image_blocks: Natural = 0
    """Keep the stem and the first n blocks (stages) of the image tower as pretrained."""
    freeze_token_embedding: bool = False
    """Keep the text tower's token embedding as pretrained."""
    freeze_batchnorm: bool = True
    """BatchNorm uses its pretrained running statistics; False: batch statistics, as from-scratch training does."""
    frozen_cache: str = ""
    """Folder that keeps the activations behind the frozen image blocks between runs (exact; needs `on_train = []`, an
    augmented stream without random operations, and frozen BatchNorm); empty: compute them every time."""
    balanced_sampling: bool = False
    """Draw every class equally often."""
    evaluate_every: Natural = 0
    """Steps between evaluations on `select_split`; 0: at the end only."""
    select_split: str = "id_val"
    """Split of role `select` that picks the best weights; empty: keep the last."""
    select_metric: Literal["accuracy", "macro_f1", "worst_group_accuracy"] = "accuracy"
    """Metric that picks them; the larger the better."""
    patience: Natural = 0
    """Stop after this many evaluations without a better one; 0: never."""
    checkpoint_every: Natural = 200
    """Steps between full-state checkpoints (one is always written at the end and on Ctrl-C); 0: none in between."""
    keep_checkpoints: Count = 2
    """Newest full-state checkpoints kept."""
    log_every: Count = 10
    """Steps between rows of `metrics.jsonl`."""
    log_augmented: bool = False
    """Write weight, gain and learned label of every augmented row of every step to augmented.jsonl."""
    max_loss: Positive = 1e4
    """A loss above this, or a NaN, stops the run with its state saved."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Experiment tracker through accelerate; `metrics.jsonl` is always written."""


@dataclass(frozen=True, kw_only=True)
class SaflexConfig:
    """Weights and soft labels of the augmented rows; an option left unset has the value of `preset`."""

    enabled: bool = False
    """Learn weights and soft labels of the augmented rows; False: weight 1 and the label that they came with."""
    preset: Literal["robust", "paper"] = "robust"
    """Values of the options below that are left at "preset" or unset."""
    validation_split: str = "id_val"
    """Split of role `select` whose loss the weights and labels are to lower."""
    temperature: Positive | None = None
    """tau of Eq. (10), softened; both presets: 0.1."""
    penalty: NonNegative | None = None
    """beta: pull of the learned label towards the one that the row came with."""
    weight_rule: WeightRule | None = None
    """Which rows are kept, from their gains; see the README's table of rules."""
    gain_scale: Literal["none", "std"] | None = None
    """Unit of the gains in the labels' softmax: as printed in the paper, or the batch's standard deviation."""
    validation_loss: Literal["ce", "margin", "train"] | None = None
    """Loss of the validation rows: cross entropy over class captions, its infinite-temperature limit, or the training loss."""
    validation_rows: Natural | None = None
    """Validation images per refresh, drawn in turn; 0, or more than the split has: all of it, kept in memory."""
    validation_renewed: Natural | None = None
    """Head scope: how many of the validation images are run through the image tower per refresh, in turn, while the others
    keep their features of earlier refreshes; 0: all. With 16 of 256 a row's features are at most 16 refreshes old."""
    refresh_every: Count | None = None
    """Steps between validation gradients."""
    scope: Literal["all", "head"] | None = None
    """Parameters whose gradient is meant: all trained ones, or image projection + text tower."""
    average: Fraction | None = None
    """Decay of a running average of the validation gradient over refreshes; 0: the newest only."""
    estimator: Literal["auto", "exact", "central", "one-sided"] | None = None
    """Directional derivative: forward-mode differentiation (`exact`), or finite differences of float32 passes. `auto`: exact
    in head scope and in half precision, else one-sided, and exact from then on if a comparison finds that it errs."""
    check_every: Natural | None = None
    """Steps (parts of steps, with `train.accumulation`) between comparisons of estimated gains with exact ones on 8 rows of
    every process, told in metrics.jsonl as `estimator_...`; 0: never."""
    agreement: Literal["ignore", "keep", "require"] | None = None
    """Rows whose label the model itself predicts: `ignore` that, `keep` them whatever their gain, or `require` it."""
    select: Literal["auto", "always", "never"] = "auto"
    """Decide about augmented rows first and train on the kept ones only: the same step, cheaper where few are kept. `auto`
    does so while a running average of the kept part is below what pays. Also for the filters of `augment.filter`."""
    permute_gains: bool = False
    """A control: every augmented row is decided about with the gains of another row of the step."""
    class_balance: Fraction | None = None
    """How far kept rows are weighed so that dropping does not shift the classes' shares; 0: not, 1: wholly."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How a run is evaluated."""

    batch_size: Count = 256
    """Images per forward pass."""
    wise_alphas: tuple[Fraction, ...] = ()
    """WiSE-FT: weights (1 - alpha) * pretrained + alpha * finetuned; 1 is always evaluated."""
    select_split: str = ""
    """Split of role `select` that picks alpha; empty: `train.select_split`."""
    bootstrap: Natural = 1000
    """Resamples behind the 95 % intervals; 0: none."""
    save_predictions: bool = True
    """Write predictions/<split>.parquet."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The command `compare`: conditions, seeds, and the measure of its verdict."""

    seeds: Annotated[tuple[int, ...], Meta(min_length=1)] = (0, 1, 2, 3, 4)
    """Seeds of every condition; differences are paired by seed."""
    baseline: str = ""
    """Condition that the report's tables compare with; empty: the one without edits, else the first."""
    metric: Literal["accuracy", "macro_f1", "worst_group_accuracy"] = "accuracy"
    """Metric of the verdict."""
    split: str = ""
    """Test split of the verdict; empty: the mean over the test splits out of distribution, or in distribution without any."""
    common: tuple[str, ...] = ()
    """Overrides `section.field=value` of every condition. In overrides `{seed}` stands for the seed, and `{kept}` for the mean
    part of the augmented rows that SAFLEX kept with the same seed."""
    conditions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Overrides by condition. A name starts with the part it plays in the verdict: `zero-shot`, `no-edits`,
    `no-edits-same-rows`, `trusted`, `filter`, `saflex`, `validation-trained`, `permuted` or `oracle`. Empty: the usual ones."""
    edits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Overrides by set of edits: each condition with augmented rows is run on every set, as `condition @ set`, and every set
    has a verdict of its own. Empty: the edits of the recipe."""
    keep: Literal["results", "models", "all"] = "models"
    """Large files that stay in the folder of an evaluated run: none, its model, or its checkpoints as well."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe."""

    recipe: str = ""
    """Name of the recipe, set by the loader."""
    seed: int = 0
    """Seed of everything random in the run: few-shot draw, order, augmentation, heads."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    editor: EditorConfig = field(default_factory=EditorConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    saflex: SaflexConfig = field(default_factory=SaflexConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
