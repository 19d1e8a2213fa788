"""Mixup and CutMix: mixing of rows, images or of numbers, and of their labels."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from flyp_saflex.errors import ConfigError


def draw_mix(num_rows: int, alpha: float, generator: torch.Generator) -> tuple[float, Tensor]:
    """Draw a mixing weight lambda from Beta(alpha, alpha), and a random partner for every row.

    Raises:
        ConfigError: alpha is not above 0.
    """
    if not alpha > 0:
        raise ConfigError(f"mixing needs alpha above 0, found {alpha}: use 0.2 (Mixup) or 1 (CutMix), or leave mixing out")
    # torch draws no Beta with a generator; numpy does, seeded from it.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    partner_N = torch.randperm(num_rows, generator=generator, device=generator.device)
    return float(np.random.default_rng(seed).beta(alpha, alpha)), partner_N


def mixup(images_NCHW: Tensor, labels_NK: Tensor, lam: float, partner_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mix images and labels with their partners: lam * row + (1 - lam) * partner (Mixup, arXiv 1710.09412)."""
    return (
        lam * images_NCHW + (1 - lam) * images_NCHW[partner_N],
        lam * labels_NK + (1 - lam) * labels_NK[partner_N],
    )


def cutmix(
    images_NCHW: Tensor, labels_NK: Tensor, lam: float, partner_N: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Paste a box of the partner into every image, and mix labels by its area (CutMix, arXiv 1905.04899).

    The box has the proportions of the image, area fraction 1 - lam and a uniform centre. It is clipped at the border, so that
    its area can be smaller than 1 - lam; the labels are mixed by the clipped area.

    Raises:
        ConfigError: the rows are no images.
    """
    if images_NCHW.ndim < 3:
        raise ConfigError(
            f"CutMix pastes boxes of images, but the rows have the shape {list(images_NCHW.shape)}: use `cutmix_fields` "
            "for rows of numbers"
        )
    height, width = images_NCHW.shape[-2:]
    box_height, box_width = round(height * math.sqrt(1 - lam)), round(width * math.sqrt(1 - lam))
    y, x = (int(torch.randint(size, (), generator=generator, device=generator.device)) for size in (height, width))
    top, left = max(y - box_height // 2, 0), max(x - box_width // 2, 0)
    bottom, right = min(y - box_height // 2 + box_height, height), min(x - box_width // 2 + box_width, width)
    mixed_NCHW = images_NCHW.clone()
    mixed_NCHW[..., top:bottom, left:right] = images_NCHW[partner_N][..., top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed_NCHW, kept * labels_NK + (1 - kept) * labels_NK[partner_N]


def cutmix_fields(
    rows_NF: Tensor,
    labels_NK: Tensor,
    lam: float,
    partner_N: Tensor,
    generator: torch.Generator,
    fields: Sequence[Hashable] = (),
) -> tuple[Tensor, Tensor]:
    """Take fields of the partner into every row, and mix labels by their share: CutMix of tables (SAINT, arXiv 2106.01342).

    Every field of every row is the partner's with probability 1 - lam; the label is mixed by the share of fields that stayed.

    Args:
        rows_NF: rows of numbers.
        labels_NK: their labels.
        lam: probability that a field stays.
        partner_N: row that each is mixed with.
        generator: of the draw.
        fields: field of every column, which is exchanged as a whole; empty: every column is one.
    """
    names = {name: place for place, name in enumerate(dict.fromkeys(fields))}
    field_F = torch.tensor([names[name] for name in fields] or range(rows_NF.shape[1]), device=rows_NF.device)
    num_fields = len(names) or rows_NF.shape[1]
    drawn_NM = torch.rand(len(rows_NF), num_fields, generator=generator, device=generator.device).to(rows_NF.device)
    stays_NM = drawn_NM < lam
    kept_N1 = stays_NM.float().mean(dim=1, keepdim=True)
    mixed_NF = torch.where(stays_NM[:, field_F], rows_NF, rows_NF[partner_N])
    return mixed_NF, kept_N1 * labels_NK + (1 - kept_N1) * labels_NK[partner_N]
