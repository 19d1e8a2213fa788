"""CLIP models of open_clip: loading, saving, tokeniser, and the image tower in three parts.

The only module that imports open_clip. The image tower is cut as

    images_B3SS -> lower -> hidden_B... -> upper -> pooled_BF -> project -> embeddings_BD

so that frozen blocks run without gradient (or once per image, see the feature cache in tasks/feature_cache.py) and SAFLEX's
head scope reuses the pooled features of the training step.

Shapes: B images, S side in pixels, F pooled width, D embedding width, N texts, L tokens.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flyp_saflex.clip.blocks import is_plain_block, run_block, run_block_for_first
from flyp_saflex.errors import ModelError, nearest

RANDOM = "random"
"""Value of `model.pretrained` for untrained weights, which must be requested explicitly."""


@dataclass
class Clip:
    """CLIP model with its preprocessing, tokeniser and configuration.

    Attributes:
        model: open_clip's module, float32, in evaluation mode.
        preprocess: evaluation transform, image -> float tensor [3, S, S].
        tokenizer: list of N texts -> long tensor [N, L].
        config: open_clip's `model_cfg` and `preprocess_cfg`, as written to open_clip_config.json.
    """

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    config: dict[str, Any]

    @property
    def image_size_px(self) -> int:
        """Side of the square input images, in pixels."""
        size = self.config["preprocess_cfg"]["size"]
        return int(size if isinstance(size, int) else size[0])


def load_clip(name: str, pretrained: str = "", *, device: str | torch.device = "cpu") -> Clip:
    """Load an open_clip model with its weights.

    Args:
        name: built-in name, `hf-hub:org/name` or `local-dir:folder`.
        pretrained: tag or checkpoint file of a built-in model; ignored for the other two kinds, which include their
            weights; `random` for untrained weights (drawn from torch's generator).
        device: device of the model.

    Returns:
        The model, float32, in evaluation mode.

    Raises:
        ModelError: unknown name or tag (with the nearest known one), or weights that cannot be loaded.
    """
    known = open_clip.list_models()
    local = name.startswith(("hf-hub:", "local-dir:"))
    if not local and name not in known:
        raise ModelError(
            f"model.name = {name}: open_clip has no such model{nearest(name, known)}, or use hf-hub:... or local-dir:..."
        )
    options: dict[str, Any] = {"device": device, "precision": "fp32"}
    if pretrained == RANDOM:
        options["load_weights"] = False
    elif not local:
        _check_tag(name, pretrained)
        options["pretrained"] = pretrained
        # OpenAI's weights were trained with QuickGELU; open_clip only warns when the named architecture has GELU.
        tag = open_clip.get_pretrained_cfg(name, pretrained) or {}
        if tag.get("quick_gelu"):
            options["force_quick_gelu"] = True
    if name.lower().startswith("coca"):
        raise ModelError(f"model.name = {name}: CoCa's captioning loss has no place in FLYP; use the CLIP model of the same size")
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip and the hub log every attempt; the error below states the reason
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = open_clip.create_model(name, require_pretrained=pretrained != RANDOM, **options)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises a dozen types here, hub clients a dozen more
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ModelError(
            f"model.name = {name}, model.pretrained = {pretrained or '(none)'}: the weights cannot be loaded ({reason}); "
            "without a network, give model.name=local-dir:FOLDER or the path of a checkpoint file as model.pretrained"
        ) from error
    finally:
        logging.disable(disabled)
    preprocess_cfg = dict(model.visual.preprocess_cfg)
    model_cfg = _model_config(name)
    if options.get("force_quick_gelu"):
        model_cfg["quick_gelu"] = True
    transform = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
    return Clip(model.eval(), transform, tokenizer, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})


def save_clip(clip: Clip, folder: Path) -> None:
    """Save a model in open_clip's `local-dir:` layout: open_clip_config.json and open_clip_model.safetensors.

    `open_clip.create_model("local-dir:FOLDER")` loads it and gives the same logits.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = deepcopy(clip.config)
    config["model_cfg"].get("vision_cfg", {}).pop("timm_model_pretrained", None)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {key: value.detach().to("cpu").clone().contiguous() for key, value in clip.model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").chmod(0o644)  # safetensors creates files that only their owner can read


def _check_tag(name: str, pretrained: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained).is_file():
        raise ModelError(
            f"model.pretrained = '{pretrained}': no such tag of {name} and no such file{nearest(pretrained, tags)} "
            f"(tags: {', '.join(tags) or 'none'}; '{RANDOM}' for untrained weights)"
        )


def _model_config(name: str) -> dict[str, Any]:
    if name.startswith("local-dir:"):
        text = (Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text(encoding="utf-8")
        return dict(json.loads(text)["model_cfg"])
    if name.startswith("hf-hub:"):
        from open_clip.factory import _get_hf_config  # not exported, but the only access to the config on the hub

        return dict(_get_hf_config(name.removeprefix("hf-hub:"))["model_cfg"])
    return deepcopy(open_clip.get_model_config(name))


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
