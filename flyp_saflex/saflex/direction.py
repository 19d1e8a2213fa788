"""Validation direction: the running average of the validation gradient, and derivatives along it.

Shapes: A augmented rows, K labels (classes, or the distinct captions of the batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flyp_saflex.errors import ConfigError
from flyp_saflex.presets import SaflexSettings
from flyp_saflex.saflex.estimators import Watch, choose
from flyp_saflex.saflex.jvp import Estimator, Parameters, directional_derivative, gradient, norm
from flyp_saflex.saflex.primal_cache import Products


class ValidationDirection:
    """Running average of the validation gradient, with the estimator of the derivative along it.

    Args:
        settings: `average`, `refresh_every`, `estimator`, `check_every`, `scope`.

    Attributes:
        watch: comparison of estimated with exact gains at intervals; with `estimator = "auto"` it may switch to `exact`.
        mean_of: mean over processes of a scalar tensor, by which they agree on the step of a finite difference.
    """

    def __init__(self, settings: SaflexSettings) -> None:
        self.settings = settings
        self.mean_of: Callable[[Tensor], Tensor] = lambda value: value
        self._gradient: dict[str, Tensor] | None = None
        self._previous_rms: Tensor | float | None = None
        self._length: Tensor | None = None  # of the gradient, when it was first asked for
        self.watch = Watch(every=settings.check_every, may_give_up=settings.estimator == "auto")

    def due(self, step: int) -> bool:
        """Return whether the validation gradient needs a refresh before this optimiser step."""
        return self._gradient is None or step % self.settings.refresh_every == 0

    def refresh(
        self,
        parameters: Parameters,
        validation_loss_fn: Callable[[dict[str, Tensor]], Tensor],
        reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> Tensor:
        """Compute the validation gradient and add it to the running average.

        Args:
            parameters: parameters of the scope, by name.
            validation_loss_fn: takes those parameters, returns the scalar validation loss.
            reduce: averages a gradient over processes (`lambda g: accelerator.reduce(g, "mean")`); None: one process.

        Returns:
            Norm of the new gradient, a detached scalar tensor.

        Raises:
            ConfigError: other parameter names than before.
        """
        newest = gradient(validation_loss_fn, parameters)
        return self.update(reduce(newest) if reduce else newest)

    def update(self, newest: Mapping[str, Tensor]) -> Tensor:
        """Add a validation gradient computed by the caller to the running average.

        Args:
            newest: gradient by parameter name, already averaged over processes.

        Returns:
            Its norm, a detached scalar tensor.

        Raises:
            ConfigError: other parameter names than before.
        """
        old, decay = self._gradient, self.settings.average
        if old is not None and old.keys() != newest.keys():
            odd = sorted(old.keys() ^ newest.keys())
            raise ConfigError(
                f"saflex: the validation gradient has other parameters than before ({len(odd)}, for example '{odd[0]}'): "
                "keep the scope, or make a new Saflex"
            )
        detached = {name: value.detach() for name, value in newest.items()}
        if old is not None and decay > 0:
            for name, value in detached.items():  # in place: new memory for millions of parameters costs more than the sum
                old[name].lerp_(value, 1 - decay)
        else:
            self._gradient = {name: value.clone() for name, value in detached.items()}
        self._length = None
        return norm(detached)

    def estimator_for(self, parameters: Parameters) -> Estimator:
        """Return the estimator of the next call with these parameters."""
        if self.settings.estimator != "auto":
            return self.settings.estimator
        return "exact" if self.watch.given_up else choose(parameters, self.settings.scope)

    @property
    def direction(self) -> dict[str, Tensor]:
        """Averaged validation gradient by name; read-only, and valid until the next refresh, which overwrites it.

        Raises:
            ConfigError: before the first `refresh`.
        """
        if self._gradient is None:
            raise ConfigError("saflex has no validation gradient yet: call refresh(parameters, validation_loss_fn) first")
        return self._gradient

    def tangent(
        self,
        logits_fn: Callable[[dict[str, Tensor]], Tensor],
        parameters: Parameters,
        logits: Tensor | None = None,
        *,
        estimator: Estimator | None = None,
        products: Products | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits and their derivative along the averaged validation gradient (see `directional_derivative`).

        Args:
            logits_fn: takes the parameters by name, returns logits.
            parameters: the same names as at `refresh`.
            logits: logits at the parameters, for `one-sided`; None: they are computed.
            estimator: None: `estimator_for(parameters)`.
            products: `exact`: primal cache of a pass of the same function at the same parameters, outside of autocast.

        Raises:
            ConfigError: before the first `refresh`.
        """
        estimator = estimator or self.estimator_for(parameters)
        previous = None if self._previous_rms is None else float(self._previous_rms)  # of the last call: no wait by now
        if estimator != "exact" and self._length is None:
            self._length = norm(self.direction)
        values, tangent = directional_derivative(
            logits_fn,
            parameters,
            self.direction,
            estimator=estimator,
            logits=logits,
            previous_rms=previous,
            length=self._length,
            products=products,
            mean_of=self.mean_of,
        )
        if estimator != "exact":
            self._previous_rms = self.mean_of(tangent.square().mean()).sqrt()
        return values, tangent

    def reset(self) -> None:
        """Discard the gradient: the next step starts with a refresh."""
        self._gradient, self._previous_rms, self._length = None, None, None
        self.watch.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a bit-exact resume, as copies that later calls do not change."""
        stored = None if self._gradient is None else {name: value.clone() for name, value in self._gradient.items()}
        previous = None if self._previous_rms is None else float(self._previous_rms)
        return {"gradient": stored, "previous_rms": previous, "watch": self.watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        stored = state["gradient"]
        self._gradient = None if stored is None else {name: value.clone() for name, value in stored.items()}
        self._previous_rms, self._length = state["previous_rms"], None
        self.watch.load_state_dict(state["watch"])
