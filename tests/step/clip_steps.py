"""Steps on tiny CLIP models: a task whose captions are those given, some of classes, some of single samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from flyp_saflex.clip.model import Clip
from flyp_saflex.config import Config, TrainConfig
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.saflex.objectives import CONTRASTIVE, CROSS_ENTROPY
from flyp_saflex.step.step import StepLoss
from flyp_saflex.tasks.clip_network import ClipNetwork
from flyp_saflex.tasks.clip_task import ClipTask


def make_task(clip: Clip, captions, *, model=None, num_classes=3, num_frozen=0, head=False, proxies="captions") -> ClipTask:
    """Return a task whose caption ids are the places in `captions`: classes first, then captions of single samples."""
    clip = clip if model is None else replace(clip, model=model)
    own = tuple(Sample(sample_id=text, item=Path(text), label=0, caption=text) for text in captions[num_classes:])
    dataset = Dataset(
        name="captions",
        root=Path(),
        class_names=tuple(captions[:num_classes]),
        splits={"train": Split(name="train", role="train", shift="id", samples=own)},
        templates=("{}",),
    )
    dtype = next(clip.model.parameters()).dtype
    linear = nn.Linear(32, num_classes).to(dtype) if head else None
    network = ClipNetwork(clip.model, num_frozen=num_frozen, head=linear)
    task = ClipTask(clip, network, dataset, Config(train=TrainConfig(proxies=proxies)))
    task.begin_phase(only_head=False)
    return task


def make_step(task: ClipTask, forward=None, *, contrastive=True, **options) -> StepLoss:
    """Return a step of FLYP or of cross entropy."""
    return StepLoss(task, CONTRASTIVE if contrastive else CROSS_ENTROPY, forward, **options)


def apart(step: StepLoss, forward) -> None:
    """Exchange the forward pass, as several processes or a compiler would."""
    step.forward = step.augmented.forward = forward
