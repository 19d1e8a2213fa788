"""One training step: columns, SAFLEX's weights and labels, loss (floor 2: tensors; devices and processes are the caller's).

FLYP's columns are the captions of the whole batch over all processes, so features are gathered with their gradient and
every process computes the same loss; averaged gradients are then those of one process with the whole batch.

A step is one pass (forward, decide about the augmented rows, loss), or two (`two_pass.py`), for the same loss and gradient:
decide first and train on the kept rows, or all features first and their backward passes a few rows at a time.

Shapes: N rows of all processes, A of them augmented, S chosen for the pass with gradient, C columns, K label choices
(distinct captions, or classes), V validation rows, D embedding, F pooled width, L tokens, J labels that are logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from flyp_saflex.saflex import baselines, jvp, losses
from flyp_saflex.saflex.primal_cache import Products
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step import gradcache, step_gains
from flyp_saflex.tasks.clip_task import Learner, Outputs
from flyp_saflex.tasks.proxy_classes import Columns, Proxies, Rows, caption_columns, class_columns, first_with_equal_tokens

Filter = Literal["none", "scores", "argmax", "lowest-loss", "random"]
NUM_TOP_LABELS = 5
"""How many of a learned label's classes are told; the others are rarely worth a look."""
VALIDATION_ROWS_AT_ONCE = 256
"""Validation rows per forward pass where the training rows are taken all at once."""


@dataclass(frozen=True)
class Processes:
    """How tensors meet across processes; the defaults serve a single one.

    Attributes:
        gather: concatenation of every process's tensor, without gradient.
        gather_features: the same with gradient to every process.
        rank: whose part of a concatenation is this process's own.
    """

    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gather_features: Callable[[Tensor], Tensor] = lambda tensor: tensor
    rank: int = 0


@dataclass
class StepResult:
    """Loss of a part of a step, and what was decided about its augmented rows (over all processes).

    Attributes:
        loss: scalar; its gradient is to be had through `surrogates`.
        ids_A, weights_A: identity and weight of the augmented rows.
        gains_A: gain of the label that each came with; None without SAFLEX.
        top_labels_AJ: the labels with the largest learned shares, the largest first, as caption ids (or classes).
        top_shares_AJ: their shares; J is at most `NUM_TOP_LABELS`.
        surrogates: functions of no arguments that return scalars whose gradients add up to the loss' own: the loss, or in
            parts. Call one, go backward, call the next: each makes its own forward pass.
        selected: whether rows of weight zero were left out of the pass with gradient.
    """

    loss: Tensor
    ids_A: Tensor
    weights_A: Tensor
    gains_A: Tensor | None = None
    top_labels_AJ: Tensor | None = None
    top_shares_AJ: Tensor | None = None
    surrogates: list[Callable[[], Tensor]] = field(default_factory=list)
    selected: bool = False


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
        rows_at_once: rows per forward and backward pass, of training and validation; 0: a part's training rows all at once.
        selecting: whether to decide about augmented rows before training on them; None: never. Its running average is
            kept up to date here.
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
        rows_at_once: int = 0,
        selecting: gradcache.Selecting | None = None,
    ) -> None:
        self.learner, self.forward = learner, forward
        self.caption_tokens_ML, self.class_captions_K = caption_tokens_ML, class_captions_K
        self.same_M = first_with_equal_tokens(caption_tokens_ML)
        self.contrastive, self.proxies, self.saflex = contrastive, proxies, saflex
        self.upstream_filter, self.keep_fraction = upstream_filter, keep_fraction
        self.processes, self.rows_at_once = processes or Processes(), rows_at_once
        self.selecting = selecting or gradcache.Selecting("never")

    def __call__(
        self, rows: Rows, *, class_columns_K: Tensor | None = None, generator: torch.Generator | None = None
    ) -> StepResult:
        """Return the loss of this part of the step.

        Args:
            rows: this process's rows.
            class_columns_K: caption ids that are the columns of cross entropy with a text head, one per class.
            generator: of the `random` filter; seeded alike on every process.
        """
        gather = self.processes.gather
        if self.contrastive:
            columns = caption_columns(rows, self.caption_tokens_ML, self.same_M, self.proxies, gather)
        else:
            captions_K = self.class_captions_K if class_columns_K is None else class_columns_K
            columns = class_columns(rows, self.caption_tokens_ML[captions_K], gather)
        if self.rows_at_once and len(rows.inputs) > self.rows_at_once:
            return self._in_parts(rows, columns, generator)
        if self.selecting.on and bool(columns.augmented_N.any()) and gradcache.trains_images(self.learner):
            return self._select_then_train(rows, columns, generator)
        with self._recording(rows) as products:
            out = self.forward(rows.inputs, columns.tokens_UL)
        logits_NC = out.logits(self.processes.gather_features(out.images_ND), columns.inverse_C)
        logits_AC = logits_NC.detach()[columns.augmented_N]
        seen = out.rows_from(rows.num_train)
        result, assignment_NC, weights_N = self._decide(rows, seen, logits_AC, columns, generator, products)
        result.loss = loss = self._loss(logits_NC, assignment_NC, weights_N)
        result.surrogates = [lambda: loss]
        return result

    def _select_then_train(self, rows: Rows, columns: Columns, generator: torch.Generator | None) -> StepResult:
        """Decide from a pass without gradient over the augmented images; train on the training rows and the kept ones.

        Texts that the decision reads are read with gradient at once, and not again.
        """
        judged = self.upstream_filter in ("argmax", "lowest-loss")
        seen, logits_AC, products = None, None, None
        if judged or (self.saflex is not None and self.saflex.settings.scope == "head"):
            images = gradcache.features(self.forward, self.learner, rows.inputs[rows.num_train :], columns.tokens_UL[:0])
            with self._recording(rows) as products:
                seen = self.forward(images.pooled_NF, columns.tokens_UL, from_pooled=True)
            logits_AC = self.processes.gather(seen.logits(columns_C=columns.inverse_C).detach()) if judged else None
        result, assignment_NC, weights_N = self._decide(rows, seen, logits_AC, columns, generator, products)
        chosen_S, among_all_S = gradcache.chosen_rows(weights_N, len(rows.inputs), self.processes.rank)
        out = self.forward(rows.inputs[chosen_S], columns.tokens_UL if seen is None else columns.tokens_UL[:0])
        if seen is not None:
            out = out._replace(columns_CD=seen.columns_CD)
        logits_SC = out.logits(self.processes.gather_features(out.images_ND), columns.inverse_C)
        result.loss = loss = self._loss(logits_SC, assignment_NC[among_all_S], weights_N[among_all_S])
        result.surrogates, result.selected = [lambda: loss], True
        return result

    def _in_parts(self, rows: Rows, columns: Columns, generator: torch.Generator | None) -> StepResult:
        """Take the loss and its gradient at the features of all rows; leave the towers' backward passes to `surrogates`."""
        features = gradcache.leaves(
            gradcache.features(self.forward, self.learner, rows.inputs, columns.tokens_UL, self.rows_at_once)
        )
        logits_NC = features.logits(self.processes.gather_features(features.images_ND), columns.inverse_C)
        logits_AC = logits_NC.detach()[columns.augmented_N]
        seen = features.rows_from(rows.num_train)
        result, assignment_NC, weights_N = self._decide(rows, seen, logits_AC, columns, generator)
        loss = self._loss(logits_NC, assignment_NC, weights_N)
        gradient = gradcache.gradients(loss, features)
        kept_N = weights_N.view(-1, len(rows.inputs))[self.processes.rank] > 0
        chosen_S = kept_N.nonzero()[:, 0] if bool(kept_N.any()) else torch.zeros(1, dtype=torch.long, device=kept_N.device)
        result.loss = loss.detach()
        result.surrogates = gradcache.surrogates(
            self.forward, self.learner, rows.inputs, chosen_S, columns.tokens_UL, gradient, self.rows_at_once
        )
        result.selected = bool(columns.augmented_N.any())
        return result

    def _loss(self, logits_NC: Tensor, assignment_NC: Tensor, weights_N: Tensor) -> Tensor:
        loss_fn = losses.clip_loss if self.contrastive else losses.soft_cross_entropy
        return loss_fn(logits_NC, assignment_NC, weights_N)

    def _decide(
        self,
        rows: Rows,
        seen: Outputs | None,
        logits_AC: Tensor | None,
        columns: Columns,
        generator: torch.Generator | None,
        products: Products | None = None,
    ) -> tuple[StepResult, Tensor, Tensor]:
        """Return what is decided about the augmented rows, all rows' mass over the columns [N, C], and their weights [N].

        Args:
            rows: this process's rows.
            seen: what the learner made of its augmented rows; head scope starts from the pooled features.
            logits_AC: logits of all processes' augmented rows without gradient; None where no filter looks at them.
            columns: of the step.
            generator: of the `random` filter.
            products: of the pass that made `seen`, if they are of use.
        """
        augmented_N = columns.augmented_N
        if self.contrastive and self.proxies == "batch" and rows.partners_N is None:
            assignment_NC = torch.eye(len(augmented_N), device=augmented_N.device)
        else:
            assignment_NC = columns.upstream_assignment()
        weights_N = torch.ones(len(augmented_N), device=augmented_N.device)
        result = StepResult(weights_N.new_zeros(()), self.processes.gather(rows.ids_N)[augmented_N], weights_N[augmented_N])
        if bool(augmented_N.any()):
            keep_A = self._filter(logits_AC, columns, generator)
            if self.saflex is None:
                result.weights_A = keep_A.to(weights_N.dtype)
            else:
                learned_AC = self._learn(rows, seen, columns, keep_A, result, products)
                assignment_NC[augmented_N] = learned_AC.to(assignment_NC.dtype)
            weights_N[augmented_N] = result.weights_A.to(weights_N.dtype)
            if self.saflex is not None or self.upstream_filter != "none":
                self.selecting.update(result.weights_A)
        return result, assignment_NC, weights_N

    def refresh(self, validation: Validation) -> Tensor:
        """Take SAFLEX's validation gradient at the current parameters; return its norm, a scalar tensor.

        In head scope the image features are computed in parts of `rows_at_once`, their gradient at once. That of all
        parameters is taken in such parts where the loss is a mean over rows. The contrastive loss of
        `validation_loss = "train"` is one part whatever its size; with `rows_at_once` its passes are in parts all the same.
        """
        assert self.saflex is not None, "there is nothing to refresh without SAFLEX"
        settings, head = self.saflex.settings, self.saflex.settings.scope == "head"
        parameters = self.learner.parameters_in(settings.scope)
        inputs, labels_V, captions_V = validation.inputs, validation.labels_V, validation.captions_V
        at_once = self.rows_at_once or VALIDATION_ROWS_AT_ONCE
        total: dict[str, Tensor] = {}
        with self._evaluation_mode():
            if head:
                with torch.no_grad():
                    inputs = torch.cat([self.learner.tower.upper(few) for few in inputs.split(at_once)])
                if validation.slots_V is not None:
                    inputs, labels_V, captions_V = self.saflex.bank.renew(validation.slots_V, inputs, labels_V, captions_V)
            num_rows = len(labels_V)
            part = num_rows if head or (settings.validation_loss == "train" and self.contrastive) else at_once
            for start in range(0, num_rows, part):
                few = slice(start, start + part)
                tokens_KL, loss_of = self._validation_loss(labels_V[few], captions_V[few])
                if not head and self.rows_at_once and len(inputs[few]) > at_once:
                    found = gradcache.gradient_in_parts(self.learner, inputs[few], tokens_KL, loss_of, parameters, at_once)
                else:
                    found = jvp.gradient(partial(self._loss_at, inputs[few], tokens_KL, loss_of), parameters)
                share = len(inputs[few]) / num_rows
                if share < 1:
                    found = {name: share * value for name, value in found.items()}
                total = {name: total[name] + value for name, value in found.items()} if total else found
        return self.saflex.update(total)

    def _filter(self, logits_AC: Tensor | None, columns: Columns, generator: torch.Generator | None) -> Tensor:
        """Return which augmented rows a plain filter keeps."""
        upstream_AK = columns.upstream_NK[columns.augmented_N]
        if self.upstream_filter == "random":
            assert generator is not None, "the random filter needs a generator"
            keep_A = baselines.keep_at_random(len(upstream_AK), self.keep_fraction, generator).to(upstream_AK.device)
        elif self.upstream_filter in ("argmax", "lowest-loss"):
            assert logits_AC is not None, "this filter looks at logits"
            first_K = (columns.columns_C[None, :] == columns.choices_K[:, None]).long().argmax(dim=1)
            logits_AK = logits_AC[:, first_K]  # repeated captions have equal logits: one column of each
            if self.upstream_filter == "argmax":
                keep_A = baselines.keep_where_argmax_agrees(logits_AK, upstream_AK.argmax(dim=1))
            else:
                losses_A = -(upstream_AK * logits_AK.log_softmax(dim=1)).sum(dim=1)
                keep_A = baselines.keep_lowest_losses(losses_A, self.keep_fraction)
        else:
            keep_A = torch.ones(len(upstream_AK), device=upstream_AK.device)
        return keep_A > 0

    def _learn(
        self,
        rows: Rows,
        seen: Outputs | None,
        columns: Columns,
        keep_A: Tensor,
        result: StepResult,
        products: Products | None,
    ) -> Tensor:
        """Fill in weights and gains of the augmented rows; return their learned mass over the columns [A, C]."""
        assert self.saflex is not None
        saflex, learner = self.saflex, self.learner
        head = saflex.settings.scope == "head"
        assert seen is not None or not head, "head scope starts from pooled features"
        inputs = seen.pooled_NF if seen is not None and head else rows.inputs[rows.num_train :]
        own_AC = None if seen is None or not len(seen.columns_CD) else step_gains.own_logits(self.forward, learner, seen, columns)
        with self._evaluation_mode():
            logits_AC, gains_AK = step_gains.step_gains(
                learner,
                saflex,
                inputs.detach(),
                columns,
                self.processes.gather,
                own_AC=own_AC,
                products=products,
                rows_at_once=0 if head else self.rows_at_once,
            )
        upstream_AK = columns.upstream_NK[columns.augmented_N]
        if saflex.settings.permute_gains:
            gains_AK = baselines.permuted_gains(gains_AK, upstream_AK, result.ids_A)
        classes_A = self.processes.gather(rows.labels_N)[columns.augmented_N]
        agrees_A = columns.inverse_C[logits_AC.argmax(dim=1)] == upstream_AK.argmax(dim=1)
        result.weights_A, labels_AK = saflex.solve(gains_AK, upstream_AK, keep_A=keep_A, agrees_A=agrees_A, classes_A=classes_A)
        result.gains_A = (gains_AK * upstream_AK).sum(dim=1)
        # a stable sort, so that of equal shares the first is on top, as argmax has it; topk promises no order
        shares_AK, order_AK = labels_AK.sort(dim=1, descending=True, stable=True)
        result.top_labels_AJ = columns.choices_K[order_AK[:, :NUM_TOP_LABELS]]
        result.top_shares_AJ = shares_AK[:, :NUM_TOP_LABELS]
        return losses.spread_over_columns(labels_AK, columns.choices_K, columns.columns_C)

    def _validation_loss(self, labels_V: Tensor, captions_V: Tensor) -> tuple[Tensor, Callable[[Outputs], Tensor]]:
        """Return the texts that validation rows are held against, and the loss of what the learner makes of both."""
        assert self.saflex is not None
        settings = self.saflex.settings
        as_trained = settings.validation_loss == "train" and self.contrastive
        captions_V = self.same_M[captions_V]
        choices_K = torch.unique(captions_V) if as_trained else self.class_captions_K

        def loss_of(outputs: Outputs) -> Tensor:
            if as_trained:
                columns_C, assignment_VC = losses.proxy_columns(captions_V, self.proxies)
                return losses.clip_loss(outputs.logits()[:, torch.searchsorted(choices_K, columns_C)], assignment_VC)
            name = "ce" if settings.validation_loss == "train" else settings.validation_loss
            return losses.VALIDATION_LOSSES[name](outputs.logits(), labels_V)

        return self.caption_tokens_ML[choices_K], loss_of

    def _loss_at(
        self, inputs: Tensor, tokens_KL: Tensor, loss_of: Callable[[Outputs], Tensor], parameters: dict[str, Tensor]
    ) -> Tensor:
        assert self.saflex is not None
        options = {"from_pooled": self.saflex.settings.scope == "head"}
        return loss_of(functional_call(self.learner, parameters, (inputs, tokens_KL), options, tie_weights=False))

    @contextmanager
    def _recording(self, rows: Rows) -> Iterator[Products | None]:
        """Leave what the pass within computes to the exact derivative, where that is of use."""
        products = step_gains.products_for(self.forward, self.learner, self.saflex, rows)
        with products.recording() if products else nullcontext():
            yield products

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
