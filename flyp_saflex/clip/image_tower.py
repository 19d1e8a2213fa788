"""Image tower of open_clip in three parts: lower (frozen blocks), upper, projection.

    images_B3SS -> lower -> hidden_B... -> upper -> pooled_BF -> project -> embeddings_BD

Frozen blocks run without gradient (or once per image, see the feature cache in tasks/feature_cache.py), and SAFLEX's head scope
reuses the pooled features of the training step.

Shapes: B images, S side in pixels, F pooled width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flyp_saflex.clip.blocks import is_plain_block, run_block, run_block_for_first
from flyp_saflex.errors import ModelError


class ImageTower:
    """Image tower of open_clip, cut after its first `num_frozen` blocks and before its projection.

    Supports open_clip's VisionTransformer and ModifiedResNet, and timm's EfficientNet, ConvNeXt and VisionTransformer
    families; any other tower runs as a whole (`num_frozen = 0`).

    Args:
        visual: `model.visual`. This class is no `nn.Module` and only refers to it, so that every parameter keeps one name.
        num_frozen: blocks of a ViT, or stages of a ConvNet, in the lower part, which also has the stem.

    Raises:
        ModelError: the tower cannot be cut there.
    """

    def __init__(self, visual: nn.Module, num_frozen: int = 0) -> None:
        self.visual = visual
        self.num_frozen = num_frozen
        self.checkpointing = False
        self._parts = parts = _parts(visual)
        blocks = len(parts.blocks) if parts else 0
        if num_frozen > blocks:
            found = f"it has {blocks} blocks" if parts else "this tower's structure is not known"
            raise ModelError(f"train.freeze_image_blocks = {num_frozen}: {found} ({type(visual).__name__}); use a smaller number")

    @property
    def has_projection(self) -> bool:
        """True if the tower has a separate, known projection, which head scope needs."""
        return self._parts is not None

    @property
    def lower_gives_one_token(self) -> bool:
        """True if `lower` returns the pooled token only: all blocks are frozen, and the last runs for that token."""
        return self._parts is not None and self._parts.pools_first and self.num_frozen == len(self._parts.blocks)

    def lower(self, images: Tensor) -> Tensor:
        """Run the stem and the frozen blocks.

        Args:
            images: [B, 3, S, S].

        Returns:
            Output of the last frozen block (one token per image with `lower_gives_one_token`); the images themselves if no
            block is frozen.
        """
        if not self.num_frozen:
            return images
        parts = self._cut()
        hidden = parts.stem(images)
        for run in parts.runs[: self.num_frozen]:
            hidden = run(hidden)
        return hidden

    def upper(self, hidden: Tensor) -> Tensor:
        """Run the trained blocks and the pooling.

        Args:
            hidden: output of `lower`.

        Returns:
            Pooled features [B, F]; embeddings [B, D] if the tower has no known projection.
        """
        parts = self._parts
        if parts is None:
            return self.visual(hidden)
        if not self.num_frozen:
            hidden = parts.stem(hidden)
        for run in parts.runs[self.num_frozen :]:
            hidden = checkpoint(run, hidden, use_reentrant=False) if self.checkpointing and hidden.requires_grad else run(hidden)
        return parts.pool(hidden)

    def project(self, pooled: Tensor) -> Tensor:
        """Project pooled features [B, F] to embeddings [B, D], not normalised."""
        return pooled if self._parts is None else self._parts.project(pooled)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Encode the output of `lower` as embeddings [B, D], not normalised."""
        return self.project(self.upper(hidden))

    def _cut(self) -> _Parts:
        assert self._parts is not None, "the constructor refuses to cut a tower of unknown structure"
        return self._parts

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the stem and of the frozen blocks; none if no block is frozen."""
        if self.num_frozen:
            parts = self._cut()
            for module in parts.frozen_stem:
                yield from [module] if isinstance(module, nn.Parameter) else module.parameters()
            for block in parts.blocks[: self.num_frozen]:
                yield from block.parameters()

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the projection; empty if the tower has no known projection."""
        if self._parts is None:
            return []
        head = self._parts.head
        return [head] if isinstance(head, nn.Parameter) else list(head.parameters())


def num_blocks(visual: nn.Module) -> int:
    """Return the number of blocks (ConvNet: stages) of an image tower; 0 for an unknown structure."""
    parts = _parts(visual)
    return len(parts.blocks) if parts else 0


@dataclass
class _Parts:
    stem: Callable[[Tensor], Tensor]
    frozen_stem: list[Any]
    blocks: list[nn.Module]
    pool: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    head: Any
    runs: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    """Functions that run the blocks; the blocks themselves by default."""
    pools_first: bool = False
    """True if the last block returns the pooled token only."""

    def __post_init__(self) -> None:
        self.runs = self.runs or list(self.blocks)


def _parts(visual: Any) -> _Parts | None:
    kind = type(visual).__name__
    if kind == "VisionTransformer" and hasattr(visual, "_embeds") and visual.proj is not None:
        return _open_clip_vit(visual)
    if kind == "ModifiedResNet":
        stem = [visual.conv1, visual.bn1, visual.conv2, visual.bn2, visual.conv3, visual.bn3]
        blocks = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        return _Parts(visual.stem, stem, blocks, lambda h: h, visual.attnpool, visual.attnpool)
    if kind == "TimmModel":
        return _timm(visual)
    return None


def _open_clip_vit(visual: Any) -> _Parts | None:
    transformer = visual.transformer
    if not getattr(transformer, "batch_first", True) or visual.attn_pool is not None:
        return None
    runs: list[Callable[[Tensor], Tensor]] = [
        partial(run_block, block) if is_plain_block(block) else block for block in transformer.resblocks
    ]
    if pools_first := visual.pool_type == "tok" and is_plain_block(transformer.resblocks[-1]):
        runs[-1] = partial(run_block_for_first, transformer.resblocks[-1])
    return _Parts(
        visual._embeds,
        [visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre],
        list(transformer.resblocks),
        lambda hidden: visual._pool(hidden)[0],
        lambda pooled: pooled @ visual.proj,
        visual.proj,
        runs,
        pools_first,
    )


def _timm(visual: Any) -> _Parts | None:
    trunk = visual.trunk
    own_head = len(visual.head) > 0
    if own_head:
        head, project = visual.head, visual.head
    else:
        head = trunk.get_classifier()
        project = head

    def pool(features: Tensor) -> Tensor:
        return trunk.forward_head(features) if own_head else trunk.forward_head(features, pre_logits=True)

    if hasattr(trunk, "conv_stem") and hasattr(trunk, "conv_head") and hasattr(trunk, "blocks"):  # EfficientNet
        return _Parts(
            lambda x: trunk.bn1(trunk.conv_stem(x)),
            [trunk.conv_stem, trunk.bn1],
            list(trunk.blocks),
            lambda h: pool(trunk.bn2(trunk.conv_head(h))),
            project,
            head,
        )
    if hasattr(trunk, "stages") and hasattr(trunk, "norm_pre") and hasattr(trunk, "stem"):  # ConvNeXt
        return _Parts(trunk.stem, [trunk.stem], list(trunk.stages), lambda h: pool(trunk.norm_pre(h)), project, head)
    if hasattr(trunk, "patch_embed") and hasattr(trunk, "blocks") and hasattr(trunk, "_pos_embed"):  # VisionTransformer
        embeddings = [getattr(trunk, name) for name in ("patch_embed", "cls_token", "pos_embed", "reg_token", "norm_pre")]
        return _Parts(
            lambda x: trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x)))),
            [part for part in embeddings if part is not None],
            list(trunk.blocks),
            lambda h: pool(trunk.norm(h)),
            project,
            head,
        )
    return None
