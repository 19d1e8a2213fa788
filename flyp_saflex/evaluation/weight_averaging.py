"""WiSE-FT (arXiv 2109.01903): weights between the pretrained and the finetuned model .

theta(alpha) = (1 - alpha) * theta_pretrained + alpha * theta_finetuned
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flyp_saflex.errors import ModelError
from flyp_saflex.evaluation.predict import Variant
from flyp_saflex.tasks.task import Predictor, Task


def interpolate(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return the state between two states of the same architecture.

    Args:
        pretrained: state at alpha = 0.
        finetuned: state at alpha = 1.
        alpha: 0..1; the ends are returned bit for bit.

    Returns:
        New tensors, float32 (float64 stays) where the state is floating point. Integer and boolean buffers, such as
        BatchNorm's `num_batches_tracked`, cannot lie in between and are the finetuned ones (at alpha = 0 the pretrained).

    Raises:
        ModelError: the states differ in a name or a shape.
    """
    check_same(pretrained, finetuned)
    return {name: _between(pretrained[name], finetuned[name], alpha).clone() for name in finetuned}


@torch.no_grad()
def set_weights(model: nn.Module, pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], alpha: float) -> None:
    """Put `interpolate(...)` into a model in place, one tensor at a time, so that no third copy of the model is held.

    Raises:
        ModelError: the states differ from each other, or from the model, in a name or a shape.
    """
    check_same(pretrained, finetuned)
    own = model.state_dict()
    check_same(finetuned, own)
    for name, tensor in own.items():
        tensor.copy_(_between(pretrained[name], finetuned[name], alpha))


def check_same(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> None:
    """Check that two states have the same names and shapes.

    Raises:
        ModelError: they have not; names the first difference.
    """
    for name in [*pretrained, *finetuned]:
        if name not in pretrained or name not in finetuned:
            side = "finetuned" if name in finetuned else "pretrained"
            raise ModelError(
                f"WiSE-FT needs two models of one architecture, but only the {side} one has '{name}': "
                "set model.name and model.pretrained to what the run started from"
            )
        if pretrained[name].shape != finetuned[name].shape:
            raise ModelError(
                f"WiSE-FT needs two models of one architecture, but '{name}' is {tuple(pretrained[name].shape)} in the "
                f"pretrained and {tuple(finetuned[name].shape)} in the finetuned one: set model.name and model.pretrained to "
                "what the run started from"
            )


class WeightAverage:
    """A task whose weights can stand anywhere between its two ends.

    Args:
        task: the finetuned model; its weights are replaced in place.
        start: state of its network at the start of training; None: only alpha = 1 can be had.
        precision: `no`, `bf16` or `fp16`, of the network before its columns.
        lowered: whether inputs are activations behind the frozen part.

    Raises:
        ModelError: the two ends differ in a name or a shape.
    """

    def __init__(
        self, task: Task, start: Mapping[str, Tensor] | None = None, *, precision: str = "no", lowered: bool = False
    ) -> None:
        self.task, self.precision, self.lowered = task, precision, lowered
        self._at = 1.0
        self._computed: dict[float, Any] = {}
        self._ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
        if start is not None:
            finetuned = {name: tensor.to("cpu", copy=True) for name, tensor in task.network.state_dict().items()}
            check_same(start, finetuned)
            self._ends = start, finetuned

    def variant(self, alpha: float) -> Variant:
        """Return a function that puts the weights of `alpha` in place and gives the predictor."""

        def enter() -> Predictor:
            if alpha != self._at:
                assert self._ends is not None, f"alpha = {alpha} needs the pretrained weights"
                self._computed[self._at] = self.task.computed()  # the zero-shot head depends on alpha, not on the images
                set_weights(self.task.network, *self._ends, alpha)
                self.task.weights_changed(self._computed.get(alpha))
                self._at = alpha
            return self.task.predictor(precision=self.precision, lowered=self.lowered)

        return enter


def _between(pretrained: Tensor, finetuned: Tensor, alpha: float) -> Tensor:
    if not 0 <= alpha <= 1:
        raise ModelError(f"WiSE-FT: alpha is {alpha}, expected a number from 0 to 1")
    if not finetuned.is_floating_point():
        return pretrained if alpha == 0 else finetuned
    dtype = torch.promote_types(finetuned.dtype, torch.float32)
    if alpha in (0, 1):  # not left to arithmetic: 0 * infinity is NaN, and -0.0 + 0.0 is 0.0
        return (finetuned if alpha == 1 else pretrained).to(dtype)
    return (1 - alpha) * pretrained.to(dtype) + alpha * finetuned.to(dtype)
