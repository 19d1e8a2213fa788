"""SAFLEX (arXiv 2410.02512): weights and soft labels of augmented rows, in closed form from their gains.

Weights and labels are chosen so that the next step lowers the validation loss most, to first order (Eq. 3-4). This is a linear
program that separates over rows (Theorem 1): `jvp.py` computes its coefficients, `closed_form.py` solves it, `presets.py` has
the options, and this module the object for a training loop.

Use in a training loop; the model is any `nn.Module` classifier (`for_module.py`):

    saflex = Saflex.for_module(model, preset="robust")
    for step, (x, y, x_aug, y_aug) in enumerate(batches):
        weights, labels = saflex(step, x_aug, y_aug, x_val, y_val, x_train=x)
        logits = model(torch.cat([x, x_aug]))
        loss = joint_loss(logits[: len(x)], y, logits[len(x) :], labels, weights)

A model that is another function of its parameters calls `refresh` and the object itself.

Shapes: A augmented rows, K labels (classes, or the distinct captions of the batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyp_saflex.errors import ConfigError
from flyp_saflex.presets import SaflexSettings, checked, preset
from flyp_saflex.saflex.closed_form import KeptRates, gains, probability_gains, renormalise, soft_labels, spread
from flyp_saflex.saflex.direction import ValidationDirection
from flyp_saflex.saflex.jvp import Parameters
from flyp_saflex.saflex.losses import at_least_float32
from flyp_saflex.saflex.validation_bank import ValidationBank
from flyp_saflex.tables import WEIGHT_RULES

if TYPE_CHECKING:
    from flyp_saflex.saflex.for_module import Dropout, ModuleSaflex, RowMode

_preset = preset  # `Saflex.__init__` has an argument of that name


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Summary of the last call, for a log row."""

    num_rows: int
    """Number of augmented rows."""
    kept_fraction: float
    """Fraction of rows with a weight above zero; 0 without rows."""
    label_entropy: float
    """Mean entropy of the labels of kept rows, in nats; 0: one-hot."""
    mean_gain: float
    """Mean gain of the upstream label over rows with finite gains, in the raw unit of the gains."""
    num_invalid: int
    """Number of rows dropped because of a gain that is not finite."""


class Saflex(ValidationDirection):
    """Weights and soft labels for augmented rows in any training loop.

    It stores the running average of the validation gradient and, for a trainer that renews them in turn, features of
    validation rows. It writes no `.grad`, changes no parameter, and returns detached tensors.

    Args:
        settings: the settings; None: the named preset with overrides.
        preset: a name in `presets.PRESETS`, if `settings` is None.
        overrides: fields of `SaflexSettings`.

    Attributes:
        watch: comparison of estimated with exact gains at intervals; with `estimator = "auto"` it may switch to `exact`.
        evidence_row: what evidence found before training (`rho` ...), for every row of metrics.
        bank: validation features that a trainer keeps between refreshes (`validation_renewed`).

    Raises:
        ConfigError: unknown preset or field, or a value out of range.
    """

    def __init__(self, settings: SaflexSettings | None = None, *, preset: str = "robust", **overrides: Any) -> None:
        assert settings is None or not overrides, "give settings, or a preset with overrides, not both"
        super().__init__(checked(settings) if settings is not None else _preset(preset, **overrides))
        self.bank = ValidationBank()
        self.evidence_row: dict[str, float] = {}
        self._rates = KeptRates()
        self._last: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    @classmethod
    def for_module(
        cls,
        model: nn.Module,
        settings: SaflexSettings | None = None,
        *,
        preset: str = "robust",
        head: str | None = None,
        rows: RowMode = "auto",
        dropout: Dropout = "refuse",
        **overrides: Any,
    ) -> ModuleSaflex:
        """Return SAFLEX of a classifier for a training loop: `weights, labels = it(step, x_aug, y_aug, x_val, y_val, x_train)`.

        Args:
            model: takes a tensor of rows, returns logits [N, K].
            settings: as for `Saflex`.
            preset: as for `Saflex`.
            head: see `ModuleSaflex`, and so are `rows` and `dropout`.
            rows: see there.
            dropout: see there.
            overrides: as for `Saflex`.

        Raises:
            ConfigError: a model or options that `ModuleSaflex` refuses.
        """
        from flyp_saflex.saflex.for_module import ModuleSaflex  # it imports this module

        return ModuleSaflex(model, cls(settings, preset=preset, **overrides), head=head, rows=rows, dropout=dropout)

    def __call__(
        self,
        logits_fn: Callable[[dict[str, Tensor]], Tensor],
        parameters: Parameters,
        upstream: Tensor,
        *,
        logits: Tensor | None = None,
        gains_fn: Callable[[Tensor, Tensor], Tensor] = gains,
    ) -> tuple[Tensor, Tensor]:
        """Return weights_A and labels_AK of the augmented rows.

        Args:
            logits_fn: takes the parameters by name, returns logits_AK.
            parameters: the same names as at `refresh`.
            upstream: upstream labels, indices [A] or rows on the simplex [A, K].
            logits: logits of the training step at the parameters, for `one-sided`; None: they are computed.
            gains_fn: computes gains from logits and tangent; `symmetric_gains` for both terms of the CLIP loss.

        Raises:
            ConfigError: before the first `refresh`.
        """
        values, tangent = self.tangent(logits_fn, parameters, logits)
        gains_AK = gains_fn(values, tangent)
        if self.watch.due(self.estimator_for(parameters)):
            values, tangent = self.tangent(logits_fn, parameters, estimator="exact")
            exact_AK = gains_fn(values, tangent)
            self.watch.compare(gains_AK, exact_AK, upstream)
            gains_AK = exact_AK
        if self.settings.gains_of == "prob":
            gains_AK = probability_gains(values, gains_AK)
        labels_A = upstream if upstream.ndim == 1 else upstream.argmax(dim=1)
        return self.solve(gains_AK, upstream, agrees_A=values.argmax(dim=1) == labels_A)

    def solve(
        self,
        gains_AK: Tensor,
        upstream: Tensor,
        *,
        keep_A: Tensor | None = None,
        prior_A: Tensor | None = None,
        candidates_AK: Tensor | None = None,
        agrees_A: Tensor | None = None,
        classes_A: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return weights_A and labels_AK for given gains: the whole method except the derivative.

        A row with a gain that is not finite gets weight zero and its upstream label, and is counted in `diagnostics`. A row
        with all gains exactly zero has no preference, since every label solves the program; it keeps its upstream label. If
        no row is kept, all weights are zero and the step trains on the train rows only.

        Args:
            gains_AK: gains of all rows of the step, over all processes, because their scale is that of the batch.
            upstream: upstream labels, indices [A] or rows on the simplex [A, K].
            keep_A: verdict of a filter; rows that are False are dropped whatever their gains. None: no filter.
            prior_A: weights >= 0 decided beforehand from evidence, which multiply the rule's. None: ones.
            candidates_AK: plausible labels, at least one per row: the feasible set of the linear program. None: all labels.
            agrees_A: whether the model itself predicts the upstream label of a row; None: `agreement` has no effect.
            classes_A: class of every row, for `class_balance`, if the K labels are not the classes; None: upstream labels.

        Returns:
            Weights, renormalised to sum to the number of kept rows, and labels, rows on the simplex. (In the paper the
            weights sum to one. The losses divide by the sum of weights, so here a kept row counts as much as a train row.)

        Raises:
            ConfigError: `agreement = "require"` without `agrees_A`.
        """
        settings = self.settings
        raw_AK = at_least_float32(gains_AK.detach())
        num_rows, num_labels = raw_AK.shape
        upstream_AK = (F.one_hot(upstream, num_labels) if upstream.ndim == 1 else upstream.detach()).to(raw_AK.dtype)
        assert upstream_AK.shape == raw_AK.shape, f"gains {tuple(raw_AK.shape)}, upstream labels {tuple(upstream_AK.shape)}"
        valid_A = raw_AK.isfinite().all(dim=1)
        raw_AK = torch.where(valid_A[:, None], raw_AK, torch.zeros_like(raw_AK))
        # Step 1: the gains' unit.
        scaled_AK = raw_AK / spread(raw_AK, valid_A) if settings.gain_scale == "std" else raw_AK
        # Step 2, Eq. (10): labels.
        learned_AK = soft_labels(scaled_AK, upstream_AK, settings.temperature, settings.penalty, candidates_AK)
        has_preference_A1 = (raw_AK != 0).any(dim=1, keepdim=True)
        labels_AK = torch.where(has_preference_A1, learned_AK, upstream_AK)
        assert labels_AK.shape == (num_rows, num_labels)
        # Step 3, Eq. (11) or another rule: weights, renormalised.
        weights_A = WEIGHT_RULES[settings.weight_rule](scaled_AK, labels_AK, upstream_AK, settings.penalty)
        if agrees_A is None and settings.agreement == "require":
            raise ConfigError('saflex.agreement = "require": solve() needs agrees_A, the votes of the model itself')
        if agrees_A is not None and settings.agreement == "keep":
            weights_A = torch.where(agrees_A & (weights_A == 0), torch.ones_like(weights_A), weights_A)
        elif agrees_A is not None and settings.agreement == "require":
            weights_A = torch.where(agrees_A, weights_A, torch.zeros_like(weights_A))
        weights_A = torch.where(valid_A, weights_A, torch.zeros_like(weights_A))
        if keep_A is not None:
            weights_A = torch.where(keep_A, weights_A, torch.zeros_like(weights_A))
        if prior_A is not None:
            weights_A = weights_A * prior_A.to(weights_A)
        if settings.class_balance > 0:
            classes_A = upstream_AK.argmax(dim=1) if classes_A is None else classes_A
            self._rates.update(classes_A, weights_A > 0)
            weights_A = weights_A * self._rates.factors(classes_A, settings.class_balance).to(weights_A)
        weights_A = renormalise(weights_A)
        assert weights_A.shape == (num_rows,)
        self._last = (raw_AK, upstream_AK, weights_A, labels_AK, valid_A)
        return weights_A, labels_AK

    @property
    def diagnostics(self) -> Diagnostics:
        """Summary of the last call, computed on access, so that a step without a log row needs no host sync."""
        if self._last is None:
            return Diagnostics(num_rows=0, kept_fraction=0.0, label_entropy=0.0, mean_gain=0.0, num_invalid=0)
        raw_AK, upstream_AK, weights_A, labels_AK, valid_A = self._last
        num_rows, kept_A = len(weights_A), weights_A > 0
        num_valid, num_kept = int(valid_A.sum()), int(kept_A.sum())
        entropy_A = torch.special.entr(labels_AK).sum(dim=1)
        return Diagnostics(
            num_rows=num_rows,
            kept_fraction=num_kept / max(num_rows, 1),
            label_entropy=float(entropy_A[kept_A].sum()) / max(num_kept, 1),
            mean_gain=float((raw_AK * upstream_AK).sum()) / max(num_valid, 1),
            num_invalid=num_rows - num_valid,
        )

    def log_row(self) -> dict[str, Any]:
        """Return the summary of the last call and the last comparison of the estimator, for a row of metrics."""
        summary = self.diagnostics
        row = {"label_entropy": summary.label_entropy, "mean_gain": summary.mean_gain, "invalid_rows": summary.num_invalid}
        return row | self.evidence_row | self.watch.log_row()

    def reset(self) -> None:
        """Discard all state, for example when other parameters are trained; the next step then starts with a refresh."""
        super().reset()
        self._rates, self._last = KeptRates(), None
        self.bank.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a bit-exact resume, as copies that later calls do not change."""
        return super().state_dict() | {"kept_rates": dict(self._rates.counts), "bank": self.bank.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state)
        self._rates.counts = dict(state["kept_rates"])
        self.bank.load_state_dict(state["bank"])
