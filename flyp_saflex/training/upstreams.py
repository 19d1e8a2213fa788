"""Upstreams: sources of augmented rows, by the names of `augment.upstream`.

    a pool       cached edits take the place of the batch's training rows
    per item     a random operation on every row, drawn from the row's own seed
    per batch    a mix of the augmented rows of a batch, of their inputs and of their labels

A new upstream is one `Upstream` and one line in `tables.UPSTREAMS`.

Shapes: A augmented rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flyp_saflex.config import AugmentConfig
from flyp_saflex.data.mixing import cutmix, draw_mix, mixup
from flyp_saflex.images.augmentation import augmentation
from flyp_saflex.images.picture import Picture


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


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """One source of augmented rows; exactly one of the three is set.

    Attributes:
        is_pool: rows come from the augment cache.
        operation: side of the model's square input in pixels (0: no images) -> operation per item.
        mix: inputs [A, ...] of all processes in the order of a single one, `[augment]` section, generator -> mixed rows.
    """

    is_pool: bool = False
    operation: Callable[[int], ItemOperation] | None = None
    mix: Callable[[Tensor, AugmentConfig, torch.Generator], Mixed] | None = None


def _mixup(inputs: Tensor, options: AugmentConfig, generator: torch.Generator) -> Mixed:
    share, partner_A = draw_mix(len(inputs), options.mixup_alpha, generator)
    partner_A = partner_A.to(inputs.device)
    mixed, mass_AA = mixup(inputs, torch.eye(len(inputs), device=inputs.device), share, partner_A)
    return Mixed(mixed, partner_A, mass_AA.diagonal())


def _cutmix(inputs: Tensor, options: AugmentConfig, generator: torch.Generator) -> Mixed:
    share, partner_A = draw_mix(len(inputs), options.cutmix_alpha, generator)
    partner_A = partner_A.to(inputs.device)
    mixed, mass_AA = cutmix(inputs, torch.eye(len(inputs), device=inputs.device), share, partner_A, generator)
    return Mixed(mixed, partner_A, mass_AA.diagonal())


CACHE = Upstream(is_pool=True)
RANDAUGMENT, AUTOAUGMENT, AUGMIX, TRIVIALAUGMENT, RANDOM_CROP, FLIP = (
    Upstream(operation=partial(augmentation, name))
    for name in ("randaugment", "autoaugment", "augmix", "trivialaugment", "random-crop", "flip")
)
MIXUP, CUTMIX = Upstream(mix=_mixup), Upstream(mix=_cutmix)
