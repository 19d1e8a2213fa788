"""The gain of giving an augmented row a label, from one directional derivative (floor 2: tensors only).

With `g` the gradient of the validation loss and `Z' = J_Z(theta) g` the derivative of the augmented rows' logits along
it, the first-order decrease of the validation loss when row i is trained towards label k is (Eq. 9, with the sign and the
logarithm of Eq. 7 written out)

    Pi_ik = < g, grad_theta (-log p_ik) > = -( Z'_ik - sum_j p_ij Z'_ij ).

One Jacobian-vector product gives every row's and every label's gain. Facts: `sum_k p_ik Pi_ik = 0`, so the best label
never has a negative gain; `sum_k Pi_ik` is K times the gain of the uniform label.

Models are run as functions of their parameters (`torch.func.functional_call`), in evaluation mode: batch statistics and
dropout would make the derivative that of another function.

Shapes: A augmented rows, T train rows, K labels, C caption columns.
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
"""Forward passes that the search for a first step size may take."""


def gradient(loss_fn: Callable[[dict[str, Tensor]], Tensor], parameters: Parameters) -> dict[str, Tensor]:
    """Return the gradient of `loss_fn(parameters)`, by name; zeros for parameters that the loss does not use.

    No `.grad` is written, and it works under `torch.no_grad()`.

    Args:
        loss_fn: takes parameters by name, returns a scalar.
        parameters: where to differentiate; those left out stay constants of `loss_fn`.
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
) -> tuple[Tensor, Tensor]:
    """Return the logits and their derivative along `direction`, detached, outside of autocast.

    Args:
        logits_fn: takes parameters by name, returns logits of any shape. Deterministic, in evaluation mode.
        parameters: the point.
        direction: the same names; usually the validation gradient.
        estimator: `exact`: forward-mode differentiation (attention is computed by its plain formula: the fused kernels
            have no forward mode). `central`: two passes. `one-sided`: one pass beside the base logits. Both need parameters
            in float32 or better.
        logits: `one-sided`: the logits at `parameters`, if the caller has them from the same function in the same
            precision. Recomputed if they are half precision or autocast is on: the rounding would be the whole difference.
        target_rms: finite differences: root mean square change of the logits that the step aims at. In float32 rounding
            falls as it grows and truncation grows with it. During finetunes of two small convnets (scripts/benchmarks/
            estimator_fidelity.py) the one-sided error was 0.3..0.7 % at 1e-3, 0.3..1.1 % at 3e-3, 0.9..2.1 % at 1e-2; of a
            12-layer ViT with a scale of 100, where rounding is larger, 1.4 % at 3e-4, 0.4, 0.2 and 0.4 %. Rows' cosines
            are 0.9999 or more at all of them from 1e-3 to 3e-3, so it stays at the one that is safer from rounding.
        previous_rms: finite differences: root mean square of a recent derivative, which fixes the step size
            h = target_rms / previous_rms; None: found by trial, one or two passes more.
        length: finite differences: `norm(direction)`, if the caller has it.
        products: `exact`: of a pass of the same function at the same parameters, outside of autocast.

    Returns:
        logits and tangent, float32 or float64. A zero direction gives a zero tangent.
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
                )
    return at_least_float32(values.detach()), at_least_float32(tangent.detach())


def rms(values: Tensor) -> float:
    """Return the root mean square, 0 for an empty tensor; what `previous_rms` wants."""
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def norm(values: Parameters) -> Tensor:
    """Return the Euclidean norm over all tensors together, as a scalar tensor: nobody waits for the device."""
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
) -> tuple[Tensor, Tensor]:
    def at(step: float) -> Tensor:
        return logits_fn({name: torch.add(value, towards[name], alpha=step) for name, value in point.items()})

    if previous_rms and math.isfinite(previous_rms):
        step, ahead = target_rms / previous_rms, None
    else:
        base = logits_fn(point) if base is None else base
        if not 0 < float(length) < math.inf:
            return base, base * length  # zeros, or NaN: whoever called sees at once that the direction is broken
        step, ahead = _first_step(at, base, point, float(length), target_rms)
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
    at: Callable[[float], Tensor], base: Tensor, point: dict[str, Tensor], length: float, target_rms: float
) -> tuple[float, Tensor]:
    """Return a step size that changes the logits by about `target_rms`, and the logits there.

    No relative step transfers between models, so it starts from a millionth of the parameters' norm and follows the
    change that it sees, up to that norm: logits that do not depend on the direction would never change.
    """
    longest = (float(norm(point)) or 1.0) / length
    step = 1e-6 * longest
    ahead = at(step)
    for _ in range(_PROBES):
        change = rms(ahead - base)
        if target_rms / 3 < change < target_rms * 3 or (step == longest and change < target_rms):
            break
        wanted = target_rms / change if change > 0 else 1e3
        wanted = wanted if math.isfinite(change) else 1e-3
        step = min(step * min(max(wanted, 1e-3), 1e3), longest)
        ahead = at(step)
    return step, ahead


@contextmanager
def forward_mode() -> Iterator[None]:
    """Compute attention by its plain formula: the fused and the inference kernels have no forward-mode derivative."""
    _load_forward_mode()
    with _training_kernels(), sdpa_kernel(SDPBackend.MATH):
        yield


@cache
def _load_forward_mode() -> None:
    """Let PyTorch compile its forward-mode formulas, once, without its warning that its own compiler is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.*", category=Warning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


@contextmanager
def _training_kernels() -> Iterator[None]:
    """Keep attention off its inference kernel, which rounds unlike a training step."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
