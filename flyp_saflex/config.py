"""Options of a recipe: name, type, range, default and meaning, one dataclass per section.

`recipe.py` converts a TOML file with these sections into a `Config` and checks combinations of options. The string under a
field is its documentation; `--print-config` prints it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from flyp_saflex.comparing import CompareConfig
from flyp_saflex.network_options import NetworkConfig
from flyp_saflex.offline import EditorConfig, FilterConfig, PromptsConfig
from flyp_saflex.presets import DEFAULT, PRESETS, SaflexSettings
from flyp_saflex.ranges import BelowOne, Count, Fraction, Natural, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Dataset: reader, splits and image decoding."""

    name: str = "folder"
    """Reader, a name in `tables.DATASETS`: `folder` (root/<domain>/<class>/* or root/<split>/<class>/*), `table` (a CSV, TSV or
    Parquet file), `hf` (Hugging Face `datasets`), `iwildcam`, `iwildcam-mini`, `cub`, WILDS' `waterbirds`, `fmow`,
    `camelyon17`; DomainBed's `pacs`, `vlcs`, `office-home`, `terra-incognita`, `domain-net`; `tabular` (rows of numbers and
    categories), `medmnist` (an npz file)."""
    root: str = ""
    """Folder of the dataset (`iwildcam`: the folder `iwildcam_v2.0` or its parent; `hf`: a folder or a hub id `owner/name`;
    `tabular` and `medmnist`: or the file)."""
    card: str = ""
    """`tabular`: description of the table, a shipped name (`qsar`, `my-table`) or a TOML file; `medmnist`: the set (`breast`)."""
    accept_altered: bool = False
    """`tabular` and `medmnist`: go on where counts or bytes are not the published ones; every difference becomes a note."""
    train_domains: tuple[str, ...] = ()
    """`folder` and `table` with domains: training domains. Held-out parts of them are `id_val` and `id_test`."""
    select_domains: tuple[str, ...] = ()
    """Domains for model selection and for SAFLEX's validation gradient (OOD splits of role `select`)."""
    test_domains: tuple[str, ...] = ()
    """Domains for evaluation only (OOD splits of role `test`)."""
    select_fraction: Fraction = 0.1
    """Fraction of each class of the training domains held out as `id_val`."""
    select_per_class: Natural = 0
    """Images per class held out as `id_val`; 0: `select_fraction` of them."""
    test_fraction: Fraction = 0.2
    """Fraction of each class of the training domains held out as `id_test`."""
    split_seed: int = 0
    """Seed of the held-out parts; separate from `seed`, so that all seeds are tested on the same images."""
    shots: Natural = 0
    """Training images per class (few-shot), drawn with `seed`; 0: all of them."""
    add_to_train: tuple[str, ...] = ()
    """Splits of role `select` to train on as well, as a whole; they can then select no model and give no validation gradient."""
    table: str = ""
    """`table`: the table file; image paths in it are relative to `root`."""
    path_column: str = "path"
    """`table`: column of the image path."""
    label_column: str = "label"
    """`table`, `hf`: column of the class, a name or an index (`hf`: `a.b` is the field b of the column a)."""
    split_column: str = ""
    """`table`: column of the split (`train`, `val`, `test` or any name); empty: the file has none."""
    domain_column: str = ""
    """`table`, `hf`: column of the domain; empty: there is none."""
    group_columns: tuple[str, ...] = ()
    """Columns whose values together make the group of worst-group accuracy, such as class and place of Waterbirds. `table`: any
    columns of the file; other readers: `class`, `domain`. Empty: the domain is the group."""
    own_classes: tuple[str, ...] = ()
    """Splits whose images are classified among the classes that occur in the split only, as ImageNet-R and ImageNet-A are (200 of
    1,000 classes); all other splits among all classes."""
    caption_column: str = ""
    """`table`: column with a caption per image; empty: class captions are used."""
    sequence_column: str = ""
    """`table`: column of the burst (sequence) that an image belongs to; `evaluate` then scores bursts as well; empty: none."""
    image_column: str = ""
    """`hf`: column of the images; empty: the only one of that type."""
    hf_subset: str = ""
    """`hf`: name of the dataset's configuration (the hub's "subset"); empty: its default."""
    hf_revision: str = ""
    """`hf`: revision of the hub's repository (branch, tag or commit); empty: the newest."""
    prompts: str = ""
    """Folder with `classes.txt` and `templates.txt`; empty: the dataset's own, or the folder names and `a photo of a {}.`"""
    box_columns: tuple[str, ...] = ()
    """`table`: columns of the object's box in pixels: left, top, width, height; empty cells: no box. Empty: the file has none."""
    boxes: str = ""
    """JSON file with boxes of the objects, COCO-style or as MegaDetector writes; the most confident box of an image counts."""
    box_crop: bool = False
    """Crop every image to its bounding box first, where boxes are known (`cub`, `box_columns`, `boxes`)."""
    max_unreadable: Fraction = 0.01
    """Largest fraction of unreadable images per split: up to it they are skipped and counted, above it the run stops."""
    workers: Natural = 0
    """Worker processes that read images; 0: the main process reads them."""
    decoding: Literal["scaled", "exact"] = "scaled"
    """`scaled`: decode large JPEGs at a half or a quarter of their size, at least twice the model's image size (PSNR of
    photographs: 50 dB or more), in training, evaluation and filters; `exact`: decode at full size."""
    materialised: str = ""
    """Folder of resized copies, read in training and evaluation instead of the files; `data RECIPE --materialise` writes them."""
    materialised_px: Count = 256
    """Shorter side of the copies in pixels, at least the model's image size; usually 8/7 of it (224: 256, 336: 384)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model that training starts from."""

    name: str = "ViT-B-16"
    """open_clip model: `ViT-B-16`, `hf-hub:org/name`, or `local-dir:/path`, a folder with `open_clip_config.json`.
    `image-classifier`: a torchvision model (`resnet18`), or `timm:NAME`."""
    pretrained: str = "openai"
    """Pretrained tag or checkpoint file; empty for `hf-hub:` and `local-dir:`, which include their weights."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Cache of edited images."""

    root: str = "augment_cache"
    """Folder of augmented images: <root>/<data.name>/<key>/metadata.jsonl and images/."""
    key: str = ""
    """Entry to read or write; empty: the only entry, and for `generate` a name derived from the editor's settings."""
    scores: str = "scores.jsonl"
    """File of filter scores beside the manifest, keyed by `aug_id`; read with `augment.filter = "scores"`."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of the training rows, and source and filter of the augmented rows."""

    upstream: tuple[str, ...] = ()
    """What makes the augmented rows, names in `tables.UPSTREAMS` applied in order; `cache` starts from edited images instead
    of training images."""
    paste: Literal["any", "same-class"] = "any"
    """`copy-paste`: training images that give backgrounds: any other one, or only those of the object's class."""
    per_train: Positive = 1.0
    """Augmented rows per training row of a batch."""
    on_train: tuple[Literal["random-crop", "flip"], ...] = ("random-crop",)
    """Transformations of the training rows (FLYP: `random-crop`, a crop of 90..100 % of the area)."""
    filter: Literal["none", "scores", "argmax", "lowest-loss", "random"] = "none"
    """Filter of the augmented rows: `scores` keeps rows whose `keep` is true in `cache.scores`; `argmax` drops rows that the
    current model assigns to another class; `lowest-loss` keeps the `keep_fraction` of each batch with the lowest loss;
    `random` keeps that fraction at random. The last three are baselines."""
    levels: tuple[NonNegative, ...] = ()
    """Cached edits to train on, by the strength or image guidance of their manifest rows (`editor.strengths`,
    `editor.image_guidances`); empty: all."""
    inter_class: Literal["source", "target", "diff-mix"] = "source"
    """Label of a cached edit whose manifest row states the class that it was made into (`target`) and how far (`strength`, s):
    its source's, its target's, or Diff-Mix' (1 - s^gamma) source + s^gamma target (arXiv 2403.19600)."""
    inter_class_gamma: Positive = 0.8
    """`diff-mix`: gamma; below 1 the target gets more than s. 0.8 is that of the authors' scripts (Zhicaiwww/Diff-Mix)."""
    keep_fraction: Fraction = 0.5
    """Fraction of rows that `lowest-loss` and `random` keep."""
    mixup_alpha: Positive = 0.2
    """`mixup`: both parameters of the Beta distribution of the mixing weight lambda."""
    crop_sigma: Positive = 0.3
    """`translate` and `soft-crop`: standard deviation of the shift, as a fraction of the image's side."""
    soft_power: Positive = 2.0
    """`soft-crop`: k of Soft-Augmentation's label 1 - (1 - 1/K)(1 - v)^k, with v the visible fraction of the image."""
    soft_weights: bool = True
    """`soft-crop`: weigh a row by its softened label's share as well."""
    cutmix_alpha: Positive = 1.0
    """`cutmix`: both parameters of the Beta distribution of the mixing weight lambda."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Loss, optimiser, trained parameters, duration and model selection."""

    method: str = "flyp"
    """`flyp`: contrastive loss between image and caption. `ce-text`: cross entropy over the class captions. `ce-linear`:
    cross entropy with a linear head. `linear-probe`: trains only that head. `lp-ft`: `linear-probe`, then `ce-linear`.
    Without CLIP, cross entropy: `mlp` (rows of numbers), `image-classifier` (ResNet and others). `contrastive-images`: NT-Xent of
    two views of every image, without labels; a linear probe on the frozen features gives its scores."""
    objective: str = ""
    """Loss, a name in `tables.OBJECTIVES` over the same labels as the method's: `contrastive` or `sigmoid` (SigLIP's, with
    `logit_bias` trained) for `flyp`. Empty: the method's; `sigmoid` for `flyp` with a model that has `logit_bias`."""
    extra_loss: str = ""
    """Further loss of the classes, a name in `tables.EXTRA_LOSSES`: `cross-entropy` over the class captions beside FLYP's loss,
    `supcon` (supervised contrastive, of images). Baselines: SAFLEX is refused beside them. Empty: none."""
    extra_weight: Positive = 1.0
    """Factor of `extra_loss`."""
    distill: Literal["none", "features", "logits"] = "none"
    """Distillation on the training rows: squared distance of embeddings from a teacher's (`features`), or divergence of the
    softmax over images and over captions (`logits`, as CaRot)."""
    distill_teacher: Literal["pretrained", "ema"] = "pretrained"
    """Teacher: the model as it started, or the running average of the weights under training."""
    distill_weight: Positive = 1.0
    """Factor of the distillation. `logits` is the mean of the two directions; CaRot's script adds them, times 1.5: 3 here."""
    distill_decay: BelowOne = 0.999
    """`distill_teacher = "ema"`: decay of the average per optimiser step. CaRot's code takes 0.9 every 500 steps instead."""
    l2_sp: NonNegative = 0.0
    """L2-SP: alpha of the penalty alpha / 2 * |w - w_0|^2 towards the weights of the start; 0: none."""
    proxies: Literal["captions", "batch"] = "captions"
    """Proxy classes of `flyp`: `captions`: each distinct caption of the batch once; `batch`: one per row, as published."""
    steps: Natural = 0
    """Optimiser steps; 0: use `epochs`."""
    epochs: NonNegative = 10.0
    """Passes over the training split. With `steps = 0` and `epochs = 0` the run is the zero-shot model, without training."""
    probe_steps: Natural = 200
    """`lp-ft`: steps of the linear probe before finetuning."""
    batch_size: Count = 256
    """Training rows per optimiser step, summed over processes and accumulated parts."""
    accumulation: Count = 1
    """Parts of a batch for gradient accumulation; the contrastive loss of a part has the negatives of that part only."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser; `sgd` has Nesterov's momentum."""
    lr: Positive = 1e-5
    """Peak learning rate."""
    head_lr: Positive = 1e-3
    """Peak learning rate of a linear head."""
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    """Learning rate over a phase: linear warm-up and a cosine, or PyTorch's `OneCycleLR`: a cosine from lr / 25 up to `lr` in the
    first 30 %, then one down to lr / 250,000; momentum stays as it is."""
    min_lr: NonNegative = 0.0
    """Lowest learning rate at the end of the schedule."""
    warmup_steps: Natural = 500
    """`cosine`: steps of linear warm-up, at most a tenth of the run."""
    weight_decay: NonNegative = 0.1
    """Weight decay."""
    decayed: Literal["matrices", "all"] = "matrices"
    """Parameters that decay: `matrices`: not biases, norms and `logit_scale` (open_clip); `all`: every one (FLYP's code)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.98)
    """AdamW's moment decays (open_clip's for ViT)."""
    momentum: BelowOne = 0.9
    """Momentum of `sgd`."""
    eps: Positive = 1e-6
    """AdamW's epsilon."""
    clip_norm: NonNegative = 1.0
    """Largest gradient norm (gradient clipping); 0: no clipping."""
    process_timeout_s: Positive = 600.0
    """Seconds that a process waits for the others of its run before it stops."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of forward and backward pass."""
    rows_at_once: Natural = 0
    """Image rows per forward and backward pass of a process; 0: all at once. A number turns on GradCache: features of all rows
    first, then gradients in parts. The step is the same, in less memory, for one more forward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    adapter: Literal["none", "lora"] = "none"
    """`lora`: train updates of low rank of the towers' linear layers (LoRA), `logit_scale` and a linear head alone; the saved
    model has them merged."""
    lora_rank: Count = 8
    """`lora`: rank of an update."""
    lora_alpha: Positive = 16.0
    """`lora`: updates are multiplied by alpha / rank."""
    lora_targets: tuple[str, ...] = ("all",)
    """`lora`: layers, by the last part of their name: `in_proj`, `out_proj`, `c_fc`, `c_proj` of open_clip's blocks; `all`: every
    linear layer."""
    freeze_text: bool = False
    """Keep the text tower as pretrained."""
    freeze_image: bool = False
    """Keep the image tower as pretrained, its projection included."""
    freeze_image_blocks: Natural = 0
    """Keep the stem and the first n blocks (stages) of the image tower as pretrained."""
    freeze_token_embedding: bool = False
    """Keep the text tower's token embedding as pretrained."""
    freeze_batchnorm: bool = True
    """BatchNorm uses its pretrained running statistics; false: batch statistics, as in training from scratch."""
    frozen_cache: str = ""
    """Folder of the feature cache, which keeps the output of the frozen image blocks between runs (exact; needs
    `on_train = []`, augmented rows without random operations, and frozen BatchNorm); empty: no feature cache."""
    balanced_sampling: bool = False
    """Draw every class equally often."""
    evaluate_every: Natural = 0
    """Steps between evaluations on `select_split`; 0: at the end only."""
    select_split: str = "id_val"
    """Split of role `select` that picks the best weights; empty: keep the last."""
    select_metric: str = "accuracy"
    """Metric that picks them, a name in `tables.METRICS`."""
    patience: Natural = 0
    """Evaluations without improvement before the run stops early; 0: no early stopping."""
    checkpoint_every: Natural = 200
    """Steps between full-state checkpoints; 0: only the one at the end, which is also written on Ctrl-C."""
    keep_checkpoints: Count = 2
    """Number of full-state checkpoints to keep; older ones are deleted."""
    log_every: Count = 10
    """Steps between rows of `metrics.jsonl`."""
    log_augmented: bool = False
    """Write weight, gain and learned label of every augmented row of every step to augmented.jsonl."""
    max_loss: Positive = 1e4
    """Largest valid loss; a larger loss, or a NaN, stops the run with its state saved."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Experiment tracker of accelerate; `metrics.jsonl` is always written."""


@dataclass(frozen=True, kw_only=True)
class SaflexConfig(SaflexSettings):
    """Weights and soft labels of the augmented rows; an option left unset has the value of `preset`."""

    enabled: bool = False
    """Learn weights and soft labels of the augmented rows; false: weight 1 and the upstream label."""
    preset: str = DEFAULT
    """Preset that gives the unset options below their values: `posterior`, `robust`, `paper-log` or `paper-prob`."""
    validation_split: str = "id_val"
    """Split of role `select` for the validation loss that weights and labels are chosen to lower."""
    gradient_rows: Literal["validation", "train"] = "validation"
    """Rows whose gradient decides: those of `validation_split` (SAFLEX), or of the training split, without augmentation: a row is
    kept by its alignment with the running average of the training gradient. After the idea of FROST, not its published code."""
    select: Literal["auto", "always", "never"] = "auto"
    """Decide the weights first and train on the kept rows only: the same step, cheaper if few rows are kept. `auto`: while the
    running average of the kept fraction is low enough to save time. Applies to the filters of `augment.filter` as well."""

    @property
    def settings(self) -> SaflexSettings:
        """The method's options alone."""
        return SaflexSettings(**{field.name: getattr(self, field.name) for field in fields(SaflexSettings)})


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation: WiSE-FT, confidence intervals, predictions."""

    batch_size: Count = 256
    """Images per forward pass."""
    wise_alphas: tuple[Fraction, ...] = ()
    """Alphas of WiSE-FT: weights (1 - alpha) * pretrained + alpha * finetuned; 1 is always evaluated."""
    select_split: str = ""
    """Split of role `select` that chooses alpha; empty: `train.select_split`."""
    max_forgetting: Fraction = 1.0
    """With `evaluate --on`: largest loss of zero-shot accuracy on any of the named sets, as a fraction (0.02: two points). Alphas
    that lose more are not chosen; 1: no limit."""
    bootstrap: Natural = 1000
    """Bootstrap resamples for the 95 % intervals; 0: no intervals."""
    calibrate: bool = False
    """Temperature scaling (arXiv 1706.04599): fit a temperature on the select split, and tell the calibration error with it as
    `ece_calibrated`; the select split's own is of the images that it was fitted on."""
    save_predictions: bool = True
    """Write predictions/<split>.parquet."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Complete recipe: name, seed and all sections."""

    recipe: str = ""
    """Name of the recipe, set by the loader."""
    seed: int = 0
    """Seed of all randomness of the run: few-shot draw, order, augmentation, linear heads."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    editor: EditorConfig = field(default_factory=EditorConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    saflex: SaflexConfig = field(default_factory=lambda: SaflexConfig(**asdict(PRESETS[DEFAULT])))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
