"""Select, then train: dropped rows are left out of the pass with gradient.

A row that SAFLEX or a filter drops has no gradient, so its backward pass, and the forward pass kept for it, are wasted. Where
few enough rows are kept, deciding first is cheaper: with F for a forward pass of the augmented rows, F + 3 F x kept instead of
3 F. Exact where a row's features depend on that row alone (`gradcache.obstacle`).

Shapes: N rows of all processes, S of them chosen, A augmented, P processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flyp_saflex.step.gradcache import features
from flyp_saflex.tasks.label_space import LabelSpace, Rows

if TYPE_CHECKING:
    from flyp_saflex.step.augmented_rows import StepResult
    from flyp_saflex.step.step import StepLoss

Select = Literal["auto", "always", "never"]

BREAK_EVEN = 2 / 3
"""Part of the rows kept at which selecting first costs as much as it saves: 1 + 3 x = 3, in forward passes."""

ON_BELOW = 0.6
"""Selecting starts below this part: the text tower and the smaller batch take a little of what is saved."""


def loss_of_kept(step: StepLoss, rows: Rows, space: LabelSpace, generator: torch.Generator | None) -> StepResult:
    """Decide from a pass without gradient over the augmented rows; train on the training rows and the kept ones.

    Texts that the decision reads are read with gradient at once, and not again.
    """
    augmented, network, gather = step.augmented, step.task.network, step.processes.gather
    seen, logits_AC, primal = None, None, None
    if augmented.reads_logits or augmented.reads_features:
        few = features(step.forward, network, rows.inputs[rows.num_train :], space.tokens_UL[:0])
        with augmented.recording(rows) as primal:
            seen = step.forward(few.pooled_NF, space.tokens_UL, from_pooled=True)
        logits_AC = gather(seen.logits(columns_C=space.inverse_C).detach()) if augmented.reads_logits else None
    result = augmented.decide(rows, seen, logits_AC, space, generator, primal)
    chosen_S, among_all_S = chosen_rows(result.weights_N, len(rows.inputs), step.processes.rank)
    out = step.forward(rows.inputs[chosen_S], space.tokens_UL if seen is None else space.tokens_UL[:0])
    if seen is not None:
        out = out._replace(columns_CD=seen.columns_CD)
    images_SD = step.processes.gather_features(out.images_ND)
    logits_SC = out.logits(images_SD, space.inverse_C)
    result.loss = loss = step.loss_of(out, images_SD, logits_SC, result, rows, space, among_all_S)
    result.surrogates, result.selected = [lambda: loss], True
    return result


class Selecting:
    """Decision whether a step weighs augmented rows before it trains on them.

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
        """True if the next part of a step selects first."""
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
