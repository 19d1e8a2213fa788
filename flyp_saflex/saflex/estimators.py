"""Which estimator of the directional derivative is used, and whether it can be trusted (floor 2: tensors only).

A one-sided difference costs a third of the exact derivative of all parameters and errs by some tenths of a percent, unless
rounding is coarse or the model is rough where it stands. So it is chosen by precision, device and scope, and compared with
the exact one on a few rows every now and then.

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
"""Augmented rows (of each process) whose exact gains are computed at a comparison."""
MIN_ROW_COSINE = 0.98
"""Of estimated and exact gains; below this mean over rows the estimator is given up."""
MIN_SIGN_AGREEMENT = 0.97
"""Of the gains of the labels that rows came with: their sign decides about a row."""
_AGREED_BEFOREHAND = 32
"""Rows that count as agreeing before any was seen: one row whose gain is next to zero decides nothing."""


def choose(parameters: Parameters, scope: str) -> Estimator:
    """Return the cheapest estimator that can be trusted with these parameters.

    Head scope: `exact`, because it costs a text pass. All parameters: `one-sided` in float32; `exact` in half precision and
    with matrix products in TF32, whose rounding is larger than the difference, and in float64, which asks for exactness.
    (Convolutions are in TF32 by default; a model where that matters is found out by the comparison.)
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
    """How estimated gains compare with exact ones, over the rows whose exact gains are finite.

    Attributes:
        rows: how many they are.
        error: root mean square of the difference, relative to the exact gains'.
        row_cosine: mean over rows of the cosine.
        sign_agreement: share of rows whose own label's gain has the right sign.
        argmax_agreement: share of rows whose best label is the right one.
    """

    rows: int
    error: float
    row_cosine: float
    sign_agreement: float
    argmax_agreement: float


def fidelity(found_AK: Tensor, exact_AK: Tensor, upstream: Tensor) -> Fidelity:
    """Compare gains with exact ones.

    Args:
        found_AK: estimated gains. A row that is not finite agrees in nothing.
        exact_AK: exact gains of the same rows.
        upstream: labels that the rows came with: indices [A] or rows on the simplex [A, K].
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
    """Compares an estimator with the exact derivative every now and then, and gives it up for good when it errs.

    Args:
        every: calls between comparisons; 0: never.
        may_give_up: whether `exact` follows a poor comparison (`estimator = "auto"`), or it is only told.

    Attributes:
        last: the last comparison, None before the first.
        given_up: one line that says why the estimator was given up; empty while it is trusted.
        tell: called with that line.
    """

    def __init__(self, *, every: int, may_give_up: bool) -> None:
        self.every, self.may_give_up = every, may_give_up
        self.tell: Callable[[str], None] = print
        self.reset()

    def reset(self) -> None:
        """Forget all comparisons: trust the estimator again."""
        self.calls = 0
        self.last: Fidelity | None = None
        self.given_up = ""
        self._rows, self._agreeing = float(_AGREED_BEFOREHAND), float(_AGREED_BEFOREHAND)

    def due(self, estimator: Estimator) -> bool:
        """Count a call; return whether its gains are to be compared with exact ones: those of the first, and every n-th."""
        self.calls += 1
        return self.every > 0 and estimator != "exact" and (self.calls - 1) % self.every == 0

    def compare(self, found_AK: Tensor, exact_AK: Tensor, upstream: Tensor) -> bool:
        """Note how gains agree with exact ones (see `fidelity`); return whether the estimator is given up from now on.

        Given the same rows every process decides the same.
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
        """Return the last comparison for a log row; empty before the first."""
        return {} if self.last is None else {f"estimator_{name}": value for name, value in asdict(self.last).items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        last = None if self.last is None else asdict(self.last)
        return {"calls": self.calls, "last": last, "given_up": self.given_up, "rows": self._rows, "agreeing": self._agreeing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.calls, self.given_up = state["calls"], state["given_up"]
        self.last = None if state["last"] is None else Fidelity(**state["last"])
        self._rows, self._agreeing = state["rows"], state["agreeing"]
