"""Validation gradient of SAFLEX: the loss of validation rows, differentiated in evaluation mode.

Shapes: V validation rows, K classes, U texts, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import one_hot

from flyp_saflex.saflex import jvp, losses
from flyp_saflex.saflex.modes import evaluation_mode
from flyp_saflex.saflex.objectives import Objective
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step import gradcache
from flyp_saflex.tasks.network import Outputs
from flyp_saflex.tasks.task import Task

ROWS_AT_ONCE = 256
"""Validation rows per forward pass where the training rows are taken all at once."""


@dataclass
class Validation:
    """Validation rows of one refresh: inputs [V, ...], class labels [V], caption ids [V].

    With `slots_V` the rows renew these slots of SAFLEX's `ValidationBank`, and the gradient is that of the whole bank.
    """

    inputs: Tensor
    labels_V: Tensor
    captions_V: Tensor
    slots_V: Tensor | None = None


class ValidationGradient:
    """Validation gradients at the current parameters, handed to SAFLEX's running average.

    Args:
        task: the model and its label spaces.
        objective: the training loss, which `validation_loss = "train"` takes.
        saflex: settings, average and bank.
        rows_at_once: rows per pass; 0: `ROWS_AT_ONCE`.
    """

    def __init__(self, task: Task, objective: Objective, saflex: Saflex, *, rows_at_once: int = 0) -> None:
        self.task, self.objective, self.saflex, self.rows_at_once = task, objective, saflex, rows_at_once

    @property
    def _among_rows(self) -> bool:
        """Whether the validation rows are told apart from each other, so that they are one part."""
        return self.objective.over == "views" or (
            self.saflex.settings.validation_loss == "train" and self.objective.over == "captions"
        )

    def refresh(self, validation: Validation) -> Tensor:
        """Take the gradient and add it to the running average; return its norm, a scalar tensor.

        In head scope the features are computed in parts of `rows_at_once`, their gradient at once. That of all parameters is
        taken in such parts where the loss is a mean over rows. The contrastive loss of `validation_loss = "train"` is one
        part whatever its size; with `rows_at_once` its passes are in parts all the same.
        """
        settings, head = self.saflex.settings, self.saflex.settings.scope == "head"
        network = self.task.network
        parameters = network.parameters_in(settings.scope)
        inputs, labels_V, captions_V = validation.inputs, validation.labels_V, validation.captions_V
        at_once = self.rows_at_once or ROWS_AT_ONCE
        total: dict[str, Tensor] = {}
        with evaluation_mode(network):
            if head:
                with torch.no_grad():
                    inputs = torch.cat([network.pool(few) for few in inputs.split(at_once)])
                if validation.slots_V is not None:
                    inputs, labels_V, captions_V = self.saflex.bank.renew(validation.slots_V, inputs, labels_V, captions_V)
            num_rows = len(labels_V)
            part = num_rows if head or self._among_rows else at_once
            for start in range(0, num_rows, part):
                few = slice(start, start + part)
                tokens_UL, loss_of = self._loss(labels_V[few], captions_V[few])
                if not head and self.rows_at_once and len(inputs[few]) > at_once:
                    found = gradcache.gradient_in_parts(network, inputs[few], tokens_UL, loss_of, parameters, at_once)
                else:
                    found = jvp.gradient(partial(self._loss_at, inputs[few], tokens_UL, loss_of), parameters)
                share = len(inputs[few]) / num_rows
                if share < 1:
                    found = {name: share * value for name, value in found.items()}
                total = {name: total[name] + value for name, value in found.items()} if total else found
        return self.saflex.update(total)

    def _loss(self, labels_V: Tensor, captions_V: Tensor) -> tuple[Tensor, Callable[[Outputs], Tensor]]:
        """Return the texts of the validation rows' label space, and their loss as a function of outputs."""
        name = self.saflex.settings.validation_loss
        if self._among_rows:
            space = self.task.validation_space(captions_V)
            partners_V, ones_V = space.assignment_VC.argmax(dim=1), torch.ones_like(space.assignment_VC[:, 0])
            if name != "train":
                loss_fn = losses.VALIDATION_LOSSES[name]
                return space.tokens_UL, lambda out: loss_fn(out.logits()[:, space.inverse_C], partners_V)
            return space.tokens_UL, lambda out: self.objective.loss(out.logits()[:, space.inverse_C], space.assignment_VC, ones_V)
        if name == "train":
            return self.task.class_tokens(), partial(self._class_loss, labels_V)
        return self.task.class_tokens(), lambda out: losses.VALIDATION_LOSSES[name](out.logits(), labels_V)

    def _class_loss(self, labels_V: Tensor, outputs: Outputs) -> Tensor:
        logits_VK = outputs.logits()
        labels_VK = one_hot(labels_V, logits_VK.shape[1]).to(logits_VK.dtype)
        return self.objective.loss(logits_VK, labels_VK, torch.ones_like(logits_VK[:, 0]))

    def _loss_at(
        self, inputs: Tensor, tokens_UL: Tensor, loss_of: Callable[[Outputs], Tensor], parameters: dict[str, Tensor]
    ) -> Tensor:
        options = {"from_pooled": self.saflex.settings.scope == "head"}
        return loss_of(functional_call(self.task.network, parameters, (inputs, tokens_UL), options, tie_weights=False))
