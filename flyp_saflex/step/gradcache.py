"""GradCache (arXiv 2101.06983): a step in parts of a few rows, for large batches on small cards.

A contrastive loss needs the features of all rows at once, but not their activations. The loss' gradient with respect to the
features is kept, and the rows then go through the network again, a few at a time: with g the kept gradient,

    grad_theta L = sum over parts of grad_theta < features of the part, g of the part >.

Exact where a row's features depend on that row alone: no batch statistics, no dropout (`obstacle`).

Shapes: N rows of all processes, S of them chosen, U texts, D embedding, F pooled width, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flyp_saflex.saflex.modes import drops_at_random
from flyp_saflex.tasks.label_space import LabelSpace, Rows
from flyp_saflex.tasks.network import Network, Outputs

if TYPE_CHECKING:
    from flyp_saflex.step.augmented_rows import StepResult
    from flyp_saflex.step.step import StepLoss

Forward = Callable[..., Outputs]

TEXTS_PER_ROW = 4
"""Texts that go through their tower with each image row: a caption of 15 tokens takes a fraction of an image's memory."""


def obstacle(network: Network, *, freeze_batchnorm: bool) -> str:
    """Return why rows cannot be taken apart, with the fix; empty if they can.

    Args:
        network: the model, as loaded.
        freeze_batchnorm: BatchNorm keeps its running statistics.
    """
    if network.relates_rows:
        return "every view is a proxy class of the step's others: choose another train.method"
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not freeze_batchnorm:
            return f"{name} normalises with the statistics of the whole batch: set train.freeze_batchnorm=true"
        if drops_at_random(module):
            return f"{name} ({type(module).__name__}) is random in training, so that two passes differ: set its rate to 0"
    return ""


def loss_in_parts(step: StepLoss, rows: Rows, space: LabelSpace, generator: torch.Generator | None) -> StepResult:
    """Take the loss and its gradient at the features of all rows; leave the network's backward passes to `surrogates`."""
    network, size = step.task.network, step.rows_at_once
    found = leaves(features(step.forward, network, rows.inputs, space.tokens_UL, size))
    images_ND = step.processes.gather_features(found.images_ND)
    logits_NC = found.logits(images_ND, space.inverse_C)
    logits_AC = logits_NC.detach()[space.augmented_N]
    result = step.augmented.decide(rows, found.rows_from(rows.num_train), logits_AC, space, generator)
    loss = step.loss_of(found, images_ND, logits_NC, result, rows, space)
    gradient = gradients(loss, found)
    kept_N = result.weights_N.view(-1, len(rows.inputs))[step.processes.rank] > 0
    chosen_S = kept_N.nonzero()[:, 0] if bool(kept_N.any()) else torch.zeros(1, dtype=torch.long, device=kept_N.device)
    result.loss = loss.detach()
    result.surrogates = surrogates(step.forward, network, rows.inputs, chosen_S, space.tokens_UL, gradient, size)
    result.selected = bool(space.augmented_N.any())
    return result


def features(forward: Forward, network: Network, inputs: Tensor, tokens_UL: Tensor, rows_at_once: int = 0) -> Outputs:
    """Return the outputs of all rows and texts without gradient, `rows_at_once` rows at a time (0: all).

    Args:
        forward: the network, possibly wrapped.
        network: the bare module.
        inputs: rows, at least one.
        tokens_UL: the texts.
        rows_at_once: rows per pass.
    """
    size = rows_at_once or len(inputs)
    images = inputs.split(size)
    texts = (tokens_UL if network.head is None else tokens_UL[:0]).split(TEXTS_PER_ROW * size)
    with _without_gradient(inputs.device.type):
        passes = [  # one that has no rows left to give is given a row of before, or no text
            forward(inputs[:1] if few is None else few, tokens_UL[:0] if read is None else read)
            for few, read in zip_longest(images, texts)
        ]
    seen = passes[: len(images)]
    return Outputs(
        torch.cat([out.pooled_NF for out in seen]),
        torch.cat([out.images_ND for out in seen]),
        torch.cat([out.columns_CD for out in passes[: len(texts)]]),
        seen[-1].scale,
        seen[-1].bias,
    )


def leaves(outputs: Outputs) -> Outputs:
    """Return outputs at which a loss can be differentiated."""
    return Outputs(outputs.pooled_NF, *(value.detach().requires_grad_() for value in outputs[1:]))


def gradients(loss: Tensor, at: Outputs) -> Outputs:
    """Return the loss' gradient with respect to `leaves`; the pooled features have none of their own."""
    found = torch.autograd.grad(loss, at[1:], allow_unused=True, materialize_grads=True)
    return Outputs(torch.empty(0), *found)


def surrogates(
    forward: Forward,
    network: Network,
    inputs: Tensor,
    chosen_S: Tensor,
    tokens_UL: Tensor,
    gradient: Outputs,
    rows_at_once: int,
) -> list[Callable[[], Tensor]]:
    """Return functions whose gradients add up to that of the loss.

    Each makes one forward pass of a few rows. The last one touches every trained parameter, as DistributedDataParallel expects
    of the pass that it averages after.

    Args:
        forward: the network, possibly wrapped.
        network: the bare module: what is frozen needs no pass.
        inputs: this process's rows.
        chosen_S: those that have a gradient, at least one; they are taken from the inputs when their pass comes.
        tokens_UL: the texts.
        gradient: of the loss, with respect to `images_ND` (of all these rows), `columns_CD`, `scale` and `bias`.
        rows_at_once: rows per pass.
    """
    images = [(few, gradient.images_ND[few]) for few in chosen_S.split(rows_at_once)]
    spare = [(chosen_S[:1], torch.zeros_like(gradient.images_ND[:1]))]  # a row without gradient
    if not network.trains_rows():
        images = spare
    size = TEXTS_PER_ROW * rows_at_once
    if not network.trains_texts():
        texts = [(tokens_UL[:0], gradient.columns_CD)]
    else:
        texts = list(zip(tokens_UL.split(size), gradient.columns_CD.split(size), strict=True))
    number = max(len(images), len(texts))
    # Both end with the last pass; before that, one that has too few has a row without gradient, or no text.
    silence = [(tokens_UL[:0], gradient.columns_CD[:0])] * (number - len(texts))
    passes = list(zip(spare * (number - len(images)) + images, silence + texts, strict=True))

    def surrogate(place: int) -> Tensor:
        (few, images_ND), (read, columns_UD) = passes[place]
        out = forward(inputs[few], read)
        total = (out.images_ND * images_ND).sum()
        if len(columns_UD) == len(out.columns_CD):  # frozen texts are not read again, and have no gradient
            total = total + (out.columns_CD * columns_UD).sum()
        if place == number - 1:
            total = total + out.scale * gradient.scale + (out.bias * gradient.bias).sum()
        return total

    return [lambda place=place: surrogate(place) for place in range(number)]  # type: ignore[misc]


def gradient_in_parts(
    network: Network,
    inputs: Tensor,
    tokens_UL: Tensor,
    loss_of: Callable[[Outputs], Tensor],
    parameters: Mapping[str, Tensor],
    rows_at_once: int,
) -> dict[str, Tensor]:
    """Return the gradient, by name, of `loss_of(network(inputs, tokens_UL))` at the network's own `parameters`."""
    at = leaves(features(network, network, inputs, tokens_UL, rows_at_once))
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    everything_S = torch.arange(len(inputs), device=inputs.device)
    for surrogate in surrogates(network, network, inputs, everything_S, tokens_UL, gradients(loss_of(at), at), rows_at_once):
        found = torch.autograd.grad(surrogate(), list(parameters.values()), allow_unused=True, materialize_grads=True)
        total = {name: total[name] + value for name, value in zip(total, found, strict=True)}
    return total


@contextmanager
def _without_gradient(device_type: str) -> Iterator[None]:
    """Keep autocast's copies of the weights out of its cache: some releases of torch would use them with gradient, too."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    with torch.no_grad(), torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield
