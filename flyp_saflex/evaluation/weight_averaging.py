"""WiSE-FT (arXiv 2109.01903): weights between the pretrained and the finetuned model (floor 2).

theta(alpha) = (1 - alpha) * theta_pretrained + alpha * theta_finetuned
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flyp_saflex.clip.model import Clip, ImageTower
from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.errors import ModelError
from flyp_saflex.evaluation.predict import Head, Predictor, Variant, clip_predictor


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


class WiseModel:
    """A finetuned model that can stand anywhere between its two ends.

    Args:
        clip: the finetuned model; its weights are replaced in place.
        class_names: classes of the zero-shot head.
        templates: its caption templates.
        pretrained: state that it started from; not needed for alpha = 1.
        head: linear head instead of the zero-shot one: `weight` [K, D], `bias` [K] and, as they were before training,
            `initial_weight`, `initial_bias`.
        precision: `no`, `bf16` or `fp16`, of the image tower.
        tower: the image tower, cut behind blocks that both ends share; predictors then take activations for images.

    Raises:
        ModelError: the two ends differ in a name or a shape.
    """

    def __init__(
        self,
        clip: Clip,
        class_names: Sequence[str],
        templates: Sequence[str],
        *,
        pretrained: Mapping[str, Tensor] | None = None,
        head: Mapping[str, Tensor] | None = None,
        precision: str = "no",
        tower: ImageTower | None = None,
    ) -> None:
        self.tower = tower
        self.clip, self.class_names, self.templates, self.precision = clip, class_names, templates, precision
        self._linear = head
        self._at = 1.0
        self._heads: dict[float, Head] = {}
        self._ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
        if pretrained is not None:
            finetuned = {name: tensor.to("cpu", copy=True) for name, tensor in clip.model.state_dict().items()}
            check_same(pretrained, finetuned)
            self._ends = pretrained, finetuned

    def variant(self, alpha: float) -> Variant:
        """Return what puts the weights of `alpha` in place and gives the predictor of images."""

        def enter() -> Predictor:
            if alpha != self._at:
                assert self._ends is not None, f"alpha = {alpha} needs the pretrained weights"
                set_weights(self.clip.model, *self._ends, alpha)
                self._at = alpha
            if alpha not in self._heads:  # text tower and head depend on alpha, not on the images
                self._heads[alpha] = self._head(alpha)
            return clip_predictor(self.clip.model, self._heads[alpha], precision=self.precision, tower=self.tower)

        return enter

    def _head(self, alpha: float) -> Head:
        device = next(self.clip.model.parameters()).device
        if self._linear is None:
            scale = float(self.clip.model.logit_scale.detach().exp())
            return Head(zero_shot_head(self.clip, self.class_names, self.templates), scale=scale)
        before, after = ({name: self._linear[prefix + name] for name in ("weight", "bias")} for prefix in ("initial_", ""))
        head = interpolate(before, after, alpha)
        return Head(head["weight"].to(device), head["bias"].to(device))


def _between(pretrained: Tensor, finetuned: Tensor, alpha: float) -> Tensor:
    if not 0 <= alpha <= 1:
        raise ModelError(f"WiSE-FT: alpha is {alpha}, expected a number from 0 to 1")
    if not finetuned.is_floating_point():
        return pretrained if alpha == 0 else finetuned
    dtype = torch.promote_types(finetuned.dtype, torch.float32)
    if alpha in (0, 1):  # not left to arithmetic: 0 * infinity is NaN, and -0.0 + 0.0 is 0.0
        return (finetuned if alpha == 1 else pretrained).to(dtype)
    return (1 - alpha) * pretrained.to(dtype) + alpha * finetuned.to(dtype)
