"""Setup of a run: everything it needs, built from a recipe and checked before anything is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from flyp_saflex.config import AugmentConfig, Config, TrainConfig
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.images.copy_paste import CopyPaste
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.images.reader import ImageReader, Source
from flyp_saflex.presets import PRESETS
from flyp_saflex.records import Dataset, Edit, Sample
from flyp_saflex.saflex.objectives import Objective
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.extra_terms import ExtraTerms, Teacher
from flyp_saflex.step.gradcache import obstacle
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.edits import aug_ids_of, select_edits
from flyp_saflex.tables import EXTRA_LOSSES, METHODS, OBJECTIVES, TASKS, UPSTREAMS
from flyp_saflex.tasks.task import Task, TaskInputs
from flyp_saflex.training.sampling import Plan, derived_seed
from flyp_saflex.training.upstreams import Confidence, ItemOperation, Mix, Upstream


@dataclass
class Setup:
    """A checked run, ready to start.

    Attributes:
        config: the recipe.
        dataset: splits, classes, templates.
        task: the model.
        objective: the loss.
        source: reader of rows as the model takes them.
        edits: cached edits; None: augmented rows are made of the batch's own training rows.
        plan: rows of every step.
        terms: what is added to the loss.
        saflex: None: not enabled.
        on_train, on_augmented: operations per item.
        confidences: functions that soften labels, by the place of their operation in `on_augmented`.
        paste: reader of augmented rows with another background; None: they are read as they are.
        mix: mix of the augmented rows of a batch.
        notes: lines for a person.
    """

    config: Config
    dataset: Dataset
    task: Task
    objective: Objective
    source: Source
    edits: Sequence[Edit] | None
    plan: Plan
    terms: ExtraTerms
    saflex: Saflex | None
    on_train: list[ItemOperation]
    on_augmented: list[ItemOperation]
    confidences: dict[int, Confidence]
    paste: CopyPaste | None
    mix: Mix | None
    notes: list[str]

    @property
    def pool(self) -> Sequence[Sample | Edit]:
        """Items that augmented rows are made from."""
        return self.edits if self.edits is not None else self.dataset.train.samples

    @property
    def total_steps(self) -> int:
        """Optimiser steps of finetuning (without the linear probe of `lp-ft`)."""
        train = self.config.train
        return train.steps or round(train.epochs * len(self.dataset.train) / train.batch_size)

    @property
    def num_augmented(self) -> int:
        """Augmented rows per step."""
        return self.plan.num_augmented

    def loader(self, *, progress: bool = False, source: Source | None = None) -> ImageLoader:
        """Return a reader of rows as evaluation sees them, or as another source gives them."""
        data = self.config.data
        return ImageLoader(
            source or self.source,
            batch_size=self.config.evaluate.batch_size,
            workers=data.workers,
            max_unreadable=data.max_unreadable,
            box_crop=data.box_crop,
            progress=progress,
            pin=next(self.task.network.parameters()).is_cuda,
        )


def prepare(config: Config, *, limit: int | None = None) -> Setup:
    """Load and check everything of a run: dataset, splits, edits, model, options that depend on them.

    Raises:
        UserError: whatever is wrong, in one line.
    """
    train, augment = config.train, config.augment
    dataset = load_dataset(config.data, seed=config.seed, limit=limit)
    notes = list(dataset.notes)
    _check_against(config, dataset, notes)
    upstreams = [UPSTREAMS[name] for name in augment.upstream]
    is_cut = bool(config.data.shots or limit)
    edits = _edits(config, dataset, notes, partial=is_cut) if any(upstream.is_pool for upstream in upstreams) else None
    task = _built(config, dataset)
    objective = _objective(config, task, notes)
    source = task.source(config.data, _copied(config, dataset))
    notes += [*task.notes, *source.notes]
    _check_two_passes(config, task, notes)
    plan = Plan(
        seed=config.seed,
        train=dataset.train.samples,
        edits=edits,
        batch_size=train.batch_size,
        num_augmented=round(augment.per_train * train.batch_size) if upstreams else 0,
        balanced=train.balanced_sampling,
    )
    usual = PRESETS[config.saflex.preset].validation_renewed
    if config.saflex.enabled and config.saflex.validation_renewed not in (0, usual) and config.saflex.scope != "head":
        notes.append("saflex.validation_renewed has no effect with saflex.scope=all: every image's own gradient is taken")
    return Setup(
        config=config,
        dataset=dataset,
        task=task,
        objective=objective,
        source=source,
        edits=edits,
        plan=plan,
        terms=_terms(config, dataset, objective),
        saflex=_saflex(config, task, edits, notes),
        on_train=_operations([UPSTREAMS[name] for name in augment.on_train], task, augment),
        on_augmented=_operations(upstreams, task, augment),
        confidences=_confidences(upstreams, task, augment),
        paste=_paste(config, dataset, source, task, notes) if any(upstream.pastes for upstream in upstreams) else None,
        mix=_only_mix(config, upstreams),
        notes=notes,
    )


def _built(config: Config, dataset: Dataset) -> Task:
    """Return the model with the weights that training starts from, the same every time."""
    torch.manual_seed(derived_seed(config.seed, "model") % 2**63)  # only linear heads and random models draw from it
    return TASKS[METHODS[config.train.method].task].build(TaskInputs(config=config, dataset=dataset))


def _terms(config: Config, dataset: Dataset, objective: Objective) -> ExtraTerms:
    """Return what is added to the loss, checked against the method and SAFLEX."""
    train = config.train
    extra = EXTRA_LOSSES[train.extra_loss] if train.extra_loss else None
    if extra is not None and config.saflex.enabled:
        raise ConfigError(
            f"train.extra_loss = {train.extra_loss} weighs augmented rows in a way that SAFLEX's gains do not see: set "
            "saflex.enabled=false or train.extra_loss="
        )
    if extra is not None and extra.reads_classes and objective.over != "captions":
        raise ConfigError(
            f"train.extra_loss = {train.extra_loss} is the loss of train.method = {train.method} already: leave it empty, or use "
            "train.method=flyp"
        )
    if train.distill == "logits" and not objective.is_softmax:
        raise ConfigError(
            'train.distill = "logits" compares softmaxes, but the training loss has none (sigmoid): set train.distill=features'
        )
    teacher = None
    if train.distill != "none":
        teacher = Teacher(_built(config, dataset).network, train.distill_decay if train.distill_teacher == "ema" else None)
    return ExtraTerms(
        distill=train.distill,
        distill_weight=train.distill_weight,
        teacher=teacher,
        extra=extra,
        extra_weight=train.extra_weight,
    )


def _objective(config: Config, task: Task, notes: list[str]) -> Objective:
    """Return the training loss, checked against the method, the task and the reading of the gains."""
    train, method, name = config.train, METHODS[config.train.method], task.objective_name(config)
    objective = OBJECTIVES[name]
    if objective.over == "captions" and not task.has_captions:
        raise ConfigError(
            f"train.method = {train.method} needs captions, but its task '{method.task}' has none: give the method "
            "an objective over classes (tables.METHODS)"
        )
    if objective.over != OBJECTIVES[method.objective].over:
        usual = OBJECTIVES[method.objective].over
        alike = ", ".join(other for other, loss in OBJECTIVES.items() if loss.over == usual)
        raise ConfigError(
            f"train.objective = {name} is over {objective.over}, but train.method = {train.method} is over {usual}: set "
            f"train.objective to one of {alike}, or leave it empty"
        )
    if config.saflex.enabled and config.saflex.gains_of == "prob" and not objective.is_softmax:
        raise ConfigError(
            f'saflex.gains_of = "prob" reads the logits as a softmax, but train.objective = {name} has none: set '
            'saflex.gains_of="log", or train.objective=contrastive'
        )
    if name != (train.objective or method.objective):
        notes.append(
            f"train.objective is {name}, the loss that a model with logit_bias (SigLIP) was pretrained with; "
            f"train.objective={method.objective} trains without it"
        )
    return objective


def _copied(config: Config, dataset: Dataset) -> list[Sample]:
    """Return the images that may be read from resized copies."""
    return [sample for split in dataset.splits.values() for sample in split.samples] if config.data.materialised else []


def _saflex(config: Config, task: Task, edits: Sequence[Edit] | None, notes: list[str]) -> Saflex | None:
    """Return SAFLEX with the settings that can be used here."""
    settings = config.saflex.settings
    if not config.saflex.enabled:
        return None
    if settings.evidence and (edits is None or not task.gives_evidence):
        reason = "augment.upstream=cache" if edits is None else f"a CLIP, and train.method={config.train.method} has none"
        notes.append(f"saflex.evidence has no effect without {reason}: gains decide, as in saflex.preset=robust")
        usual, robust = PRESETS[config.saflex.preset], PRESETS["robust"]
        left = {field.name for field in fields(settings) if getattr(settings, field.name) == getattr(usual, field.name)}
        settings = replace(settings, evidence=(), **{name: getattr(robust, name) for name in left - {"evidence"}})
    if config.saflex.gradient_rows == "train" and not settings.needs_gains:
        notes.append("saflex.gradient_rows has no effect where no gain decides: set saflex.preset=robust")
    return Saflex(settings)


def _operations(upstreams: Sequence[Upstream], task: Task, options: AugmentConfig) -> list[ItemOperation]:
    found = [upstream.operation_for(task.input_size_px, options) for upstream in upstreams]
    return [operation for operation in found if operation is not None]


def _confidences(upstreams: Sequence[Upstream], task: Task, options: AugmentConfig) -> dict[int, Confidence]:
    """Return what softens labels, by the place of its operation among those of the augmented rows."""
    drawing = [upstream for upstream in upstreams if upstream.operation_for(task.input_size_px, options) is not None]
    return {place: upstream.confidence for place, upstream in enumerate(drawing) if upstream.confidence is not None}


def _paste(config: Config, dataset: Dataset, source: Source, task: Task, notes: list[str]) -> CopyPaste:
    """Return the reader of augmented rows that pastes objects on other backgrounds."""
    if config.data.box_crop:
        raise ConfigError("augment.upstream = copy-paste needs what is around the boxes: set data.box_crop=false")
    if not isinstance(source, ImageReader) or not task.input_size_px:
        raise ConfigError(
            "augment.upstream = copy-paste reads images, but train.method takes rows of numbers: use mixup or cutmix"
        )
    same_class = config.augment.paste == "same-class"
    paste = CopyPaste(dataset.train.samples, source, task.input_size_px, same_class=same_class)
    if paste.num_without:
        notes.append(
            f"{paste.num_without} of {len(dataset.train)} training images have no box: augment.upstream = copy-paste "
            "leaves them as they are"
        )
    return paste


def _only_mix(config: Config, upstreams: Sequence[Upstream]) -> Mix | None:
    mixes = [upstream.mix for upstream in upstreams if upstream.mix is not None]
    if len(mixes) > 1:
        found = ", ".join(f"'{name}'" for name in config.augment.upstream)
        raise ConfigError(f"augment.upstream = {found}: rows are mixed once, by Mixup or by CutMix; leave one of them out")
    return mixes[0] if mixes else None


def _check_against(config: Config, dataset: Dataset, notes: list[str]) -> None:
    """Check the options that depend on the dataset."""
    train = config.train
    if train.select_split:
        split_for(dataset, train.select_split, "select")
    if config.saflex.enabled and config.saflex.gradient_rows == "validation":
        split_for(dataset, config.saflex.validation_split, "select")
    if train.batch_size > len(dataset.train):
        raise ConfigError(
            f"train.batch_size = {train.batch_size} is larger than the training split ({len(dataset.train)} images): "
            f"set train.batch_size={len(dataset.train)} or less"
        )
    if train.min_lr > train.lr:
        raise ConfigError(
            f"train.min_lr = {train.min_lr:g} is above train.lr = {train.lr:g}: the schedule ends at min_lr, set it to lr or less"
        )
    if train.patience and not (train.evaluate_every and train.select_split):
        notes.append("train.patience has no effect without train.evaluate_every and train.select_split")
    if train.schedule == "one-cycle" and train.warmup_steps != TrainConfig().warmup_steps:
        notes.append("train.warmup_steps has no effect with train.schedule=one-cycle: the first 30 % of the steps rise")


def _check_two_passes(config: Config, task: Task, notes: list[str]) -> None:
    """Refuse steps of two passes where they would train something else than steps of one."""
    train = config.train
    reason = obstacle(task.network, freeze_batchnorm=train.freeze_batchnorm)
    if reason and train.rows_at_once:
        raise ConfigError(f"train.rows_at_once = {train.rows_at_once}: {reason}, or train.rows_at_once=0")
    if reason and config.saflex.select == "always":
        raise ConfigError(f'saflex.select = "always": {reason}, or saflex.select="auto"')
    rows = train.batch_size + (round(config.augment.per_train * train.batch_size) if config.augment.upstream else 0)
    if train.rows_at_once * train.accumulation >= rows:
        notes.append(
            f"train.rows_at_once = {train.rows_at_once} has no effect: a part of a step has {rows // train.accumulation} rows"
        )


def _edits(config: Config, dataset: Dataset, notes: list[str], *, partial: bool) -> Sequence[Edit]:
    cache = AugmentCache.open(Path(config.cache.root), dataset.name, config.cache.key)
    usable = cache.check_against(dataset, partial=partial)
    notes += cache.notes
    if config.augment.filter == "scores":
        kept = set(aug_ids_of(cache.kept(config.cache.scores)))
        usable = select_edits(usable, [place for place, aug_id in enumerate(aug_ids_of(usable)) if aug_id in kept])
    if levels := set(config.augment.levels):
        found = [{edit.provenance.get("strength"), edit.provenance.get("image_guidance")} for edit in usable]
        usable = select_edits(usable, [place for place, own in enumerate(found) if own & levels])
        if not usable:
            known = sorted({level for own in found for level in own if isinstance(level, (int, float))})
            raise DataError(
                f"augment.levels = {list(config.augment.levels)}: no edit in {cache.folder} was made at one of them (found: "
                f"{', '.join(f'{level:g}' for level in known) or 'no level'}); set it to levels of the edits, or to []"
            )
    notes.append(f"{len(usable)} of the {len(cache)} edits in {cache.folder} are used")
    if not usable:
        filtered = " and passes the filter" if config.augment.filter == "scores" else ""
        raise DataError(
            f"augment cache {cache.folder}: none of its {len(cache)} edits belongs to one of the {len(dataset.train)} training "
            f"images{filtered}: set cache.key to another entry, or make edits of this training split"
        )
    return usable
