"""The trained module: image tower in parts, text tower, optional linear head (floor 2).

One `forward` serves every method, so that one wrapped module (DistributedDataParallel) sees every trained parameter.
Shapes: N images, C captions (columns), L tokens, F pooled width, D embedding, K classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyp_saflex.clip.model import ImageTower
from flyp_saflex.clip.text_tower import encode_text
from flyp_saflex.saflex.jvp import forward_mode
from flyp_saflex.saflex.losses import at_least_float32

Trainable = Literal["all", "head"]


class Outputs(NamedTuple):
    """What a forward pass gives: pooled features, embeddings of length one (float32), and how they meet in logits."""

    pooled_NF: Tensor
    images_ND: Tensor
    columns_CD: Tensor
    scale: Tensor
    bias: Tensor

    def logits(self, images_ND: Tensor | None = None, columns_C: Tensor | None = None) -> Tensor:
        """Return `scale * image . column + bias`, in float32 under autocast too: small gains lose their sign in bf16.

        Args:
            images_ND: other images than this pass's own (those of all processes).
            columns_C: which columns, repeats allowed (a linear head's columns are taken whole); None: all.
        """
        images_ND = self.images_ND if images_ND is None else images_ND
        with torch.autocast(images_ND.device.type, enabled=False):
            columns_CD = self.columns_CD if columns_C is None else self.columns_CD[columns_C]
            return self.scale * images_ND @ columns_CD.T + self.bias

    def rows_from(self, first: int) -> Outputs:
        """Return the same without the images before the `first`."""
        return self._replace(pooled_NF=self.pooled_NF[first:], images_ND=self.images_ND[first:])


class Learner(nn.Module):
    """A CLIP model with its image tower cut behind the frozen blocks, and a linear head where the method has one.

    Args:
        model: open_clip's module; its parameters are shared, so saving `model` saves what was trained.
        num_frozen: image blocks behind which the tower is cut.
        head: linear classifier [K, D] on normalised embeddings, or None for captions as columns.
    """

    def __init__(self, model: Any, *, num_frozen: int = 0, head: nn.Linear | None = None) -> None:
        super().__init__()
        self.clip = model
        self.tower = ImageTower(model.visual, num_frozen)
        self.head = head
        self.text_is_frozen = False
        self._frozen_texts: dict[tuple[bytes, bool], Tensor] = {}

    def forward(self, inputs: Tensor, tokens_CL: Tensor | None = None, from_pooled: bool = False) -> Outputs:
        """Embed images and columns.

        Args:
            inputs: activations behind the frozen blocks (`tower.lower`), or pooled features [N, F] with `from_pooled`.
            tokens_CL: captions, one per column (none of them: no columns); unused with a linear head.
            from_pooled: start behind the pooling: the head scope of SAFLEX.
        """
        texts_CD = None
        if self.head is None:
            assert tokens_CL is not None, "captions are the columns of a model without a linear head"
            if len(tokens_CL):  # before the images: a GPU is asked for the shape of the texts' tree, and has little to do yet
                encode = self._encode_frozen if self.text_is_frozen else partial(encode_text, self.clip)
                texts_CD = F.normalize(at_least_float32(encode(tokens_CL)), dim=-1)
        pooled_NF = inputs if from_pooled else self.tower.upper(inputs)
        images_ND = F.normalize(at_least_float32(self.tower.project(pooled_NF)), dim=-1)
        if self.head is not None:
            weight, bias = at_least_float32(self.head.weight), at_least_float32(self.head.bias)
            return Outputs(pooled_NF, images_ND, weight, images_ND.new_ones(()), bias)
        columns_CD = images_ND[:0] if texts_CD is None else texts_CD
        scale = at_least_float32(self.clip.logit_scale).exp()
        return Outputs(pooled_NF, images_ND, columns_CD, scale, images_ND.new_zeros(()))

    @torch.no_grad()
    def _encode_frozen(self, tokens_CL: Tensor) -> Tensor:
        """Do what `encode_text` does, each text once for as long as the text tower stays frozen."""
        half = torch.is_autocast_enabled(tokens_CL.device.type)  # another precision, other digits
        keys = [(row.tobytes(), half) for row in tokens_CL.cpu().numpy()]
        for place, key in enumerate(keys):
            if key not in self._frozen_texts:  # alone: what it is among would change its last digits, and a resumed run
                with forward_mode():  # always the same kernels: the derivative of an image tower may be the first to ask
                    self._frozen_texts[key] = encode_text(self.clip, tokens_CL[place : place + 1])[0]
        return torch.stack([self._frozen_texts[key] for key in keys])

    def freeze(
        self,
        *,
        text: bool = False,
        image: bool = False,
        token_embedding: bool = False,
        only_head: bool = False,
    ) -> None:
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
        for name, parameter in self.clip.named_parameters():
            is_text = id(parameter) not in visual and name != "logit_scale"
            frozen = (text and is_text) or (image and id(parameter) in visual) or id(parameter) in locked
            frozen |= token_embedding and "token_embedding" in name
            frozen |= name == "logit_bias"  # shifts all logits alike: softmax never sees it
            if frozen:
                parameter.requires_grad_(False)

    def set_mode(self, *, training: bool, freeze_batchnorm: bool) -> None:
        """Like `train(training)`, with BatchNorm kept on its running statistics if asked (and always when frozen)."""
        self.train(training)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                fixed = freeze_batchnorm or not any(parameter.requires_grad for parameter in module.parameters())
                module.train(training and not fixed)

    def acts_as_evaluated(self) -> bool:
        """Return whether a pass in the present mode equals one in evaluation mode: no dropout, no batch statistics."""
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
                return False
            if module.training and drops_at_random(module):
                return False
        return True

    def parameters_in(self, scope: Trainable) -> dict[str, Tensor]:
        """Return the trained parameters whose gradient SAFLEX looks at.

        Args:
            scope: `all`, or `head`: image projection, text tower, logit_scale and the linear head. A tower whose
                projection cannot be told apart has no projection in its head scope.
        """
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if scope == "all":
            return dict(trained)
        trunk = {id(parameter) for parameter in self.clip.visual.parameters()}
        trunk -= {id(parameter) for parameter in self.tower.projection_parameters()}
        return {name: parameter for name, parameter in trained.items() if id(parameter) not in trunk}


def drops_at_random(module: nn.Module) -> bool:
    """Return whether a module is a dropout of any kind (of values, patches, paths, attention) with a rate above zero."""
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    if "drop" not in type(module).__name__.lower():
        return False
    rates = (getattr(module, name, None) for name in ("p", "prob", "drop_prob", "drop_rate"))
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def parameter_groups(learner: Learner, *, lr: float, head_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: no weight decay on biases, norms, embeddings' scales and `logit_scale`.

    As in open_clip's trainer: decay applies to trained tensors with two dimensions or more.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 and not name.endswith("bias") else 0.0
            rate = head_lr if name.startswith("head.") else lr
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())
