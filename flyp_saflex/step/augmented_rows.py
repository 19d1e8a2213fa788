"""Decisions about the augmented rows of a step: plain filters, then SAFLEX's weights and labels.

Shapes: N rows of all processes, A of them augmented, C columns, K labels, J labels that are logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flyp_saflex.saflex import baselines
from flyp_saflex.saflex.closed_form import probability_gains, renormalise
from flyp_saflex.saflex.modes import evaluation_mode, trains_statistics
from flyp_saflex.saflex.objectives import Objective
from flyp_saflex.saflex.primal_cache import Products
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.skip_dropped import Selecting
from flyp_saflex.step.step_gains import own_logits, products_for, step_gains
from flyp_saflex.tasks.label_space import LabelSpace, Rows
from flyp_saflex.tasks.network import Network, Outputs
from flyp_saflex.tasks.task import Processes

Filter = Literal["none", "scores", "argmax", "lowest-loss", "random"]
READS_LOGITS = ("argmax", "lowest-loss")
"""Filters that look at the logits of the model under training."""
NUM_TOP_LABELS = 5
"""How many of a learned label's classes are told; the others are rarely worth a look."""


@dataclass
class StepResult:
    """Loss of a part of a step, and the decisions about its augmented rows (over all processes).

    Attributes:
        assignment_NC, weights_N: label mass of all rows over the columns, and their weights.
        loss: scalar; its gradient is to be had through `surrogates`.
        ids_A, weights_A: identity and weight of the augmented rows.
        gains_A: gain of the label that each came with; None without SAFLEX.
        top_labels_AJ: the labels with the largest learned shares, the largest first, as caption ids (or classes).
        top_shares_AJ: their shares; J is at most `NUM_TOP_LABELS`.
        surrogates: functions of no arguments that return scalars whose gradients add up to the loss' own: the loss, or in
            parts. Call one, go backward, call the next: each makes its own forward pass.
        selected: whether rows of weight zero were left out of the pass with gradient.
    """

    assignment_NC: Tensor
    weights_N: Tensor
    loss: Tensor
    ids_A: Tensor
    weights_A: Tensor
    gains_A: Tensor | None = None
    top_labels_AJ: Tensor | None = None
    top_shares_AJ: Tensor | None = None
    surrogates: list[Callable[[], Tensor]] = field(default_factory=list)
    selected: bool = False


class AugmentedRows:
    """Weights and labels of the augmented rows. Arguments as those of `StepLoss`."""

    def __init__(
        self,
        network: Network,
        forward: Callable[..., Outputs],
        *,
        objective: Objective,
        saflex: Saflex | None,
        upstream_filter: Filter,
        keep_fraction: float,
        processes: Processes,
        rows_at_once: int,
        selecting: Selecting,
    ) -> None:
        self.network, self.forward, self.objective = network, forward, objective
        self.saflex, self.upstream_filter, self.keep_fraction = saflex, upstream_filter, keep_fraction
        self.processes, self.rows_at_once, self.selecting = processes, rows_at_once, selecting

    @property
    def reads_logits(self) -> bool:
        """True if the filter looks at logits."""
        return self.upstream_filter in READS_LOGITS

    @property
    def reads_features(self) -> bool:
        """True if gains start from the pooled features of the training pass (head scope)."""
        return self.saflex is not None and self.saflex.settings.needs_gains and self.saflex.settings.scope == "head"

    def decide(
        self,
        rows: Rows,
        seen: Outputs | None,
        logits_AC: Tensor | None,
        space: LabelSpace,
        generator: torch.Generator | None,
        primal: Products | None = None,
    ) -> StepResult:
        """Return the decisions about the augmented rows; the loss is left to the caller.

        Args:
            rows: this process's rows.
            seen: the network's outputs for its augmented rows, or for all where rows are related; head scope starts from the
                pooled features.
            logits_AC: logits of all processes' augmented rows without gradient; None where no filter looks at them.
            space: label space of the step.
            generator: of the `random` filter.
            primal: matrix products of the pass that made `seen`, if they are of use.
        """
        augmented_N = space.augmented_N
        weights_N = torch.ones(len(augmented_N), device=augmented_N.device)
        ids_A = self.processes.gather(rows.ids_N)[augmented_N]
        result = StepResult(space.upstream_mass(), weights_N, weights_N.new_zeros(()), ids_A, weights_N[augmented_N])
        if bool(augmented_N.any()):
            keep_A = self._filter(logits_AC, space, generator)
            prior_A = None if rows.prior_N is None else self.processes.gather(rows.prior_N)[augmented_N]
            if self.saflex is None:
                result.weights_A = keep_A.to(weights_N.dtype) * (1 if prior_A is None else prior_A)
            elif not self.saflex.settings.needs_gains:
                prior_A = torch.ones_like(result.weights_A) if prior_A is None else prior_A
                result.weights_A = renormalise(prior_A * keep_A)
                self._tell_labels(space.upstream_NK[augmented_N], space, result)
            else:
                learned_AC = self._learn(rows, seen, space, keep_A, prior_A, result, primal)
                result.assignment_NC[augmented_N] = learned_AC.to(result.assignment_NC.dtype)
            weights_N[augmented_N] = result.weights_A.to(weights_N.dtype)
            if self.saflex is not None or self.upstream_filter != "none":
                self.selecting.update(result.weights_A)
        return result

    def _filter(self, logits_AC: Tensor | None, space: LabelSpace, generator: torch.Generator | None) -> Tensor:
        """Return which augmented rows a plain filter keeps."""
        upstream_AK = space.upstream_NK[space.augmented_N]
        if self.upstream_filter == "random":
            assert generator is not None, "the random filter needs a generator"
            kept_A = baselines.keep_at_random(len(upstream_AK), self.keep_fraction, generator).to(upstream_AK.device)
            keep_A = self.processes.as_gathered(kept_A)
        elif self.reads_logits:
            assert logits_AC is not None, "this filter looks at logits"
            logits_AK = logits_AC[:, space.first_columns()]  # repeated captions have equal logits: one column of each
            if self.upstream_filter == "argmax":
                keep_A = baselines.keep_where_argmax_agrees(logits_AK, upstream_AK.argmax(dim=1))
            else:
                losses_A = self.objective.row_losses(logits_AK, upstream_AK)
                keep_A = baselines.keep_lowest_losses(losses_A, self.keep_fraction)
        else:
            keep_A = torch.ones(len(upstream_AK), device=upstream_AK.device)
        return keep_A > 0

    def _learn(
        self,
        rows: Rows,
        seen: Outputs | None,
        space: LabelSpace,
        keep_A: Tensor,
        prior_A: Tensor | None,
        result: StepResult,
        primal: Products | None,
    ) -> Tensor:
        """Fill in weights and gains of the augmented rows; return their learned mass over the columns [A, C]."""
        assert self.saflex is not None
        saflex, network = self.saflex, self.network
        head = self.reads_features
        assert seen is not None or not head, "head scope starts from pooled features"
        # With batch statistics, or views told apart, a row's logits depend on the batch: they are taken in the joint one.
        joint = network.relates_rows or (not head and trains_statistics(network))
        inputs = seen.pooled_NF if seen is not None and head else rows.inputs[0 if joint else rows.num_train :]
        own_AC = None if seen is None or not len(seen.columns_CD) else own_logits(self.forward, network, seen, space)
        with evaluation_mode(network, but_statistics=joint):
            logits_AC, gains_AK = step_gains(
                network,
                saflex,
                inputs.detach(),
                space,
                self.processes.gather,
                gains_fn=self._gains,
                own_AC=own_AC,
                products=primal,
                rows_at_once=0 if head else self.rows_at_once,
                num_before=rows.num_train if joint else 0,
            )
        upstream_AK = space.upstream_NK[space.augmented_N]
        if saflex.settings.permute_gains:
            gains_AK = baselines.permuted_gains(gains_AK, upstream_AK, result.ids_A)
        classes_A = self.processes.gather(rows.labels_N)[space.augmented_N]
        agrees_A = space.inverse_C[logits_AC.argmax(dim=1)] == upstream_AK.argmax(dim=1)
        result.weights_A, labels_AK = saflex.solve(
            gains_AK,
            upstream_AK,
            keep_A=keep_A,
            prior_A=prior_A,
            candidates_AK=upstream_AK > 0 if prior_A is not None else None,
            agrees_A=agrees_A,
            classes_A=classes_A,
        )
        result.gains_A = (gains_AK * upstream_AK).sum(dim=1)
        self._tell_labels(labels_AK, space, result)
        return space.spread(labels_AK)

    def _tell_labels(self, labels_AK: Tensor, space: LabelSpace, result: StepResult) -> None:
        """Fill in the labels with the largest shares."""
        # a stable sort, so that of equal shares the first is on top, as argmax has it; topk promises no order
        shares_AK, order_AK = labels_AK.sort(dim=1, descending=True, stable=True)
        result.top_labels_AJ = space.labels_K[order_AK[:, :NUM_TOP_LABELS]]
        result.top_shares_AJ = shares_AK[:, :NUM_TOP_LABELS]

    def _gains(self, logits_AC: Tensor, tangent_AC: Tensor) -> Tensor:
        """Return the objective's gains, in the reading of the paper that the settings name."""
        gains_AC = self.objective.gains(logits_AC, tangent_AC)
        assert self.saflex is not None
        return probability_gains(logits_AC, gains_AC) if self.saflex.settings.gains_of == "prob" else gains_AC

    @contextmanager
    def recording(self, rows: Rows) -> Iterator[Products | None]:
        """Keep the matrix products of the pass within for the exact derivative, where they are of use."""
        deciding = self.saflex if self.saflex is not None and self.saflex.settings.needs_gains else None
        products = products_for(self.forward, self.network, deciding, rows)
        with products.recording() if products else nullcontext():
            yield products
