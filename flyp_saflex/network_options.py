"""Options of networks that are built here, not loaded: a recipe's `[network]` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flyp_saflex.ranges import BelowOne, Count, Positive


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Network of `train.method = "mlp"`, `"image-classifier"` or `"contrastive-images"`."""

    hidden: tuple[Count, ...] = (256, 256)
    """`mlp`: width of every hidden layer."""
    dropout: BelowOne = 0.0
    """`mlp`: dropout rate behind every hidden layer."""
    image_size_px: Count = 28
    """`image-classifier`, `contrastive-images`: side of the square input images in pixels."""
    width: Count = 64
    """`image-classifier`: channels of the first stage of a torchvision ResNet with basic blocks; 64: the published network."""
    stem: Literal["usual", "small"] = "small"
    """`image-classifier`: first layer of a torchvision ResNet; `small`: 3x3 with stride 1 and no pooling, for 28 px."""
    projection: Count = 128
    """`contrastive-images`: width of the embeddings that are compared; the projection has one hidden layer."""
    contrast_temperature: Positive = 0.5
    """`contrastive-images`: temperature of Eq. (12), by which cosines are divided."""
