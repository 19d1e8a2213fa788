"""Gains of a step's augmented rows: the derivative of their logits, by the cheapest way that is exact enough (floor 2).

What the training pass has already computed is used again: in head scope its pooled features (a text pass is left to do), for
a one-sided difference its logits (one pass at the second point is), and for the exact derivative of all parameters the whole
pass: `forward_with_tangent` carries the derivative along in the very pass that the loss goes backward through.

Shapes: A augmented rows (of all processes where said so), C columns, K label choices, N rows, T train rows, U texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from flyp_saflex.method import gains, losses
from flyp_saflex.method.columns import Columns
from flyp_saflex.method.estimators import CHECK_ROWS
from flyp_saflex.method.learner import Learner, Outputs
from flyp_saflex.method.saflex import Saflex

Derivative = tuple[Tensor, Tensor]
"""Logits and their derivative along the validation gradient."""


def step_gains(
    learner: Learner,
    saflex: Saflex,
    inputs: Tensor,
    columns: Columns,
    gather: Callable[[Tensor], Tensor],
    *,
    own_AC: Tensor | None = None,
    known: Derivative | None = None,
    rows_at_once: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return logits_AC and gains_AK of all processes' augmented rows.

    Now and then estimated gains are compared with exact ones on the first rows of every process (`Watch`); if the estimator
    is given up, what is returned is exact already.

    Args:
        learner: in evaluation mode.
        saflex: with a validation gradient.
        inputs: of this process's augmented rows, at least one; pooled features in head scope.
        columns: of the step.
        gather: concatenation over processes.
        own_AC: the training pass's own logits of these rows, if that pass was this function.
        known: the exact derivative, if it is there already.
        rows_at_once: rows per pass; 0: all.
    """
    head = saflex.settings.scope == "head"
    parameters = learner.parameters_in(saflex.settings.scope)
    estimator = saflex.estimator_for(parameters)

    def gains_of(derivative: Derivative) -> tuple[Tensor, Tensor]:
        logits_AC, tangent_AC = (gather(part) for part in derivative)
        gains_AC = gains.gains(logits_AC, tangent_AC)
        return logits_AC, losses.average_over_columns(gains_AC, columns.choices_K, columns.columns_C)

    def few(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, len(inputs)))[:, :CHECK_ROWS].flatten(0, 1)

    def exact_of(inputs: Tensor) -> Derivative:
        return saflex.tangent(_logits_fn(learner, inputs, columns, head, rows_at_once, "exact"), parameters, estimator="exact")

    if known is None:
        known = saflex.tangent(_logits_fn(learner, inputs, columns, head, rows_at_once, estimator), parameters, own_AC)
    logits_AC, gains_AK = gains_of(known)
    if saflex.watch.due(estimator):
        exact_AK = gains_of(exact_of(inputs[:CHECK_ROWS]))[1]
        if saflex.watch.compare(few(gains_AK), exact_AK, few(columns.upstream_NK[columns.augmented_N])):
            logits_AC, gains_AK = gains_of(exact_of(inputs))
    return logits_AC, gains_AK


def forward_with_tangent(
    learner: Learner, saflex: Saflex, inputs: Tensor, num_train: int, columns: Columns
) -> tuple[Outputs, Derivative]:
    """Run the training pass; return its outputs, with gradient, and the exact derivative of the augmented rows' logits.

    The augmented rows and the texts run on dual numbers: the derivative costs no second forward pass of theirs. Attention is
    computed by its plain formula there. Train rows run apart and carry no derivative.

    Args:
        learner: as in training; its pass must equal the one in evaluation mode.
        saflex: with a validation gradient of all parameters.
        inputs: of all rows, at least one of each kind.
        num_train: T, the rows that come first.
        columns: of the step.
    """
    direction = saflex.direction
    trained = learner(inputs[:num_train], columns.tokens_UL[:0])
    with gains.forward_mode(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(value, direction[name].to(value.dtype))
            for name, value in learner.parameters_in("all").items()
        }
        out = functional_call(learner, duals, (inputs[num_train:], columns.tokens_UL), tie_weights=False)
        logits_AC, tangent_AC = forward_ad.unpack_dual(out.logits(columns_C=columns.inverse_C))
        primal = Outputs(*(forward_ad.unpack_dual(part).primal for part in out))
    tangent_AC = torch.zeros_like(logits_AC) if tangent_AC is None else tangent_AC
    seen = primal._replace(
        pooled_NF=torch.cat([trained.pooled_NF, primal.pooled_NF]), images_ND=torch.cat([trained.images_ND, primal.images_ND])
    )
    return seen, (logits_AC.detach(), tangent_AC.detach())


def may_carry_tangent(forward: Callable[..., Outputs], learner: Learner, saflex: Saflex) -> bool:
    """Return whether the coming pass is to be `forward_with_tangent`.

    That is: the derivative is the exact one of all parameters, the pass is the learner's own (not that of a wrapper for
    several processes or of a compiler), it equals the one in evaluation mode, and nothing is recomputed in half precision or
    in the backward pass. In head scope it does not pay: plain attention costs the training what the text pass saves.
    """
    if saflex.settings.scope != "all" or forward is not learner or learner.tower.checkpointing or not learner.acts_as_evaluated():
        return False
    parameters = learner.parameters_in("all")
    device_type = next(iter(parameters.values())).device.type
    return saflex.estimator_for(parameters) == "exact" and not torch.is_autocast_enabled(device_type)


def own_logits(forward: Callable[..., Outputs], learner: Learner, seen: Outputs | None, columns: Columns) -> Tensor | None:
    """Return the training pass's own logits of its augmented rows; None if that pass was not the evaluated function.

    Args:
        forward: the learner, possibly wrapped. A compiled one rounds differently, by as much as a finite difference is.
        learner: the bare module, in training's mode.
        seen: what it made of the augmented rows, texts included.
        columns: of the step.
    """
    if seen is None or getattr(forward, "module", forward) is not learner or not learner.acts_as_evaluated():
        return None
    with torch.no_grad():
        return seen.logits(columns_C=columns.inverse_C)


def _logits_fn(
    learner: Learner, inputs: Tensor, columns: Columns, from_pooled: bool, rows_at_once: int, estimator: str
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return the rows' logits as a function of parameters."""
    batchnorm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in learner.modules())
    called = _outside_autocast(learner) if estimator != "exact" or batchnorm else learner
    first, *others = inputs.detach().split(rows_at_once or len(inputs))

    def run(parameters: dict[str, Tensor], few: Tensor, tokens_UL: Tensor) -> Outputs:
        return functional_call(called, parameters, (few, tokens_UL), {"from_pooled": from_pooled}, tie_weights=False)

    def logits_fn(parameters: dict[str, Tensor]) -> Tensor:
        outputs = run(parameters, first, columns.tokens_UL)
        rest = [run(parameters, few, columns.tokens_UL[:0]).images_ND for few in others]  # the texts are read once
        return outputs.logits(torch.cat([outputs.images_ND, *rest]), columns.inverse_C)

    return logits_fn


def _outside_autocast(learner: Learner) -> Learner:
    """Return the same module without the autocast that accelerate puts around the `forward` of an instance.

    Finite differences are lost in half precision, and PyTorch has no forward mode for BatchNorm that mixes precisions.
    """
    twin = copy.copy(learner)
    twin.__dict__.pop("forward", None)
    return twin
