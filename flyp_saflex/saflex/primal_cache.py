"""Matrix products of a pass, kept for the exact derivative of the same function (floor 2: tensors only).

Forward-mode differentiation of `W x + b` takes three products: the value `W x`, and `dW x` and `W dx`. When the training pass
has just computed the values, a third of the derivative's work is there already. So the pass runs in `recording()`, where
linear layers and convolutions of the given parameters leave their results, and in `jvp()` the same layers take them from
there. All else (norms, activations, attention, a few percent of the work) is computed again.

What cannot be told to be the same is computed: other shapes or precisions, layers that the pass did not run, results that
were changed in place. Only the caller knows that the parameters, and the function, have not changed in between.

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
"""Functions of input, weight and bias, linear in the first and in the other two."""


class Products:
    """Results of linear layers and convolutions, by their weight.

    Args:
        parameters: whose layers are of interest: those that the derivative has a direction for.
        num_rows: N; what has N rows in the pass may have fewer in the derivative.
    """

    def __init__(self, parameters: Iterable[Tensor], num_rows: int) -> None:
        self.num_rows = num_rows
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._kept: dict[tuple[Any, ...], deque[tuple[Tensor, int]]] = defaultdict(deque)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep results of the pass within; their graph is not kept, their memory is."""
        with _Through(self._record):
            yield

    def jvp(
        self, function: Callable[[dict[str, Tensor]], Tensor], point: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return value and derivative of a function of parameters; every kept result is used once.

        Not under autocast: PyTorch's dual tensors then mix precisions (on CPUs behind LayerNorm).
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
    """Sends calls of the known kinds through a function, with their arguments in order."""

    def __init__(self, handler: Callable[[Callable[..., Tensor], tuple[Any, ...]], Tensor]) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _KINDS and not kwargs and len(args) > 1:
            return self.handler(func, args)
        return func(*args, **(kwargs or {}))
