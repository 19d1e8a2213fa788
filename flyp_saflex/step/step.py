"""One training step: label space, forward pass, weights and labels of the augmented rows, loss.

FLYP's label space is the captions of the whole batch over all processes, so features are gathered with their gradient and
every process computes the same loss; averaged gradients are then those of one process with the whole batch.

A step is one pass (`_in_one_pass`), or two for the same loss and gradient: `skip_dropped.py` decides first and trains on the
kept rows; `gradcache.py` takes all features first and their backward passes a few rows at a time.

Shapes: N rows of all processes, S of them in a pass, A augmented, C columns, K labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flyp_saflex.saflex.objectives import Objective
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.augmented_rows import AugmentedRows, Filter, StepResult
from flyp_saflex.step.extra_terms import ExtraTerms
from flyp_saflex.step.gradcache import loss_in_parts
from flyp_saflex.step.skip_dropped import Selecting, loss_of_kept
from flyp_saflex.step.validation_gradient import Validation, ValidationGradient
from flyp_saflex.tasks.label_space import LabelSpace, Rows
from flyp_saflex.tasks.network import Outputs
from flyp_saflex.tasks.task import Processes, Task


class StepLoss:
    """Loss of a part of a step.

    Args:
        task: the model and its label spaces; derivatives are taken of its network.
        objective: the loss.
        forward: the network, possibly wrapped for several processes: passes with gradient go through it.
        saflex: None: weights one and the labels that rows came with.
        upstream_filter, keep_fraction: plain filters (baselines) of augmented rows.
        processes: how tensors meet.
        rows_at_once: rows per forward and backward pass, of training and validation; 0: a part's training rows all at once.
        selecting: whether to decide about augmented rows before training on them; None: never. Its running average is
            kept up to date here.
        terms: what is added to the objective; None: nothing.
    """

    def __init__(
        self,
        task: Task,
        objective: Objective,
        forward: Callable[..., Outputs] | None = None,
        *,
        saflex: Saflex | None = None,
        upstream_filter: Filter = "none",
        keep_fraction: float = 0.5,
        processes: Processes | None = None,
        rows_at_once: int = 0,
        selecting: Selecting | None = None,
        terms: ExtraTerms | None = None,
    ) -> None:
        self.terms = terms or ExtraTerms()
        self.task, self.objective, self.forward = task, objective, forward or task.network
        self.saflex = saflex
        self.processes, self.rows_at_once = processes or Processes(), rows_at_once
        self.selecting = selecting or Selecting("never")
        self.augmented = AugmentedRows(
            task.network,
            self.forward,
            objective=objective,
            saflex=saflex,
            upstream_filter=upstream_filter,
            keep_fraction=keep_fraction,
            processes=self.processes,
            rows_at_once=rows_at_once,
            selecting=self.selecting,
        )
        self.validation = None if saflex is None else ValidationGradient(task, objective, saflex, rows_at_once=rows_at_once)

    def __call__(self, rows: Rows, *, seed: int = 0, generator: torch.Generator | None = None) -> StepResult:
        """Return the loss of this part of the step.

        Args:
            rows: this process's rows.
            seed: of the step, for a random caption template of the classes.
            generator: of the `random` filter; seeded alike on every process.
        """
        space = self.terms.widened(self.task.label_space(rows, self.objective.over, seed, self.processes.gather), self.task)
        if self.rows_at_once and len(rows.inputs) > self.rows_at_once:
            return loss_in_parts(self, rows, space, generator)
        if self.selecting.on and bool(space.augmented_N.any()) and self.task.network.trains_rows():
            return loss_of_kept(self, rows, space, generator)
        return self._in_one_pass(rows, space, generator)

    def _in_one_pass(self, rows: Rows, space: LabelSpace, generator: torch.Generator | None) -> StepResult:
        # Step 1: logits of all rows over the columns.
        with self.augmented.recording(rows) as primal:
            out = self.forward(rows.inputs, space.tokens_UL)
        images_ND = self.processes.gather_features(out.images_ND)
        logits_NC = out.logits(images_ND, space.inverse_C)
        # Step 2, Eq. (9)-(11): weights and labels of the augmented rows.
        logits_AC = logits_NC.detach()[space.augmented_N]
        seen = out if self.task.network.relates_rows else out.rows_from(rows.num_train)
        result = self.augmented.decide(rows, seen, logits_AC, space, generator, primal)
        # Step 3, Eq. (7) or (14): the loss.
        result.loss = loss = self.loss_of(out, images_ND, logits_NC, result, rows, space)
        result.surrogates = [lambda: loss]
        return result

    def loss_of(
        self,
        out: Outputs,
        images_SD: Tensor,
        logits_SC: Tensor,
        result: StepResult,
        rows: Rows,
        space: LabelSpace,
        among_S: Tensor | None = None,
    ) -> Tensor:
        """Return the objective with the terms beside it.

        Args:
            out: of this process's pass.
            images_SD: embeddings of all processes' passes, S of the N rows.
            logits_SC: their logits.
            result: decisions about all rows.
            rows: this process's rows.
            space: of the step.
            among_S: places of the S rows among all; None: all.
        """
        assignment_SC, weights_S = result.assignment_NC, result.weights_N
        if among_S is not None:
            assignment_SC, weights_S = assignment_SC[among_S], weights_S[among_S]
        loss = self.objective.loss(logits_SC, assignment_SC, weights_S)
        return self.terms.added(
            loss,
            out,
            images_SD,
            logits_SC,
            weights_S,
            task=self.task,
            rows=rows,
            space=space,
            processes=self.processes,
            among_S=among_S,
            rows_at_once=self.rows_at_once,
        )

    def refresh(self, validation: Validation) -> torch.Tensor:
        """Take SAFLEX's validation gradient at the current parameters; return its norm, a scalar tensor."""
        assert self.validation is not None, "there is nothing to refresh without SAFLEX"
        return self.validation.refresh(validation)
