"""Steps on tiny CLIP models: a task whose captions are those given, some of classes, some of single samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from flyp_saflex.clip.model import Clip
from flyp_saflex.config import Config, TrainConfig
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.saflex.objectives import CONTRASTIVE, CROSS_ENTROPY, SIGMOID, Objective
from flyp_saflex.step.step import StepLoss
from flyp_saflex.tasks.clip_network import ClipNetwork
from flyp_saflex.tasks.clip_task import ClipTask


def make_task(
    clip: Clip, captions, *, model=None, num_classes=3, num_frozen=0, head=False, proxies="captions", logit_bias=None
) -> ClipTask:
    """Return a task whose caption ids are the places in `captions`: classes first, then captions of single samples.

    With a `logit_bias` the model has one, for the sigmoid loss.
    """
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
    if logit_bias is not None:
        clip.model.logit_bias = nn.Parameter(torch.tensor(logit_bias, dtype=dtype))
    network = ClipNetwork(clip.model, num_frozen=num_frozen, head=linear, with_bias=logit_bias is not None)
    task = ClipTask(clip, network, dataset, Config(train=TrainConfig(proxies=proxies)))
    task.begin_phase(only_head=False)
    return task


def make_step(task: ClipTask, forward=None, *, contrastive=True, **options) -> StepLoss:
    """Return a step of FLYP (with the sigmoid loss if the network has a bias) or of cross entropy."""
    objective: Objective = SIGMOID if task.network.with_bias else CONTRASTIVE
    return StepLoss(task, objective if contrastive else CROSS_ENTROPY, forward, **options)


def apart(step: StepLoss, forward) -> None:
    """Exchange the forward pass, as several processes or a compiler would."""
    step.forward = step.augmented.forward = forward
