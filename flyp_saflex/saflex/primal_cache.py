"""Primal cache: layer outputs of a forward pass, reused by the exact derivative of the same function.

Forward-mode differentiation of `W x + b` takes three products: the primal `W x`, and `dW x` and `W dx` of the tangent. If the
training pass has just computed the primals, a third of that work is done. The pass runs inside `recording()`, which stores the
outputs of linear layers and convolutions with the given parameters; `jvp()` reuses them in the same layers. The rest (norms,
activations, attention: a few percent of the work) is computed again.

A layer is computed again if its stored output may differ: other shapes or precision, layers that the pass did not run, outputs
changed in place. The caller ensures that parameters and function do not change between pass and derivative.

Shapes: N rows of the pass, of which the derivative takes the last A.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

_KINDS = (F.linear, F.conv2d)
"""Cached functions of (input, weight, bias): linear in the input, and linear in weight and bias."""


class Products:
    """Stored outputs of linear layers and convolutions, by weight.

    Args:
        parameters: parameters of the layers to store: those with a direction in the derivative.
        num_rows: N, rows of the pass; of an output with N rows the derivative may use the last A.
    """

    def __init__(self, parameters: Iterable[Tensor], num_rows: int) -> None:
        self.num_rows = num_rows
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._kept: dict[tuple[Any, ...], deque[tuple[Tensor, int]]] = defaultdict(deque)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Store the outputs of a pass run in this context, detached; they stay in memory until used."""
        with _Through(self._record):
            yield

    def jvp(
        self, function: Callable[[dict[str, Tensor]], Tensor], point: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return value and derivative of a function of parameters; every stored output is used once.

        It must run outside of autocast, under which PyTorch's dual tensors mix precisions (on CPUs after LayerNorm).

        Args:
            function: takes parameters by name, returns a tensor.
            point: parameters by name (the primal).
            direction: direction with the same names (the tangent).
        """
        with forward_ad.dual_level(), _Through(self._replay):
            duals = {name: forward_ad.make_dual(value, direction[name]) for name, value in point.items()}
            value, tangent = forward_ad.unpack_dual(function(duals))
        return value, torch.zeros_like(value) if tangent is None else tangent

    def _record(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        result = function(*arguments)
        weight = arguments[1]
        if weight.untyped_storage().data_ptr() in self._storages:
            self._kept[_key(weight)].append((result.detach(), result._version))
        return result

    def _replay(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        values = self._next(arguments)
        if values is not None:
            inputs, weight, bias, *rest = (*arguments, None)[: max(len(arguments), 3)]
            inputs, towards_inputs = forward_ad.unpack_dual(inputs)
            weight, towards_weight = forward_ad.unpack_dual(weight)
            towards_bias = None if bias is None else forward_ad.unpack_dual(bias).tangent
            if towards_weight is not None:
                tangent = function(inputs, towards_weight, towards_bias, *rest)
                if towards_inputs is not None:
                    tangent += function(towards_inputs, weight, None, *rest)
                if (tangent.shape, tangent.dtype) == (values.shape, values.dtype):
                    return forward_ad.make_dual(values, tangent)
        return function(*arguments)

    def _next(self, arguments: tuple[Any, ...]) -> Tensor | None:
        inputs, weight = arguments[:2]
        kept = self._kept.get(_key(weight))
        if not kept:
            return None
        values, version = kept.popleft()
        if values._version != version:
            return None
        if len(inputs) < len(values) == self.num_rows:
            values = values[-len(inputs) :]
        return values if len(inputs) == len(values) else None


def _key(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.shape, weight.stride()


class _Through(TorchFunctionMode):
    """Torch function mode that passes calls of the cached functions, with positional arguments, to a handler."""

    def __init__(self, handler: Callable[[Callable[..., Tensor], tuple[Any, ...]], Tensor]) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _KINDS and not kwargs and len(args) > 1:
            return self.handler(func, args)
        return func(*args, **(kwargs or {}))
