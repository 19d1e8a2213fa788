"""One training step: columns, SAFLEX's weights and labels, loss (floor 2: tensors; devices and processes are the caller's).

FLYP's columns are the captions of the whole batch over all processes, so features are gathered with their gradient and
every process computes the same loss; averaged gradients are then those of one process with the whole batch.

Shapes: N rows of all processes, A of them augmented, C columns, K label choices (distinct captions, or classes),
V validation rows, D embedding, F pooled width, L tokens, J labels that are logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from flyp_saflex.method import baselines, gains, losses
from flyp_saflex.method.estimators import CHECK_ROWS
from flyp_saflex.method.learner import Learner, Outputs
from flyp_saflex.method.saflex import Saflex

Proxies = Literal["captions", "batch"]
Filter = Literal["none", "scores", "argmax", "lowest-loss", "random"]
NUM_TOP_LABELS = 5
"""How many of a learned label's classes are told; the others are rarely worth a look."""


@dataclass
class Rows:
    """One process's rows of a part of a step; N and A are local here. Training rows come first.

    Attributes:
        inputs: what the learner's image tower takes.
        captions_N: caption id of every row.
        labels_N: class index of every row.
        ids_N: identity of an augmented row (index of the edit or sample), for states kept between visits.
        num_train: T.
        partners_N, partner_labels_N, share_N: Mixup and CutMix: the other caption and class, and the part of the row's
            label that stays its own; None without mixing.
    """

    inputs: Tensor
    captions_N: Tensor
    labels_N: Tensor
    ids_N: Tensor
    num_train: int
    partners_N: Tensor | None = None
    partner_labels_N: Tensor | None = None
    share_N: Tensor | None = None


@dataclass(frozen=True)
class Processes:
    """How tensors meet across processes; the defaults serve a single one.

    Attributes:
        gather: concatenation of every process's tensor, without gradient.
        gather_features: the same with gradient to every process.
    """

    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gather_features: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass
class StepResult:
    """Loss of a part of a step, and what was decided about its augmented rows (over all processes).

    Attributes:
        loss: scalar with gradient.
        ids_A, weights_A: identity and weight of the augmented rows.
        gains_A: gain of the label that each came with; None without SAFLEX.
        top_labels_AJ: the labels with the largest learned shares, the largest first, as caption ids (or classes).
        top_shares_AJ: their shares; J is at most `NUM_TOP_LABELS`.
    """

    loss: Tensor
    ids_A: Tensor
    weights_A: Tensor
    gains_A: Tensor | None = None
    top_labels_AJ: Tensor | None = None
    top_shares_AJ: Tensor | None = None


@dataclass
class Validation:
    """SAFLEX's validation rows of one refresh: inputs [V, ...], class labels [V], caption ids [V].

    With `slots_V` the rows renew these slots of the object's `ValidationBank`, and the gradient is that of the whole bank.
    """

    inputs: Tensor
    labels_V: Tensor
    captions_V: Tensor
    slots_V: Tensor | None = None


class StepLoss:
    """Computes the loss of a part of a step.

    Args:
        learner: the bare module (for derivatives); the forward pass with gradient goes through `forward`.
        forward: the learner, possibly wrapped for several processes.
        caption_tokens_ML: tokens of every caption that can occur, by caption id.
        class_captions_K: caption ids of the classes (first template): columns of the validation loss.
        contrastive: FLYP; otherwise cross entropy over `columns` (class captions or the linear head's classes).
        proxies: FLYP's columns.
        saflex: None: weights one and the labels that rows came with.
        upstream_filter, keep_fraction: plain filters (baselines) of augmented rows.
        processes: how tensors meet.
        rows_at_once: validation rows per forward pass.
    """

    def __init__(
        self,
        learner: Learner,
        forward: Callable[..., Outputs],
        *,
        caption_tokens_ML: Tensor,
        class_captions_K: Tensor,
        contrastive: bool = True,
        proxies: Proxies = "captions",
        saflex: Saflex | None = None,
        upstream_filter: Filter = "none",
        keep_fraction: float = 0.5,
        processes: Processes | None = None,
        rows_at_once: int = 256,
    ) -> None:
        self.learner, self.forward = learner, forward
        self.caption_tokens_ML, self.class_captions_K = caption_tokens_ML, class_captions_K
        self.same_M = first_with_equal_tokens(caption_tokens_ML)
        self.contrastive, self.proxies, self.saflex = contrastive, proxies, saflex
        self.upstream_filter, self.keep_fraction = upstream_filter, keep_fraction
        self.processes, self.rows_at_once = processes or Processes(), rows_at_once

    def __call__(
        self, rows: Rows, *, class_columns_K: Tensor | None = None, generator: torch.Generator | None = None
    ) -> StepResult:
        """Return the loss of this part of the step.

        Args:
            rows: this process's rows.
            class_columns_K: caption ids that are the columns of cross entropy with a text head, one per class.
            generator: of the `random` filter; seeded alike on every process.
        """
        columns = self._columns(rows, class_columns_K)
        out = self.forward(rows.inputs, columns.tokens_UL)
        images_ND = self.processes.gather_features(out.images_ND)
        logits_NC = out.logits(images_ND, columns.inverse_C)
        num_rows = len(logits_NC)

        if self.contrastive and self.proxies == "batch" and rows.partners_N is None:
            assignment_NC = torch.eye(num_rows, device=logits_NC.device)
        else:
            assignment_NC = losses.spread_over_columns(columns.upstream_NK, columns.choices_K, columns.columns_C)
        augmented_N = columns.augmented_N
        weights_N = torch.ones(num_rows, device=logits_NC.device)
        result = StepResult(logits_NC, self.processes.gather(rows.ids_N)[augmented_N], weights_N[augmented_N])
        if bool(augmented_N.any()):
            keep_A = self._filter(logits_NC.detach()[augmented_N], columns, generator)
            if self.saflex is None:
                result.weights_A = keep_A.to(weights_N.dtype)
            else:
                learned_AC = self._learn(rows, out, logits_NC.detach(), columns, keep_A, result)
                assignment_NC[augmented_N] = learned_AC.to(assignment_NC.dtype)
            weights_N[augmented_N] = result.weights_A.to(weights_N.dtype)
        loss_fn = losses.clip_loss if self.contrastive else losses.soft_cross_entropy
        result.loss = loss_fn(logits_NC, assignment_NC, weights_N)
        return result

    def refresh(self, validation: Validation) -> Tensor:
        """Take SAFLEX's validation gradient at the current parameters; return its norm, a scalar tensor.

        In head scope the image features are computed in parts of `rows_at_once` and their gradient at once. That of all
        parameters is taken in such parts where the loss is a mean over rows; the contrastive loss of
        `validation_loss = "train"` is one part whatever its size.
        """
        assert self.saflex is not None, "there is nothing to refresh without SAFLEX"
        settings, head = self.saflex.settings, self.saflex.settings.scope == "head"
        parameters = self.learner.parameters_in(settings.scope)
        inputs, labels_V, captions_V = validation.inputs, validation.labels_V, validation.captions_V
        with self._evaluation_mode():
            if head:
                with torch.no_grad():
                    inputs = torch.cat([self.learner.tower.upper(few) for few in inputs.split(self.rows_at_once)])
                if validation.slots_V is not None:
                    inputs, labels_V, captions_V = self.saflex.bank.renew(validation.slots_V, inputs, labels_V, captions_V)
            num_rows = len(labels_V)
            part = num_rows if head or settings.validation_loss == "train" else self.rows_at_once
            total: dict[str, Tensor] = {}
            for start in range(0, num_rows, part):
                chosen = slice(start, start + part)
                newest = gains.gradient(self._validation_loss(inputs[chosen], labels_V[chosen], captions_V[chosen]), parameters)
                share = len(labels_V[chosen]) / num_rows
                if share < 1:
                    newest = {name: share * value for name, value in newest.items()}
                total = {name: total[name] + value for name, value in newest.items()} if total else newest
        return self.saflex.update(total)

    def _columns(self, rows: Rows, class_columns_K: Tensor | None) -> _Columns:
        gather = self.processes.gather
        own_N = self.same_M[rows.captions_N] if self.contrastive else rows.labels_N
        local_augmented_N = torch.arange(len(own_N), device=own_N.device) >= rows.num_train
        augmented_N = gather(local_augmented_N.long()).bool()
        own_N = gather(own_N)
        mixed = rows.partners_N is not None and rows.partner_labels_N is not None and rows.share_N is not None
        if mixed:
            assert rows.partners_N is not None
            assert rows.partner_labels_N is not None
            assert rows.share_N is not None
            partner_N = gather(self.same_M[rows.partners_N] if self.contrastive else rows.partner_labels_N)
            share_N1 = gather(rows.share_N)[:, None]
        if self.contrastive:
            choices_K = torch.unique(torch.cat([own_N, partner_N]) if mixed else own_N)
            columns_C = own_N if self.proxies == "batch" and not mixed else choices_K
            inverse_C = torch.searchsorted(choices_K, columns_C)
            tokens_UL = self.caption_tokens_ML[choices_K]
        else:
            choices_K = columns_C = inverse_C = torch.arange(len(self.class_captions_K), device=own_N.device)
            captions_K = self.class_captions_K if class_columns_K is None else class_columns_K
            tokens_UL = self.caption_tokens_ML[captions_K]
        upstream_NK = losses.assignment(own_N, choices_K)
        if mixed:
            upstream_NK = share_N1 * upstream_NK + (1 - share_N1) * losses.assignment(partner_N, choices_K)
        return _Columns(choices_K, columns_C, inverse_C, tokens_UL, upstream_NK, augmented_N)

    def _filter(self, logits_AC: Tensor, columns: _Columns, generator: torch.Generator | None) -> Tensor:
        """Return which augmented rows a plain filter keeps."""
        upstream_AK = columns.upstream_NK[columns.augmented_N]
        first_K = (columns.columns_C[None, :] == columns.choices_K[:, None]).long().argmax(dim=1)
        logits_AK = logits_AC[:, first_K]  # repeated captions have equal logits: one column of each
        if self.upstream_filter == "argmax":
            keep_A = baselines.keep_where_argmax_agrees(logits_AK, upstream_AK.argmax(dim=1))
        elif self.upstream_filter == "lowest-loss":
            losses_A = -(upstream_AK * logits_AK.log_softmax(dim=1)).sum(dim=1)
            keep_A = baselines.keep_lowest_losses(losses_A, self.keep_fraction)
        elif self.upstream_filter == "random":
            assert generator is not None, "the random filter needs a generator"
            keep_A = baselines.keep_at_random(len(logits_AC), self.keep_fraction, generator).to(logits_AC.device)
        else:
            keep_A = torch.ones(len(logits_AC), device=logits_AC.device)
        return keep_A > 0

    def _learn(
        self, rows: Rows, out: Outputs, logits_NC: Tensor, columns: _Columns, keep_A: Tensor, result: StepResult
    ) -> Tensor:
        """Fill in weights and gains of the augmented rows; return their learned mass over the columns [A, C]."""
        assert self.saflex is not None
        saflex, learner, first = self.saflex, self.learner, rows.num_train
        head, gather = saflex.settings.scope == "head", self.processes.gather
        inputs = (out.pooled_NF if head else rows.inputs)[first:].detach()
        parameters = learner.parameters_in(saflex.settings.scope)

        def logits_of(inputs: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
            def logits_fn(parameters: dict[str, Tensor]) -> Tensor:
                arguments = (inputs, columns.tokens_UL)
                outputs = functional_call(learner, parameters, arguments, {"from_pooled": head}, tie_weights=False)
                return outputs.logits(columns_C=columns.inverse_C)

            return logits_fn

        def gains_of(derivative: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            values_AC, tangent_AC = (gather(part) for part in derivative)
            gains_AC = gains.gains(values_AC, tangent_AC)
            return values_AC, losses.average_over_columns(gains_AC, columns.choices_K, columns.columns_C)

        def few(values: Tensor) -> Tensor:  # the first rows of every process
            return values.unflatten(0, (-1, len(inputs)))[:, :CHECK_ROWS].flatten(0, 1)

        upstream_AK = columns.upstream_NK[columns.augmented_N]
        own_AC = self._own_logits(out, first, columns)
        with self._evaluation_mode():
            logits_AC, gains_AK = gains_of(saflex.tangent(logits_of(inputs), parameters, own_AC))
            if saflex.watch.due(saflex.estimator_for(parameters)):
                exact = saflex.tangent(logits_of(inputs[:CHECK_ROWS]), parameters, estimator="exact")
                if saflex.watch.compare(few(gains_AK), gains_of(exact)[1], few(upstream_AK)):
                    logits_AC, gains_AK = gains_of(saflex.tangent(logits_of(inputs), parameters))
        classes_A = gather(rows.labels_N)[columns.augmented_N]
        agrees_A = columns.inverse_C[logits_AC.argmax(dim=1)] == upstream_AK.argmax(dim=1)
        result.weights_A, labels_AK = saflex.solve(gains_AK, upstream_AK, keep_A=keep_A, agrees_A=agrees_A, classes_A=classes_A)
        result.gains_A = (gains_AK * upstream_AK).sum(dim=1)
        # a stable sort, so that of equal shares the first is on top, as argmax has it; topk promises no order
        shares_AK, order_AK = labels_AK.sort(dim=1, descending=True, stable=True)
        result.top_labels_AJ = columns.choices_K[order_AK[:, :NUM_TOP_LABELS]]
        result.top_shares_AJ = shares_AK[:, :NUM_TOP_LABELS]
        return losses.spread_over_columns(labels_AK, columns.choices_K, columns.columns_C)

    def _own_logits(self, out: Outputs, first: int, columns: _Columns) -> Tensor | None:
        """Return this pass's logits of this process's augmented rows; None if evaluation mode is another function."""
        if getattr(self.forward, "module", self.forward) is not self.learner or not self.learner.acts_as_evaluated():
            return None  # a compiled forward rounds differently: as much as a finite difference is
        with torch.no_grad():
            return out.logits(out.images_ND[first:], columns.inverse_C)

    def _validation_loss(self, inputs: Tensor, labels_V: Tensor, captions_V: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        assert self.saflex is not None
        settings = self.saflex.settings
        as_trained = settings.validation_loss == "train" and self.contrastive
        captions_V = self.same_M[captions_V]
        choices_K = torch.unique(captions_V) if as_trained else self.class_captions_K
        tokens_KL = self.caption_tokens_ML[choices_K]

        def loss_fn(parameters: dict[str, Tensor]) -> Tensor:
            arguments = (inputs, tokens_KL)
            outputs = functional_call(
                self.learner, parameters, arguments, {"from_pooled": settings.scope == "head"}, tie_weights=False
            )
            logits_VK = outputs.logits()
            if as_trained:
                columns_C, assignment_VC = losses.proxy_columns(captions_V, self.proxies)
                return losses.clip_loss(logits_VK[:, torch.searchsorted(choices_K, columns_C)], assignment_VC)
            name = "ce" if settings.validation_loss == "train" else settings.validation_loss
            return losses.VALIDATION_LOSSES[name](logits_VK, labels_V)

        return loss_fn

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Differentiate the function that will be used: no dropout, running statistics."""
        modes = [(module, module.training) for module in self.learner.modules()]
        self.learner.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def first_with_equal_tokens(tokens_ML: Tensor) -> Tensor:
    """Return, for every caption, the first one that reads the same to the text tower.

    Captions that differ in case only (iWildCam has "Lowland paca" and "lowland paca") are one proxy class: as two, their
    logits would tie and push against each other for nothing.
    """
    _, inverse_M = torch.unique(tokens_ML, dim=0, return_inverse=True)
    ids_M = torch.arange(len(tokens_ML), device=tokens_ML.device)
    first_U = torch.full_like(ids_M, len(ids_M)).scatter_reduce(0, inverse_M, ids_M, "amin")
    return first_U[inverse_M]


@dataclass
class _Columns:
    """Columns of a step, over all processes.

    Attributes:
        choices_K: what a label can be: distinct caption ids, or classes.
        columns_C: the choice that every column of the loss stands for.
        inverse_C: row of `tokens_UL` of every column.
        tokens_UL: tokens to encode, each distinct caption once (U = K).
        upstream_NK: labels that the rows came with.
        augmented_N: which rows are augmented.
    """

    choices_K: Tensor
    columns_C: Tensor
    inverse_C: Tensor
    tokens_UL: Tensor
    upstream_NK: Tensor
    augmented_N: Tensor
