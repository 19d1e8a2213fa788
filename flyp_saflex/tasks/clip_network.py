"""CLIP as a trained network: image tower cut behind its frozen blocks, text tower or linear head as columns.

Shapes: N images, C captions (columns), L tokens, F pooled width, D embedding, K classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyp_saflex.clip.image_tower import ImageTower
from flyp_saflex.clip.lora import is_adapter
from flyp_saflex.clip.text_tower import encode_text, recompute_texts, token_embedding_parameters
from flyp_saflex.saflex.jvp import forward_mode
from flyp_saflex.saflex.losses import at_least_float32
from flyp_saflex.saflex.modes import evaluation_mode
from flyp_saflex.tasks.network import Network, Outputs


class ClipNetwork(Network):
    """CLIP model with its image tower cut behind the frozen blocks, and a linear head if there is one.

    Args:
        model: open_clip's module; its parameters are shared, so saving `model` saves what was trained.
        num_frozen: image blocks behind which the tower is cut.
        head: linear classifier [K, D] on normalised embeddings, or None for captions as columns.
        fixed: names of the model's parameters that are never trained.
        with_bias: whether the model's `logit_bias` is added to the logits of captions, and trained: a softmax never sees it.

    Attributes:
        adapts: whether the model has LoRA, so that of the towers only its updates are trained.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_frozen: int = 0,
        head: nn.Linear | None = None,
        fixed: frozenset[str] = frozenset(),
        with_bias: bool = False,
    ) -> None:
        super().__init__()
        self.clip = model
        self.tower = ImageTower(model.visual, num_frozen)
        self.num_frozen = self.tower.num_frozen
        self.head = head  # after the towers: the order of parameters is that of checkpoints
        self.fixed, self.with_bias, self.adapts = fixed, with_bias, False
        self.text_is_frozen = False
        self._frozen_texts: dict[tuple[tuple[int, ...], bool], Tensor] = {}

    def lower(self, inputs: Tensor) -> Tensor:
        """Return the activations behind the frozen image blocks."""
        return self.tower.lower(inputs)

    def pool(self, hidden: Tensor) -> Tensor:
        """Return pooled image features of activations behind the frozen blocks."""
        return self.tower.upper(hidden)

    def project(self, pooled_NF: Tensor) -> Tensor:
        """Return image embeddings of length one, float32."""
        return F.normalize(at_least_float32(self.tower.project(pooled_NF)), dim=-1)

    def forward(self, inputs: Tensor, tokens_CL: Tensor | None = None, from_pooled: bool = False) -> Outputs:
        """Embed images and columns (see `Network.forward`)."""
        texts_CD = None
        if self.head is None:
            assert tokens_CL is not None, "captions are the columns of a model without a linear head"
            if len(tokens_CL):  # before the images: a GPU is asked for the shape of the texts' tree, and has little to do yet
                encode = self._encode_frozen if self.text_is_frozen else partial(encode_text, self.clip)
                texts_CD = F.normalize(at_least_float32(encode(tokens_CL)), dim=-1)
        pooled_NF = inputs if from_pooled else self.pool(inputs)
        images_ND = self.project(pooled_NF)
        if self.head is not None:
            return self.with_linear_head(pooled_NF, images_ND)
        columns_CD = images_ND[:0] if texts_CD is None else texts_CD
        scale = at_least_float32(self.clip.logit_scale).exp()
        bias = at_least_float32(self.clip.logit_bias) if self.with_bias else images_ND.new_zeros(())
        return Outputs(pooled_NF, images_ND, columns_CD, scale, bias)

    @torch.no_grad()
    def _encode_frozen(self, tokens_CL: Tensor) -> Tensor:
        """Do what `encode_text` does, each text once for as long as the text tower stays frozen."""
        half = torch.is_autocast_enabled(tokens_CL.device.type)  # another precision, other digits
        keys = [(tuple(row), half) for row in tokens_CL.tolist()]  # within a derivative a tensor gives numbers, but no memory
        for place, key in enumerate(keys):
            if key not in self._frozen_texts:  # alone: what it is among would change its last digits, and a resumed run
                # Always the same kernels, for the derivative of an image tower may be the first to ask; and no dropout, whose one
                # draw would otherwise stand for the text in the whole run.
                with forward_mode(), evaluation_mode(self.clip):
                    self._frozen_texts[key] = encode_text(self.clip, tokens_CL[place : place + 1])[0]
        return torch.stack([self._frozen_texts[key] for key in keys])

    def freeze(self, *, text: bool = False, image: bool = False, token_embedding: bool = False, only_head: bool = False) -> None:
        """Set `requires_grad` of every parameter: what is not frozen, and is used, is trained."""
        self.requires_grad_(not only_head)
        if self.head is not None:
            self.head.requires_grad_(True)
            text = True
            self.clip.logit_scale.requires_grad_(False)
        self.text_is_frozen = text
        self._frozen_texts.clear()  # in case its weights were exchanged
        visual = {id(parameter) for parameter in self.clip.visual.parameters()}
        locked = {id(parameter) for parameter in self.tower.frozen_parameters()}
        if token_embedding:
            locked |= {id(parameter) for parameter in token_embedding_parameters(self.clip)}
        for name, parameter in self.clip.named_parameters():
            is_text = id(parameter) not in visual and name not in ("logit_scale", "logit_bias")
            frozen = (text and is_text) or (image and id(parameter) in visual) or id(parameter) in locked
            frozen |= name in self.fixed or (name == "logit_bias" and not self.with_bias)
            frozen |= self.adapts and not is_adapter(name) and name not in ("logit_scale", "logit_bias")
            if frozen:
                parameter.requires_grad_(False)

    def recompute(self) -> None:
        """Recompute activations in the backward pass (gradient checkpointing), of both towers."""
        self.recomputes = self.tower.checkpointing = True
        recompute_texts(self.clip)

    def trains_rows(self) -> bool:
        """Return whether an image tower's parameter is trained."""
        return any(parameter.requires_grad for parameter in self.clip.visual.parameters())

    def trains_texts(self) -> bool:
        """Return whether the text tower is trained and makes the columns."""
        visual = {id(parameter) for parameter in self.clip.visual.parameters()}
        return self.head is None and any(
            parameter.requires_grad and id(parameter) not in visual and name not in ("logit_scale", "logit_bias")
            for name, parameter in self.clip.named_parameters()
        )

    def trunk_parameters(self) -> set[int]:
        """Return the identities of the image tower's parameters before its projection.

        A tower whose projection cannot be told apart has no projection in its head scope.
        """
        trunk = {id(parameter) for parameter in self.clip.visual.parameters()}
        return trunk - {id(parameter) for parameter in self.tower.projection_parameters()}
