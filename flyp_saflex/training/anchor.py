"""L2-SP (arXiv 1802.01483): a penalty on the distance of the weights from those that training started from.

    Omega = alpha / 2 * |w - w_0|^2 over the trained parameters

The paper adds beta / 2 * |w_head|^2, which draws a new head to zero; here a head starts as the zero-shot classifier and is
drawn there. The gradient does not depend on the rows, so the gains of augmented rows (Eq. 9) stay what they are.
"""

from __future__ import annotations

from torch import Tensor, nn


class Anchor:
    """Weights of the start, and the penalty on leaving them.

    Args:
        network: as training starts; copies are kept.
        alpha: strength of the penalty.
    """

    def __init__(self, network: nn.Module, alpha: float) -> None:
        self.network, self.alpha = network, alpha
        self.start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    def penalty(self) -> Tensor:
        """Return Omega, a scalar with gradient; raises if no parameter is trained."""
        trained = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        assert trained, "a phase trains something"
        return self.alpha / 2 * sum((value - self.start[name]).square().sum() for name, value in trained.items())  # type: ignore[return-value]
