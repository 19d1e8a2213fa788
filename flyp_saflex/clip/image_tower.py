"""Image tower of open_clip in three parts: lower (frozen blocks), upper, projection.

    images_B3SS -> lower -> hidden_B... -> upper -> pooled_BF -> project -> embeddings_BD

Frozen blocks run without gradient (or once per image, see the feature cache in tasks/feature_cache.py), and SAFLEX's head scope
reuses the pooled features of the training step. `check_cut` compares the parts with the whole tower when a model is loaded.

Shapes: B images, S side in pixels, F pooled width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flyp_saflex.clip.blocks import is_plain_block, run_block, run_block_for_first
from flyp_saflex.errors import ModelError

CUTS = ("blocks", "projection", "nowhere")
"""Places where a tower can be cut, from the finest on."""
MAX_ERROR = 1e-3
"""Largest relative difference of the cut tower's embedding that is rounding (1e-6 to 1e-5 in float32)."""


class ImageTower:
    """Image tower of open_clip, cut after its first `num_frozen` blocks and before its projection.

    Supports open_clip's VisionTransformer and ModifiedResNet, and timm's EfficientNet, ConvNeXt, VisionTransformer and Eva
    families. Other towers of timm are cut before their projection only, and any other tower runs as a whole: both have no
    blocks (`num_frozen = 0`).

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
            hidden = self._run(parts.stem, hidden) if not parts.blocks else parts.stem(hidden)
        for run in parts.runs[self.num_frozen :]:
            hidden = self._run(run, hidden)
        return parts.pool(hidden)

    def _run(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if self.checkpointing and hidden.requires_grad:
            return checkpoint(run, hidden, use_reentrant=False)
        return run(hidden)

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


@torch.no_grad()
def check_cut(visual: nn.Module, image_size_px: int) -> str:
    """Compare the cut tower with the whole one on one image, and cut it less where they differ.

    Args:
        visual: `model.visual`, in evaluation mode; the cut that agrees is noted on it, so that every `ImageTower` uses it.
        image_size_px: S.

    Returns:
        A note if the tower is cut less than its structure suggests, else the empty string.
    """
    weight = next(visual.parameters())
    images = torch.randn(1, 3, image_size_px, image_size_px, generator=torch.Generator().manual_seed(0)).to(weight)
    whole_1D = visual(images)
    reasons = []
    for cut in CUTS:
        visual.cut = cut  # type: ignore[assignment]
        if _parts(visual) is None:
            break
        if not (reason := _difference(visual, images, whole_1D)):
            break
        reasons.append(reason)
    if not reasons:
        return ""
    trunk = type(getattr(visual, "trunk", visual)).__name__
    return f"image tower {trunk}: cut into blocks it {reasons[0]}, so it runs whole (train.freeze_image_blocks cannot be used)"


def _difference(visual: nn.Module, images: Tensor, whole_1D: Tensor) -> str:
    """Return why the cut tower is not the whole one; empty if it is."""
    try:
        tower = ImageTower(visual, num_blocks(visual))
        found_1D = tower(tower.lower(images))
    except Exception as error:  # whatever a module raises that was meant to be called in another way
        return f"fails ({(str(error) or type(error).__name__).splitlines()[0][:80]})"
    if found_1D.shape != whole_1D.shape:
        return f"gives an embedding of {found_1D.shape[-1]} numbers instead of {whole_1D.shape[-1]}"
    difference = float((found_1D - whole_1D).norm() / whole_1D.norm())
    return "" if difference < MAX_ERROR else f"gives another embedding (relative difference {difference:.1g})"


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
    kind, cut = type(visual).__name__, getattr(visual, "cut", CUTS[0])
    if cut == "nowhere":
        return None
    if kind == "TimmModel":
        return (_timm(visual) if cut == "blocks" else None) or _before_projection(visual)
    if cut != "blocks":
        return None
    if kind == "VisionTransformer" and hasattr(visual, "_embeds") and visual.proj is not None:
        return _open_clip_vit(visual)
    if kind == "ModifiedResNet":
        stem = [visual.conv1, visual.bn1, visual.conv2, visual.bn2, visual.conv3, visual.bn3]
        blocks = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        return _Parts(visual.stem, stem, blocks, lambda h: h, visual.attnpool, visual.attnpool)
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
    trunk, (pool, head) = visual.trunk, _pool_and_projection(visual)
    if hasattr(trunk, "conv_stem") and hasattr(trunk, "conv_head") and hasattr(trunk, "bn2"):  # EfficientNet
        return _Parts(
            lambda x: trunk.bn1(trunk.conv_stem(x)),
            [trunk.conv_stem, trunk.bn1],
            list(trunk.blocks),
            lambda h: pool(trunk.bn2(trunk.conv_head(h))),
            head,
            head,
        )
    if hasattr(trunk, "stages") and hasattr(trunk, "norm_pre") and hasattr(trunk, "stem"):  # ConvNeXt
        return _Parts(trunk.stem, [trunk.stem], list(trunk.stages), lambda h: pool(trunk.norm_pre(h)), head, head)
    if hasattr(trunk, "patch_embed") and hasattr(trunk, "blocks") and hasattr(trunk, "_pos_embed"):
        embeddings = [getattr(trunk, name, None) for name in ("patch_embed", "cls_token", "pos_embed", "reg_token", "norm_pre")]
        frozen_stem, blocks = [part for part in embeddings if part is not None], list(trunk.blocks)
        if hasattr(trunk, "rope"):  # Eva: every block takes the rotary embedding of positions
            if trunk.patch_drop is not None:
                return None  # the embedding is that of the patches that are left
            return _Parts(
                lambda x: trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(x))[0]),
                frozen_stem,
                blocks,
                lambda h: pool(trunk.norm(h)),
                head,
                head,
                [partial(_with_rope, trunk, block, place) for place, block in enumerate(blocks)],
            )
        return _Parts(  # VisionTransformer
            lambda x: trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x)))),
            frozen_stem,
            blocks,
            lambda h: pool(trunk.norm(h)),
            head,
            head,
        )
    return None


def _with_rope(trunk: Any, block: Any, place: int, hidden: Tensor) -> Tensor:
    """Run a block of Eva with the rotary embedding of the whole grid of patches."""
    rope = None if trunk.rope is None else trunk.rope.get_embed()
    return block(hidden, rope=rope[place] if getattr(trunk, "rope_mixed", False) and rope is not None else rope)


def _before_projection(visual: Any) -> _Parts | None:
    """Return a tower of timm as one piece and its projection."""
    trunk, (pool, head) = visual.trunk, _pool_and_projection(visual)
    return _Parts(trunk.forward_features, [], [], pool, head, head)


def _pool_and_projection(visual: Any) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """Return the pooling of a tower of timm, and its projection: open_clip's, or timm's own classifier."""
    trunk = visual.trunk
    if len(visual.head) > 0:
        return trunk.forward_head, visual.head
    return partial(trunk.forward_head, pre_logits=True), trunk.get_classifier()
