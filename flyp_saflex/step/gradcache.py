"""Steps of two passes: features without gradient first, then backward passes of the rows that need one (floor 2).

Two uses. "Select, then train": a row that SAFLEX or a filter drops has no gradient, so its backward pass, and the forward
pass kept for it, are wasted; where few enough rows are kept, deciding first is cheaper: with F for a forward pass of the
augmented rows, F + 3 F x kept instead of 3 F. "Large batches on small cards" (GradCache, arXiv 2101.06983): a contrastive
loss needs the features of all rows at once, but not their activations. The loss' gradient with respect to the features is
kept, and the rows then go through the towers again, a few at a time: with g the kept gradient,

    grad_theta L = sum over parts of grad_theta < features of the part, g of the part >.

Both are exact where a row's features depend on that row alone: no batch statistics, no dropout (`obstacle`).

Shapes: N rows of all processes, S of them chosen, P processes, U texts, D embedding, F pooled width, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flyp_saflex.tasks.clip_task import Learner, Outputs, drops_at_random

Select = Literal["auto", "always", "never"]
Forward = Callable[..., Outputs]

BREAK_EVEN = 2 / 3
"""Part of the rows kept at which selecting first costs as much as it saves: 1 + 3 x = 3, in forward passes."""
ON_BELOW = 0.6
"""Selecting starts below this part: the text tower and the smaller batch take a little of what is saved."""
TEXTS_PER_ROW = 4
"""Texts that go through their tower with each image row: a caption of 15 tokens takes a fraction of an image's memory."""


class Selecting:
    """Whether a step decides about augmented rows before it trains on them.

    `auto` follows a running average of the part that is kept: on below `ON_BELOW`, off above `BREAK_EVEN`. It sees the rows
    of all processes, so that all of them come to the same verdict.

    Args:
        mode: `always`, `never`, or `auto`.
        decay: of the running average, per part of a step.
    """

    def __init__(self, mode: Select = "auto", decay: float = 0.9) -> None:
        self.mode, self.decay = mode, decay
        self.kept: float | None = None
        self._on = False

    @property
    def on(self) -> bool:
        """Whether the next part of a step selects first."""
        return self.mode == "always" or (self.mode == "auto" and self._on)

    def update(self, weights_A: Tensor) -> None:
        """Take in the weights of a part's augmented rows."""
        if self.mode != "auto" or not len(weights_A):
            return
        newest = float((weights_A > 0).double().mean())
        self.kept = newest if self.kept is None else self.decay * self.kept + (1 - self.decay) * newest
        self._on = self.kept < (BREAK_EVEN if self._on else ON_BELOW)

    def reset(self) -> None:
        """Forget what was seen: other parameters are trained from now on."""
        self.kept, self._on = None, False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit."""
        return {"kept": self.kept, "on": self._on}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.kept, self._on = state["kept"], state["on"]


def obstacle(learner: Learner, *, freeze_batchnorm: bool) -> str:
    """Return why rows cannot be taken apart, with the fix; empty if they can.

    Args:
        learner: the model, as loaded.
        freeze_batchnorm: BatchNorm keeps its running statistics.
    """
    for name, module in learner.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not freeze_batchnorm:
            return f"{name} normalises with the statistics of the whole batch: set train.freeze_batchnorm=true"
        if drops_at_random(module):
            return f"{name} ({type(module).__name__}) is random in training, so that two passes differ: set its rate to 0"
    return ""


def trains_images(learner: Learner) -> bool:
    """Return whether an image tower's parameter is trained: if none is, images have no backward pass to save."""
    return any(parameter.requires_grad for parameter in learner.clip.visual.parameters())


def features(forward: Forward, learner: Learner, inputs: Tensor, tokens_UL: Tensor, rows_at_once: int = 0) -> Outputs:
    """Return the outputs of all rows and texts without gradient, `rows_at_once` rows at a time (0: all).

    Args:
        forward: the learner, possibly wrapped.
        learner: the bare module.
        inputs: rows, at least one.
        tokens_UL: the texts.
        rows_at_once: rows per pass.
    """
    size = rows_at_once or len(inputs)
    images = inputs.split(size)
    texts = (tokens_UL if learner.head is None else tokens_UL[:0]).split(TEXTS_PER_ROW * size)
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


def chosen_rows(weights_N: Tensor, num_local: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return which rows of this process go into the pass with gradient, and where all processes' stand among the N.

    Gathering needs as many rows from every process: those that keep fewer than another fill up with dropped ones, which
    have weight zero and change nothing.

    Args:
        weights_N: of all processes' rows, `num_local` from each.
        num_local: rows of a process.
        rank: this process.
    """
    kept_PN = weights_N.view(-1, num_local) > 0
    count = max(int(kept_PN.sum(dim=1).max()), 1)
    chosen_PS = (~kept_PN).long().argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
    offsets_P1 = num_local * torch.arange(len(kept_PN), device=weights_N.device)[:, None]
    return chosen_PS[rank], (chosen_PS + offsets_P1).flatten()


def leaves(outputs: Outputs) -> Outputs:
    """Return outputs at which a loss can be differentiated."""
    return Outputs(outputs.pooled_NF, *(value.detach().requires_grad_() for value in outputs[1:]))


def gradients(loss: Tensor, at: Outputs) -> Outputs:
    """Return the loss' gradient with respect to `leaves`; the pooled features have none of their own."""
    found = torch.autograd.grad(loss, at[1:], allow_unused=True, materialize_grads=True)
    return Outputs(torch.empty(0), *found)


def surrogates(
    forward: Forward,
    learner: Learner,
    inputs: Tensor,
    chosen_S: Tensor,
    tokens_UL: Tensor,
    gradient: Outputs,
    rows_at_once: int,
) -> list[Callable[[], Tensor]]:
    """Return functions whose values' gradients add up to that of the loss; each makes one forward pass of a few rows.

    The last one touches every trained parameter, as DistributedDataParallel expects of the pass that it averages after.

    Args:
        forward: the learner, possibly wrapped.
        learner: the bare module: what is frozen needs no pass.
        inputs: this process's rows.
        chosen_S: those that have a gradient, at least one; they are taken from the inputs when their pass comes.
        tokens_UL: the texts.
        gradient: of the loss, with respect to `images_ND` (of all these rows), `columns_CD`, `scale` and `bias`.
        rows_at_once: rows per pass.
    """
    images = [(few, gradient.images_ND[few]) for few in chosen_S.split(rows_at_once)]
    spare = [(chosen_S[:1], torch.zeros_like(gradient.images_ND[:1]))]  # a row without gradient
    if not trains_images(learner):
        images = spare
    size = TEXTS_PER_ROW * rows_at_once
    if learner.head is not None or not _trains_texts(learner):
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
    learner: Learner,
    inputs: Tensor,
    tokens_UL: Tensor,
    loss_of: Callable[[Outputs], Tensor],
    parameters: Mapping[str, Tensor],
    rows_at_once: int,
) -> dict[str, Tensor]:
    """Return the gradient, by name, of `loss_of(learner(inputs, tokens_UL))` at the learner's own `parameters`."""
    at = leaves(features(learner, learner, inputs, tokens_UL, rows_at_once))
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    everything_S = torch.arange(len(inputs), device=inputs.device)
    for surrogate in surrogates(learner, learner, inputs, everything_S, tokens_UL, gradients(loss_of(at), at), rows_at_once):
        found = torch.autograd.grad(surrogate(), list(parameters.values()), allow_unused=True, materialize_grads=True)
        total = {name: total[name] + value for name, value in zip(total, found, strict=True)}
    return total


def _trains_texts(learner: Learner) -> bool:
    visual = {id(parameter) for parameter in learner.clip.visual.parameters()}
    return any(
        parameter.requires_grad and id(parameter) not in visual and name not in ("logit_scale", "logit_bias")
        for name, parameter in learner.clip.named_parameters()
    )


@contextmanager
def _without_gradient(device_type: str) -> Iterator[None]:
    """Keep autocast's copies of the weights out of its cache: some releases of torch would use them with gradient, too."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    with torch.no_grad(), torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield
