"""Choice of the estimator of the directional derivative, and its comparison with the exact derivative.

A one-sided finite difference costs a third of the exact derivative of all parameters. Its error is some tenths of a percent,
except with coarse rounding or where the model is not smooth. The estimator is therefore chosen by precision, device and
scope, and compared at intervals with the exact derivative on a few rows.

Shapes: A augmented rows, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flyp_saflex.saflex.jvp import Estimator, Parameters, rms

Choice = Literal["auto", "exact", "central", "one-sided"]

CHECK_ROWS = 8
"""Augmented rows per process whose exact gains a comparison computes."""
MIN_ROW_COSINE = 0.98
"""Smallest mean over rows of the cosine of estimated and exact gains; below it the estimator is replaced by `exact`."""
MIN_SIGN_AGREEMENT = 0.97
"""Smallest fraction of rows with the right sign of the upstream label's gain, which decides whether a row is kept."""
_AGREED_BEFOREHAND = 32
"""Pseudo-count of agreeing rows, so that a single row with a gain near zero does not decide."""


def choose(parameters: Parameters, scope: str) -> Estimator:
    """Return the cheapest estimator that is accurate enough for these parameters.

    Head scope: `exact`, which costs one text pass only. All parameters: `one-sided` in float32; `exact` under autocast and
    with matrix products in TF32, whose rounding is larger than the difference, and in float64, which is used for exact
    results. (Convolutions use TF32 by default; the comparison finds a model where that matters.)

    Args:
        parameters: parameters of the derivative, by name.
        scope: `all` or `head`.
    """
    value = next(iter(parameters.values()))
    device_type = value.device.type
    rounded = torch.is_autocast_enabled(device_type) or (device_type == "cuda" and _is_tf32_on())
    return "exact" if scope == "head" or value.dtype != torch.float32 or rounded else "one-sided"


def _is_tf32_on() -> bool:
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set by PyTorch's newer option, beside which this one cannot be read: whoever does that wants it
        return True


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Agreement of estimated and exact gains, over the rows with finite exact gains.

    Attributes:
        rows: number of these rows.
        error: root mean square of the difference, relative to that of the exact gains.
        row_cosine: mean over rows of the cosine similarity, -1..1.
        sign_agreement: fraction of rows with the right sign of the upstream label's gain.
        argmax_agreement: fraction of rows with the right label of largest gain.
    """

    rows: int
    error: float
    row_cosine: float
    sign_agreement: float
    argmax_agreement: float


def fidelity(found_AK: Tensor, exact_AK: Tensor, upstream: Tensor) -> Fidelity:
    """Compare estimated with exact gains.

    Args:
        found_AK: estimated gains; a row that is not finite counts as no agreement.
        exact_AK: exact gains of the same rows.
        upstream: upstream labels, indices [A] or rows on the simplex [A, K].

    Returns:
        The agreement; perfect, with zero rows, if no exact row is finite.
    """
    upstream_AK = F.one_hot(upstream, exact_AK.shape[1]) if upstream.ndim == 1 else upstream
    valid_A = exact_AK.isfinite().all(dim=1)
    found_AK, exact_AK, upstream_AK = found_AK[valid_A].double(), exact_AK[valid_A].double(), upstream_AK[valid_A].double()
    num_rows = len(exact_AK)
    if not num_rows:
        return Fidelity(rows=0, error=0.0, row_cosine=1.0, sign_agreement=1.0, argmax_agreement=1.0)
    usable_A = found_AK.isfinite().all(dim=1)
    found_AK = found_AK.nan_to_num(0, 0, 0)
    same_A = (found_AK == exact_AK).all(dim=1)  # rows of zeros have no direction, and agree
    cosine_A = torch.where(same_A, 1.0, F.cosine_similarity(found_AK, exact_AK, dim=1, eps=1e-300))
    signs_A = ((found_AK * upstream_AK).sum(dim=1) >= 0) == ((exact_AK * upstream_AK).sum(dim=1) >= 0)
    best_A = found_AK.argmax(dim=1) == exact_AK.argmax(dim=1)
    size = rms(exact_AK)
    return Fidelity(
        rows=num_rows,
        error=rms(found_AK - exact_AK) / size if size else float(not bool(same_A.all())),
        row_cosine=float((cosine_A * usable_A).mean()),
        sign_agreement=float((signs_A & usable_A).double().mean()),
        argmax_agreement=float((best_A & usable_A).double().mean()),
    )


class Watch:
    """Monitor that compares the estimator with the exact derivative at intervals.

    Args:
        every: calls between comparisons; 0: never.
        may_give_up: whether a poor comparison replaces the estimator by `exact` for good (`estimator = "auto"`); otherwise
            comparisons are only logged.

    Attributes:
        last: the last comparison; None before the first.
        given_up: one line with the reason why the estimator was replaced; empty while it is in use.
        tell: function that is called with that line; `print` by default.
    """

    def __init__(self, *, every: int, may_give_up: bool) -> None:
        self.every, self.may_give_up = every, may_give_up
        self.tell: Callable[[str], None] = print
        self.reset()

    def reset(self) -> None:
        """Discard all comparisons and use the estimator again."""
        self.calls = 0
        self.last: Fidelity | None = None
        self.given_up = ""
        self._rows, self._agreeing = float(_AGREED_BEFOREHAND), float(_AGREED_BEFOREHAND)

    def due(self, estimator: Estimator) -> bool:
        """Count a call; return whether its gains are to be compared: those of the first and every `every`-th call."""
        self.calls += 1
        return self.every > 0 and estimator != "exact" and (self.calls - 1) % self.every == 0

    def compare(self, found_AK: Tensor, exact_AK: Tensor, upstream: Tensor) -> bool:
        """Record a comparison (arguments: see `fidelity`); return whether the estimator is now replaced by `exact`.

        The decision depends on the rows only, so that processes with the same rows agree.
        """
        self.last = fidelity(found_AK, exact_AK, upstream)
        self._rows += self.last.rows
        self._agreeing += self.last.rows * self.last.sign_agreement
        signs = self._agreeing / self._rows
        if self.may_give_up and (self.last.row_cosine < MIN_ROW_COSINE or signs < MIN_SIGN_AGREEMENT):
            self.given_up = (
                f"the estimated gains differ from the exact ones (call {self.calls}: row cosine {self.last.row_cosine:.3f}, "
                f"sign agreement {self.last.sign_agreement:.3f} on {self.last.rows} rows): exact from now on"
            )
            self.tell(f"saflex: {self.given_up}")
        return bool(self.given_up)

    def log_row(self) -> dict[str, Any]:
        """Return the last comparison as entries `estimator_...` of a log row; empty before the first."""
        return {} if self.last is None else {f"estimator_{name}": value for name, value in asdict(self.last).items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        last = None if self.last is None else asdict(self.last)
        return {"calls": self.calls, "last": last, "given_up": self.given_up, "rows": self._rows, "agreeing": self._agreeing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.calls, self.given_up = state["calls"], state["given_up"]
        self.last = None if state["last"] is None else Fidelity(**state["last"])
        self._rows, self._agreeing = state["rows"], state["agreeing"]
