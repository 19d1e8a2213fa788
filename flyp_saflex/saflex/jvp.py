"""Gains of the labels of augmented rows, from one Jacobian-vector product.

With `g` the gradient of the validation loss and `Z' = J_Z(theta) g` the derivative of the augmented rows' logits along
it, the first-order decrease of the validation loss when row i is trained towards label k is (Eq. 9, with the sign and the
logarithm of Eq. 7 written out)

    Pi_ik = < g, grad_theta (-log p_ik) > = -( Z'_ik - sum_j p_ij Z'_ij ).

One Jacobian-vector product gives the gains of all rows and labels. Since `sum_k p_ik Pi_ik = 0`, the best label never has a
negative gain; `sum_k Pi_ik` is K times the gain of the uniform label.

Models run as functions of their parameters (`torch.func.functional_call`), in evaluation mode: with batch statistics or
dropout it would be the derivative of another function.

Shapes: A augmented rows, T train rows, K labels, C proxy classes (caption columns).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flyp_saflex.saflex.losses import at_least_float32
from flyp_saflex.saflex.primal_cache import Products

Parameters = Mapping[str, Tensor]
Estimator = Literal["exact", "central", "one-sided"]
ESTIMATORS = ("exact", "central", "one-sided")

_PROBES = 6
"""Largest number of forward passes in the search for the first step size."""


def gradient(loss_fn: Callable[[dict[str, Tensor]], Tensor], parameters: Parameters) -> dict[str, Tensor]:
    """Return the gradient of `loss_fn(parameters)` by name, without writing to `.grad`.

    It also works under `torch.no_grad()`.

    Args:
        loss_fn: takes parameters by name, returns a scalar.
        parameters: parameters to differentiate with respect to; all others are constants of `loss_fn`.

    Returns:
        Detached gradients; zeros for parameters that the loss does not use.
    """
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        loss = loss_fn(leaves)
        if not loss.requires_grad:
            return {name: torch.zeros_like(value) for name, value in parameters.items()}
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def directional_derivative(
    logits_fn: Callable[[dict[str, Tensor]], Tensor],
    parameters: Parameters,
    direction: Parameters,
    *,
    estimator: Estimator = "exact",
    logits: Tensor | None = None,
    target_rms: float = 3e-3,
    previous_rms: float | None = None,
    length: Tensor | None = None,
    products: Products | None = None,
    mean_of: Callable[[Tensor], Tensor] = lambda value: value,
) -> tuple[Tensor, Tensor]:
    """Return the logits and their derivative along `direction`, detached, computed outside of autocast.

    Args:
        logits_fn: takes parameters by name, returns logits of any shape; deterministic, in evaluation mode.
        parameters: parameters to differentiate at (the primal).
        direction: direction (the tangent) with the same names, usually the validation gradient.
        estimator: `exact`: forward-mode differentiation, with attention by its plain formula, because the fused kernels have
            no forward mode. `central`: two forward passes. `one-sided`: one forward pass besides the base logits. Both finite
            differences need parameters in float32 or better.
        logits: `one-sided`: logits at `parameters`, if the caller has them from the same function in the same precision.
            They are recomputed if they are in half precision or autocast is on: rounding would exceed the difference.
        target_rms: finite differences: root mean square change of the logits at which the step size aims. As it grows, the
            rounding error in float32 falls and the truncation error grows. In finetuning of two small convnets
            (scripts/benchmarks/estimator_fidelity.py) the one-sided error was 0.3..0.7 % at 1e-3, 0.3..1.1 % at 3e-3 and
            0.9..2.1 % at 1e-2; for a 12-layer ViT with a logit scale of 100, where rounding is larger, 1.4 % at 3e-4, then
            0.4, 0.2 and 0.4 %. The cosine per row is at least 0.9999 from 1e-3 to 3e-3; the default is the value with less
            rounding.
        previous_rms: finite differences: root mean square of a recent derivative, which gives the step size
            h = target_rms / previous_rms; None: search the step size, in one or two more passes.
        length: finite differences: `norm(direction)`, if the caller has it.
        products: `exact`: primal cache of a pass of the same function at the same parameters, outside of autocast.
        mean_of: finite differences: mean over processes of a scalar tensor; all of them take the same step, as norms over the
            rows of all processes need it.

    Returns:
        Logits and tangent, float32 or float64. A zero direction gives a zero tangent.
    """
    assert parameters.keys() == direction.keys(), "parameters and direction must have the same names"
    assert parameters, "there must be at least one parameter"
    device_type = next(iter(parameters.values())).device.type
    point = {name: value.detach() for name, value in parameters.items()}
    towards = {name: value.detach().to(point[name].dtype) for name, value in direction.items()}
    if logits is not None and (logits.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(device_type)):
        logits = None
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        if estimator == "exact":
            with forward_mode():
                if products is None:
                    values, tangent = torch.func.jvp(logits_fn, (point,), (towards,))[:2]
                else:
                    values, tangent = products.jvp(logits_fn, point, towards)
        else:
            with _training_kernels():
                values, tangent = _finite_difference(
                    logits_fn,
                    point,
                    towards,
                    estimator=estimator,
                    base=logits,
                    target_rms=target_rms,
                    previous_rms=previous_rms,
                    length=norm(towards) if length is None else length,
                    mean_of=mean_of,
                )
    return at_least_float32(values.detach()), at_least_float32(tangent.detach())


def rms(values: Tensor, mean_of: Callable[[Tensor], Tensor] = lambda value: value) -> float:
    """Return the root mean square over all processes, as for `previous_rms`; 0 for an empty tensor.

    Args:
        values: as many on every process.
        mean_of: mean over processes of a scalar tensor.
    """
    return float(mean_of(values.square().mean()).sqrt()) if values.numel() else 0.0


def norm(values: Parameters) -> Tensor:
    """Return the Euclidean norm over all tensors, as a detached scalar tensor, without a host sync."""
    return torch.stack([torch.linalg.vector_norm(value.detach()) for value in values.values()]).norm()


def _finite_difference(
    logits_fn: Callable[[dict[str, Tensor]], Tensor],
    point: dict[str, Tensor],
    towards: dict[str, Tensor],
    *,
    estimator: str,
    base: Tensor | None,
    target_rms: float,
    previous_rms: float | None,
    length: Tensor,
    mean_of: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    def at(step: float) -> Tensor:
        return logits_fn({name: torch.add(value, towards[name], alpha=step) for name, value in point.items()})

    if previous_rms and math.isfinite(previous_rms):
        step, ahead = target_rms / previous_rms, None
    else:
        base = logits_fn(point) if base is None else base
        if not 0 < float(length) < math.inf:
            return base, base * length  # zeros, or NaN: whoever called sees at once that the direction is broken
        step, ahead = _first_step(at, base, point, float(length), target_rms, mean_of)
    if estimator == "one-sided":
        ahead = at(step) if ahead is None else ahead
        base = logits_fn(point) if base is None else base
        tangent = (ahead - base) / step
    else:
        ahead, behind = at(step), at(-step)
        base = (ahead + behind) / 2 if base is None else base
        tangent = (ahead - behind) / (2 * step)
    # A zero direction gives exact zeros although `base` may come from another batch size, whose rounding differs.
    return base, torch.where(length > 0, tangent, tangent.nan_to_num(0, 0, 0) * length)


def _first_step(
    at: Callable[[float], Tensor],
    base: Tensor,
    point: dict[str, Tensor],
    length: float,
    target_rms: float,
    mean_of: Callable[[Tensor], Tensor],
) -> tuple[float, Tensor]:
    """Return a step size that changes the logits by about `target_rms`, and the logits at that step.

    No relative step size suits all models. The search starts at a millionth of the norm of the parameters and rescales the
    step by the observed change, up to that norm, because logits that do not depend on the direction never change.
    """
    longest = (float(norm(point)) or 1.0) / length
    step = 1e-6 * longest
    ahead = at(step)
    for _ in range(_PROBES):
        change = rms(ahead - base, mean_of)
        if target_rms / 3 < change < target_rms * 3 or (step == longest and change < target_rms):
            break
        wanted = target_rms / change if change > 0 else 1e3
        wanted = wanted if math.isfinite(change) else 1e-3
        step = min(step * min(max(wanted, 1e-3), 1e3), longest)
        ahead = at(step)
    return step, ahead


@contextmanager
def forward_mode() -> Iterator[None]:
    """Compute attention by its plain formula, because fused and inference kernels have no forward-mode derivative."""
    _load_forward_mode()
    with _training_kernels(), sdpa_kernel(SDPBackend.MATH):
        yield


@cache
def _load_forward_mode() -> None:
    """Make PyTorch compile its forward-mode formulas once, without the deprecation warning of its own compiler."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.*", category=Warning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


@contextmanager
def _training_kernels() -> Iterator[None]:
    """Disable the inference kernel of attention, which rounds differently from a training step."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
