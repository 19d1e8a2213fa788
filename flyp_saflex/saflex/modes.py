"""Modes of modules in a derivative: it must be of the function that will be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def evaluation_mode(network: nn.Module, *, but_statistics: bool = False) -> Iterator[None]:
    """Switch dropout off and BatchNorm to running statistics; then put every module's mode back.

    Args:
        network: any module.
        but_statistics: BatchNorm and InstanceNorm stay in the mode that they are in.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        if but_statistics:
            for module, training in modes:
                if isinstance(module, (_BatchNorm, _InstanceNorm)):
                    module.training = training
        yield
    finally:
        for module, training in modes:
            module.training = training


def trains_statistics(network: nn.Module) -> bool:
    """Return whether a norm that has another function in evaluation mode uses the statistics of its batch."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return True
        if isinstance(module, _InstanceNorm) and module.training and module.running_mean is not None:
            return True
    return False


def drops_at_random(module: nn.Module) -> bool:
    """Return whether a module drops values, patches, paths or attention at random, with a rate above zero.

    Modules of transformers keep a rate as a number (`dropout`, `layerdrop`), and drop by a function.
    """
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    if "drop" not in type(module).__name__.lower():
        return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())
    rates = (getattr(module, name, None) for name in ("p", "prob", "drop_prob", "drop_rate"))
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
