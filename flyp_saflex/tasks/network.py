"""The network that a step trains: inputs to pooled features, to embeddings, to logits over columns.

    inputs -> lower (frozen) -> hidden -> pooled_NF -> embeddings_ND -> logits_NC = scale * embeddings . columns + bias

The columns are the weights of a linear head, or what a text tower makes of captions (`clip_network.py`). One `forward` serves
every task, so that one wrapped module (DistributedDataParallel) sees every trained parameter.

Shapes: N rows, C columns, L tokens, F pooled width, D embedding, K classes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flyp_saflex.saflex.losses import at_least_float32
from flyp_saflex.saflex.modes import drops_at_random

Scope = Literal["all", "head"]


class Outputs(NamedTuple):
    """Result of a forward pass: pooled features, embeddings (float32), and how they meet the columns in logits."""

    pooled_NF: Tensor
    images_ND: Tensor
    columns_CD: Tensor
    scale: Tensor
    bias: Tensor

    def logits(self, images_ND: Tensor | None = None, columns_C: Tensor | None = None) -> Tensor:
        """Return `scale * image . column + bias`, in float32 under autocast too: small gains lose their sign in bf16.

        Args:
            images_ND: other embeddings than this pass's own (those of all processes).
            columns_C: columns to take, repeats allowed; None: all.
        """
        images_ND = self.images_ND if images_ND is None else images_ND
        with torch.autocast(images_ND.device.type, enabled=False):
            columns_CD = self.columns_CD if columns_C is None else self.columns_CD[columns_C]
            return self.scale * images_ND @ columns_CD.T + self.bias

    def rows_from(self, first: int) -> Outputs:
        """Return the same without the rows before the `first`."""
        return self._replace(pooled_NF=self.pooled_NF[first:], images_ND=self.images_ND[first:])


class Network(nn.Module):
    """A trunk with a linear head: the base of every trained module.

    Args:
        trunk: inputs -> pooled features [N, F]; None for a subclass that overrides `pool`.
        head: linear classifier [K, D]; None for a subclass whose columns come from texts.

    Attributes:
        relates_rows: whether a row's logits are its relation to the other rows of the step (`relate`).
        num_frozen: blocks of the frozen lower part; 0: there is none.
        recomputes: whether activations are recomputed in the backward pass (gradient checkpointing).
    """

    relates_rows: ClassVar[bool] = False

    def __init__(self, trunk: nn.Module | None = None, *, head: nn.Linear | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.num_frozen = 0
        self.recomputes = False

    def lower(self, inputs: Tensor) -> Tensor:
        """Return the activations behind the frozen lower part; the inputs themselves if there is none."""
        return inputs

    def pool(self, hidden: Tensor) -> Tensor:
        """Return pooled features [N, F] of activations."""
        assert self.trunk is not None
        return self.trunk(hidden)

    def project(self, pooled_NF: Tensor) -> Tensor:
        """Return embeddings [N, D], float32."""
        return at_least_float32(pooled_NF)

    def forward(self, inputs: Tensor, tokens_CL: Tensor | None = None, from_pooled: bool = False) -> Outputs:
        """Embed rows, and columns where they come from texts.

        Args:
            inputs: activations behind the frozen part, or pooled features [N, F] with `from_pooled`.
            tokens_CL: captions, one per column (none of them: no columns); unused with a linear head.
            from_pooled: start behind the pooling: the head scope of SAFLEX.
        """
        pooled_NF = inputs if from_pooled else self.pool(inputs)
        images_ND = self.project(pooled_NF)
        return self.with_linear_head(pooled_NF, images_ND)

    def relate(self, images_ND: Tensor) -> Tensor:
        """Return the logits [N, C] of all rows of a step, of all processes, from their embeddings alone."""
        raise NotImplementedError  # asked of networks with `relates_rows`

    def with_linear_head(self, pooled_NF: Tensor, images_ND: Tensor) -> Outputs:
        """Return outputs whose columns are the linear head's weights."""
        assert self.head is not None
        weight, bias = at_least_float32(self.head.weight), at_least_float32(self.head.bias)
        return Outputs(pooled_NF, images_ND, weight, images_ND.new_ones(()), bias)

    def trains_rows(self) -> bool:
        """Return whether a parameter before the columns is trained: if none is, rows have no backward pass to save."""
        head = set() if self.head is None else {id(parameter) for parameter in self.head.parameters()}
        return any(parameter.requires_grad and id(parameter) not in head for parameter in self.parameters())

    def trains_texts(self) -> bool:
        """Return whether columns come from texts through trained parameters."""
        return False

    def set_mode(self, *, training: bool, freeze_batchnorm: bool) -> None:
        """Set training mode, with BatchNorm kept on its running statistics if asked (and always when frozen)."""
        self.train(training)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                fixed = freeze_batchnorm or not any(parameter.requires_grad for parameter in module.parameters())
                module.train(training and not fixed)

    def acts_as_evaluated(self) -> bool:
        """Return whether a pass in the present mode equals one in evaluation mode: no dropout, no batch statistics."""
        for module in self.modules():
            if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
                return False
            if module.training and drops_at_random(module):
                return False
        return True

    def parameters_in(self, scope: Scope) -> dict[str, Tensor]:
        """Return the trained parameters whose gradient SAFLEX looks at.

        Args:
            scope: `all`, or `head`: everything behind the pooled features.
        """
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if scope == "all":
            return dict(trained)
        trunk = self.trunk_parameters()
        return {name: parameter for name, parameter in trained.items() if id(parameter) not in trunk}

    def trunk_parameters(self) -> set[int]:
        """Return the identities of the parameters before the pooled features."""
        return set() if self.trunk is None else {id(parameter) for parameter in self.trunk.parameters()}


def parameter_groups(
    network: Network, *, lr: float, head_lr: float, weight_decay: float, decays_all: bool = False
) -> list[dict[str, Any]]:
    """Return the optimiser's groups: no weight decay on biases, norms, embeddings' scales and `logit_scale`.

    As in open_clip's trainer: decay applies to trained tensors with two dimensions or more; with `decays_all` to every one.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
            decay = weight_decay if is_matrix or decays_all else 0.0
            rate = head_lr if name.startswith("head.") else lr
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())
