"""Gains of a step's augmented rows: the derivative of their logits, by the cheapest way that is exact enough.

What the training pass has already computed is used again: in head scope its pooled features (a text pass is left to do), for
a one-sided difference its logits (one pass at the second point is), for the exact derivative its matrix products (two thirds
of the derivative are).

Shapes: A augmented rows (of all processes where said so), C space, K label choices, N rows, T train rows, U texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from flyp_saflex.saflex.closed_form import gains
from flyp_saflex.saflex.estimators import CHECK_ROWS
from flyp_saflex.saflex.primal_cache import Products
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.tasks.label_space import LabelSpace, Rows
from flyp_saflex.tasks.network import Network, Outputs

_Derivative = tuple[Tensor, Tensor]
"""Logits and their derivative along the validation gradient."""


def step_gains(
    network: Network,
    saflex: Saflex,
    inputs: Tensor,
    space: LabelSpace,
    gather: Callable[[Tensor], Tensor],
    *,
    gains_fn: Callable[[Tensor, Tensor], Tensor] = gains,
    own_AC: Tensor | None = None,
    products: Products | None = None,
    rows_at_once: int = 0,
    num_before: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return logits_AC and gains_AK of all processes' augmented rows.

    Now and then estimated gains are compared with exact ones on the first rows of every process (`Watch`); if the estimator
    is given up, what is returned is exact already.

    Args:
        network: in evaluation mode.
        saflex: with a validation gradient.
        inputs: of this process's augmented rows, at least one; pooled features in head scope.
        space: of the step.
        gather: concatenation over processes.
        gains_fn: the objective's gains.
        own_AC: the training pass's own logits of these rows, if that pass was this function.
        products: of the training pass (`products_for`), if there are any.
        rows_at_once: rows per pass; 0: all.
        num_before: training rows before the augmented ones in `inputs`, where norms use the statistics of the joint batch or
            rows are related to each other.
    """
    head = saflex.settings.scope == "head"
    parameters = network.parameters_in(saflex.settings.scope)
    estimator = saflex.estimator_for(parameters)

    def gains_of(derivative: _Derivative) -> tuple[Tensor, Tensor]:
        logits_AC, tangent_AC = (gather(part) for part in derivative)
        if network.relates_rows:  # what was differentiated are the embeddings of all rows
            related = jvp(network.relate, (logits_AC,), (tangent_AC,))
            logits_AC, tangent_AC = (part[space.augmented_N] for part in related)
        return logits_AC, space.average(gains_fn(logits_AC, tangent_AC))

    def few(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, len(inputs) - num_before))[:, :CHECK_ROWS].flatten(0, 1)

    def exact_of(inputs: Tensor) -> _Derivative:
        logits_fn = _logits_fn(network, inputs, space, head, rows_at_once, "exact", num_before)
        return saflex.tangent(logits_fn, parameters, estimator="exact")

    logits_fn = _logits_fn(network, inputs, space, head, rows_at_once, estimator, num_before)
    logits_AC, gains_AK = gains_of(saflex.tangent(logits_fn, parameters, own_AC, products=products))
    if saflex.watch.due(estimator):
        exact_AK = few(gains_of(exact_of(inputs))[1]) if num_before else gains_of(exact_of(inputs[:CHECK_ROWS]))[1]
        if saflex.watch.compare(few(gains_AK), exact_AK, few(space.upstream_NK[space.augmented_N])):
            logits_AC, gains_AK = gains_of(exact_of(inputs))
    return logits_AC, gains_AK


def products_for(forward: Callable[..., Outputs], network: Network, saflex: Saflex | None, rows: Rows) -> Products | None:
    """Return an empty store for the products of the coming training pass; None if the derivative cannot use them.

    The exact derivative can where the pass is the network's own (not a compiler's, which rounds differently), equals the one in
    evaluation mode, is in full precision and is not made in order to be forgotten and computed again. Rows that are related need
    the derivative of all rows.

    Args:
        forward: the network, possibly wrapped.
        network: the bare module, in training's mode.
        saflex: with a validation gradient.
        rows: of the pass.
    """
    if saflex is None or len(rows.inputs) == rows.num_train or network.relates_rows or not _is_its_own(forward, network):
        return None
    parameters = network.parameters_in(saflex.settings.scope)
    if torch.is_autocast_enabled(rows.inputs.device.type):
        return None
    if network.recomputes or saflex.estimator_for(parameters) != "exact" or not network.acts_as_evaluated():
        return None
    return Products(parameters.values(), len(rows.inputs))


def own_logits(forward: Callable[..., Outputs], network: Network, seen: Outputs | None, space: LabelSpace) -> Tensor | None:
    """Return the training pass's own logits of its augmented rows; None if that pass was not the evaluated function.

    Of a network that relates rows, the embeddings of all rows.

    Args:
        forward: the network, possibly wrapped. A compiled one rounds differently, by as much as a finite difference is.
        network: the bare module, in training's mode.
        seen: what it made of the augmented rows, texts included.
        space: of the step.
    """
    if seen is None or not _is_its_own(forward, network) or not network.acts_as_evaluated():
        return None
    with torch.no_grad():
        return seen.images_ND if network.relates_rows else seen.logits(columns_C=space.inverse_C)


def _is_its_own(forward: Callable[..., Outputs], network: Network) -> bool:
    """Return whether a forward pass is the network's, at most wrapped for several processes."""
    return getattr(forward, "module", forward) is network


def _logits_fn(
    network: Network,
    inputs: Tensor,
    space: LabelSpace,
    from_pooled: bool,
    rows_at_once: int,
    estimator: str,
    num_before: int = 0,
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return the rows' logits as a function of parameters; all rows' embeddings, where rows are related."""
    batchnorm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    called = _outside_autocast(network) if estimator != "exact" or batchnorm else network
    first, *others = inputs.detach().split(rows_at_once or len(inputs))

    def run(parameters: dict[str, Tensor], few: Tensor, tokens_UL: Tensor) -> Outputs:
        # Statistics that the pass updates are those of copies: only the training pass moves the network's own.
        buffers = {name: value.clone() for name, value in network.named_buffers()} if num_before else {}
        options = {"from_pooled": from_pooled}
        return functional_call(called, {**buffers, **parameters}, (few, tokens_UL), options, tie_weights=False)

    def logits_fn(parameters: dict[str, Tensor]) -> Tensor:
        outputs = run(parameters, first, space.tokens_UL)
        rest = [run(parameters, few, space.tokens_UL[:0]).images_ND for few in others]  # the texts are read once
        images_ND = torch.cat([outputs.images_ND, *rest])
        return images_ND if network.relates_rows else outputs.logits(images_ND[num_before:], space.inverse_C)

    return logits_fn


def _outside_autocast(network: Network) -> Network:
    """Return the same module without the autocast that accelerate puts around the `forward` of an instance.

    Finite differences are lost in half precision, and PyTorch has no forward mode for BatchNorm that mixes precisions.
    """
    twin = copy.copy(network)
    twin.__dict__.pop("forward", None)
    return twin
