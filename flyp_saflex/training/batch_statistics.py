"""BatchNorm over the rows of all processes: several processes train what one trains, and take the same gains.

torch's SyncBatchNorm needs a GPU and has no forward-mode derivative, which exact gains take. The one here is plain arithmetic
around a mean over processes; every process holds as many rows as the others.

Shapes: N rows of this process, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flyp_saflex.saflex.losses import at_least_float32
from flyp_saflex.tasks.label_space import Gather
from flyp_saflex.tasks.task import Processes

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Norms that are exchanged; a subclass may do more than a norm does."""


class _MeanOverProcesses(torch.autograd.Function):
    """Mean of a tensor over processes, with derivatives in both modes."""

    @staticmethod
    def forward(values: Tensor, gather: Gather) -> Tensor:
        return gather(values[None]).mean(dim=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Gather], output: Tensor) -> None:
        ctx.gather = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.gather(gradient[None]).mean(dim=0), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return ctx.gather(tangent[None]).mean(dim=0)


class SharedBatchNorm(_BatchNorm):
    """BatchNorm that normalises with the statistics of all processes' rows in training mode.

    Running statistics follow passes with gradient alone: passes that take gains leave them as they are.

    Args:
        norm: whose parameters, statistics and options are taken over, not copied.
        processes: two or more.
    """

    def __init__(self, norm: _BatchNorm, processes: Processes) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training, self.processes = norm.training, processes

    def _check_input_dim(self, input: Tensor) -> None:
        """Take inputs of any shape [N, C, ...]."""

    def forward(self, input: Tensor) -> Tensor:
        """Return normalised inputs [N, C, ...]."""
        if not self.training:
            return super().forward(input)
        values = at_least_float32(input)
        others = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        mean_C = _MeanOverProcesses.apply(values.mean(dim=others), self.processes.gather)
        centred = values - mean_C.view(shape)
        variance_C = _MeanOverProcesses.apply(centred.square().mean(dim=others), self.processes.gather)
        if torch.is_grad_enabled():
            num_values = values.numel() // values.shape[1] * self.processes.count
            self._follow(mean_C.detach(), variance_C.detach() * num_values / (num_values - 1))
        normalised = centred * (variance_C + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    def _follow(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), share)


def share_statistics(network: nn.Module, processes: Processes, *, freeze_batchnorm: bool) -> None:
    """Exchange BatchNorm layers by ones over all processes, in place, with the same parameters, where that matters.

    Args:
        network: before it is wrapped.
        processes: a single one has all rows.
        freeze_batchnorm: norms use their running statistics.
    """
    if processes.count == 1 or freeze_batchnorm:
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm) and can_share(child):
                setattr(module, name, SharedBatchNorm(child, processes))


def can_share(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm that can be exchanged."""
    return type(module) in KINDS and module.running_mean is not None
