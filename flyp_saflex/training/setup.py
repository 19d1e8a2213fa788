"""From a recipe to everything a run needs, checked before anything is spent (floor 3, shared by stages).

Shapes: M captions, L tokens, K classes, V validation rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from flyp_saflex.clip.model import Clip, load_clip
from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.config import LINEAR_METHODS, Config
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.images.augmentation import Augmentation, augmentation
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.images.reader import ImageReader, open_reader
from flyp_saflex.records import Dataset, Edit, Sample
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.saflex.settings import preset
from flyp_saflex.step.gradcache import obstacle
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.tasks.clip_task import Learner
from flyp_saflex.tasks.feature_cache import ActivationStore, frozen_blocks, open_store
from flyp_saflex.training.sampling import Plan, derived_seed

MIXES = ("mixup", "cutmix")


@dataclass
class Captions:
    """Every caption that can occur in training, by id: class k in template m is k * num_templates + m, then own captions."""

    texts: list[str]
    num_templates: int
    own: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset, samples: Sequence[Sample]) -> Captions:
        """Collect the captions of the classes, and of the samples that have their own."""
        texts = [template.replace("{}", name) for name in dataset.class_names for template in dataset.templates]
        own: dict[str, int] = {}
        for sample in samples:
            if sample.caption is not None and sample.caption not in own:
                own[sample.caption] = len(texts)
                texts.append(sample.caption)
        return cls(texts, len(dataset.templates), own)

    def of_class(self, label: int, seed: int) -> int:
        """Return a class' caption in a template that the seed picks."""
        return label * self.num_templates + seed % self.num_templates

    def of_row(self, sample: Sample | Edit, seed: int) -> int:
        """Return the caption of a row: the sample's own, or its class' in a random template."""
        if isinstance(sample, Sample) and sample.caption is not None:
            return self.own[sample.caption]
        return self.of_class(sample.label, seed)


@dataclass
class Job:
    """A checked run, ready to start."""

    config: Config
    dataset: Dataset
    clip: Clip
    reader: ImageReader
    learner: Learner
    captions: Captions
    tokens_ML: Tensor
    edits: tuple[Edit, ...] | None
    plan: Plan
    saflex: Saflex | None
    on_train: list[Augmentation]
    on_augmented: list[Augmentation]
    notes: list[str]
    initial_head: tuple[Tensor, Tensor] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the classes are columns of a linear head instead of captions."""
        return self.config.train.method in LINEAR_METHODS

    @property
    def on_cuda(self) -> bool:
        """Whether batches go to a GPU, which takes them from page-locked memory while it works."""
        return next(self.learner.parameters()).is_cuda

    @property
    def total_steps(self) -> int:
        """Optimiser steps of finetuning (without the linear probe of `lp-ft`)."""
        train = self.config.train
        return train.steps or round(train.epochs * len(self.dataset.train) / train.batch_size)

    @property
    def num_augmented(self) -> int:
        """Augmented rows per step."""
        return self.plan.num_augmented

    def class_captions(self, template: int = 0) -> Tensor:
        """Return caption_ids_K of the classes in one template."""
        return torch.arange(self.dataset.num_classes) * self.captions.num_templates + template

    def loader(self, *, progress: bool = False) -> ImageLoader:
        """Return a reader of images as evaluation sees them."""
        data = self.config.data
        return ImageLoader(
            self.reader,
            batch_size=self.config.evaluate.batch_size,
            workers=data.workers,
            max_unreadable=data.max_unreadable,
            box_crop=data.box_crop,
            progress=progress,
            pin=self.on_cuda,
        )

    def store(self, device: torch.device) -> ActivationStore | None:
        """Return the store of frozen activations, if the recipe asks for one."""
        return open_store(self.config, self.clip, self.learner.tower, self.loader(progress=True), device)


def build_learner(config: Config, clip: Clip, num_classes: int) -> Learner:
    """Return the module that a method trains, with nothing frozen yet but the cut behind frozen blocks."""
    train = config.train
    head = None
    if train.method in LINEAR_METHODS:
        width = clip.model.encode_text(clip.tokenizer(["a"])).shape[1]
        head = nn.Linear(width, num_classes)
    return Learner(clip.model, num_frozen=frozen_blocks(config, clip), head=head)


def prepare(config: Config, *, limit: int | None = None) -> Job:
    """Load and check everything of a run: dataset, splits, edits, model, captions, options that depend on them.

    Raises:
        UserError: whatever is wrong, in one line.
    """
    train, augment = config.train, config.augment
    dataset = load_dataset(config.data, seed=config.seed, limit=limit)
    notes = list(dataset.notes)
    if train.select_split:
        split_for(dataset, train.select_split, "select")
    if config.saflex.enabled:
        split_for(dataset, config.saflex.validation_split, "select")
    if train.batch_size > len(dataset.train):
        raise ConfigError(
            f"train.batch_size = {train.batch_size} is larger than the training split ({len(dataset.train)} images): "
            f"set train.batch_size={len(dataset.train)} or less"
        )
    if train.min_lr > train.lr:
        raise ConfigError(
            f"train.min_lr = {train.min_lr:g} is above train.lr = {train.lr:g}: the cosine ends at min_lr, set it to lr or less"
        )
    if train.patience and not (train.evaluate_every and train.select_split):
        notes.append("train.patience has no effect without train.evaluate_every and train.select_split")
    is_cut = bool(config.data.shots or limit)
    edits = _edits(config, dataset, notes, partial=is_cut) if "cache" in augment.upstream else None
    torch.manual_seed(derived_seed(config.seed, "model") % 2**63)  # only linear heads and random models draw from it
    clip = load_clip(config.model.name, config.model.pretrained)
    samples = [sample for split in dataset.splits.values() for sample in split.samples]
    reader = open_reader(config.data, clip.preprocess, clip.config["preprocess_cfg"], samples)
    notes += reader.notes
    learner = build_learner(config, clip, dataset.num_classes)
    _check_two_passes(config, learner, notes)
    initial_head = None
    if learner.head is not None:
        with torch.no_grad():  # WiSE-FT's start: the zero-shot classifier as a linear head
            scale = clip.model.logit_scale.exp()
            learner.head.weight.copy_(scale * zero_shot_head(clip, dataset.class_names, dataset.templates))
            learner.head.bias.zero_()
            initial_head = learner.head.weight.clone(), learner.head.bias.clone()
    captions = Captions.of(dataset, dataset.train.samples)
    num_augmented = round(augment.per_train * train.batch_size) if augment.upstream else 0
    plan = Plan(
        seed=config.seed,
        train=dataset.train.samples,
        edits=edits,
        batch_size=train.batch_size,
        num_augmented=num_augmented,
        balanced=train.balanced_sampling,
    )
    operation = partial(augmentation, image_size_px=clip.image_size_px)
    saflex = None
    if config.saflex.enabled:
        options = asdict(config.saflex)
        name = options.pop("preset")
        for key in ("enabled", "validation_split", "select"):
            options.pop(key)
        saflex = Saflex(preset(name, **options))
        if config.saflex.validation_renewed and saflex.settings.scope != "head":
            notes.append("saflex.validation_renewed has no effect with saflex.scope=all: every image's own gradient is taken")
    return Job(
        config=config,
        dataset=dataset,
        clip=clip,
        reader=reader,
        learner=learner,
        captions=captions,
        tokens_ML=clip.tokenizer(captions.texts),
        edits=edits,
        plan=plan,
        saflex=saflex,
        on_train=[operation(name) for name in augment.on_train],
        on_augmented=[operation(name) for name in augment.upstream if name not in ("cache", *MIXES)],
        notes=notes,
        initial_head=initial_head,
    )


def _check_two_passes(config: Config, learner: Learner, notes: list[str]) -> None:
    """Refuse steps of two passes where they would train something else than steps of one."""
    train = config.train
    reason = obstacle(learner, freeze_batchnorm=train.freeze_batchnorm)
    if reason and train.rows_at_once:
        raise ConfigError(f"train.rows_at_once = {train.rows_at_once}: {reason}, or train.rows_at_once=0")
    if reason and config.saflex.select == "always":
        raise ConfigError(f'saflex.select = "always": {reason}, or saflex.select="auto"')
    rows = train.batch_size + (round(config.augment.per_train * train.batch_size) if config.augment.upstream else 0)
    if train.rows_at_once * train.accumulation >= rows:
        notes.append(
            f"train.rows_at_once = {train.rows_at_once} has no effect: a part of a step has {rows // train.accumulation} rows"
        )


def _edits(config: Config, dataset: Dataset, notes: list[str], *, partial: bool) -> tuple[Edit, ...]:
    cache = AugmentCache.open(Path(config.cache.root), dataset.name, config.cache.key)
    usable = cache.check_against(dataset, partial=partial)
    notes += cache.notes
    if config.augment.filter == "scores":
        kept = {edit.aug_id for edit in cache.kept(config.cache.scores)}
        usable = tuple(edit for edit in usable if edit.aug_id in kept)
    notes.append(f"{len(usable)} of the {len(cache)} edits in {cache.folder} are used")
    if not usable:
        filtered = " and passes the filter" if config.augment.filter == "scores" else ""
        raise DataError(
            f"augment cache {cache.folder}: none of its {len(cache)} edits belongs to one of the {len(dataset.train)} training "
            f"images{filtered}: set cache.key to another entry, or make edits of this training split"
        )
    return usable
