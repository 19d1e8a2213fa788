"""Upstreams: sources of augmented rows, by the names of `augment.upstream`.

    copy-paste   the object of the batch's training rows on other training images (images/copy_paste.py)
    a pool       cached edits take the place of the batch's training rows
    per item     a random operation on every row, drawn from the row's own seed; its draw may soften the row's label
    per batch    a mix of the augmented rows of a batch, of their inputs and of their labels

A new upstream is one `Upstream` and one line in `tables.UPSTREAMS`.

Shapes: A augmented rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flyp_saflex.config import AugmentConfig
from flyp_saflex.data.mixing import cutmix, cutmix_fields, draw_mix, mixup
from flyp_saflex.images.augmentation import augmentation
from flyp_saflex.images.picture import Picture
from flyp_saflex.images.translation import Translation, visible_fraction
from flyp_saflex.saflex.baselines import soft_confidence


class ItemOperation(Protocol):
    """Random operation on one row, a function of the row and a seed."""

    def on(self, picture: Picture, seed: int) -> Picture:
        """Return a changed copy."""


class Mixed(NamedTuple):
    """Augmented rows mixed with each other.

    Attributes:
        inputs: mixed rows [A, ...].
        partners_A: the row that each was mixed with.
        shares_A: part of each row's label that stays its own.
    """

    inputs: Tensor
    partners_A: Tensor
    shares_A: Tensor


Mix = Callable[[Tensor, AugmentConfig, torch.Generator, Sequence[str]], Mixed]


Confidence = Callable[[AugmentConfig, int, int], float]


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """One source of augmented rows; exactly one of the first five is set.

    Attributes:
        is_pool: rows come from the augment cache.
        pastes: the object of a training image is put on the background of another.
        operation: side of the model's square input in pixels (0: no images) -> operation per item.
        configured: the same, with the `[augment]` section.
        mix: inputs [A, ...] of all processes in the order of a single one, `[augment]` section, generator, field of every column
            of a table -> mixed rows.
        confidence: `[augment]` section, seed of an item's operation, number of classes -> part of the row's label that stays its
            own, the rest being spread over the other classes; None: all of it.
    """

    is_pool: bool = False
    pastes: bool = False
    operation: Callable[[int], ItemOperation] | None = None
    configured: Callable[[int, AugmentConfig], ItemOperation] | None = None
    mix: Mix | None = None
    confidence: Confidence | None = None

    def operation_for(self, image_size_px: int, options: AugmentConfig) -> ItemOperation | None:
        """Return the operation per item; None: there is none."""
        if self.configured is not None:
            return self.configured(image_size_px, options)
        return None if self.operation is None else self.operation(image_size_px)


def _mixup(inputs: Tensor, options: AugmentConfig, generator: torch.Generator, fields: Sequence[str] = ()) -> Mixed:
    share, partner_A = draw_mix(len(inputs), options.mixup_alpha, generator)
    partner_A = partner_A.to(inputs.device)
    mixed, mass_AA = mixup(inputs, torch.eye(len(inputs), device=inputs.device), share, partner_A)
    return Mixed(mixed, partner_A, mass_AA.diagonal())


def _cutmix(inputs: Tensor, options: AugmentConfig, generator: torch.Generator, fields: Sequence[str] = ()) -> Mixed:
    share, partner_A = draw_mix(len(inputs), options.cutmix_alpha, generator)
    partner_A = partner_A.to(inputs.device)
    own_AA = torch.eye(len(inputs), device=inputs.device)
    if inputs.ndim == 2:
        mixed, mass_AA = cutmix_fields(inputs, own_AA, share, partner_A, generator, fields)
    else:
        mixed, mass_AA = cutmix(inputs, own_AA, share, partner_A, generator)
    return Mixed(mixed, partner_A, mass_AA.diagonal())


def _translation(image_size_px: int, options: AugmentConfig) -> Translation:
    return Translation(image_size_px, options.crop_sigma)


def _soft_confidence(options: AugmentConfig, seed: int, num_classes: int) -> float:
    return soft_confidence(visible_fraction(options.crop_sigma, seed), num_classes, options.soft_power)


CACHE = Upstream(is_pool=True)
COPY_PASTE = Upstream(pastes=True)
TRANSLATE = Upstream(configured=_translation)
SOFT_CROP = Upstream(configured=_translation, confidence=_soft_confidence)
RANDAUGMENT, AUGMIX, TRIVIALAUGMENT, RANDOM_CROP, FLIP, AUTOAUGMENT, AUTOAUGMENT_CIFAR10, AUTOAUGMENT_SVHN = (
    Upstream(operation=partial(augmentation, name))
    for name in (
        "randaugment",
        "augmix",
        "trivialaugment",
        "random-crop",
        "flip",
        "autoaugment",
        "autoaugment-cifar10",
        "autoaugment-svhn",
    )
)
MIXUP, CUTMIX = Upstream(mix=_mixup), Upstream(mix=_cutmix)
