"""Logits and labels of other people's loops, brought to one form: logits [N, K], class indices int64 [N].

Shapes: N rows, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flyp_saflex.errors import ConfigError

_SIMPLEX = 1e-3
"""Largest distance of the sum of a soft label from one: half precision of labels mixed by hand."""


def class_logits(logits: Tensor) -> Tensor:
    """Return logits of at least two classes.

    The one logit z of a binary classifier becomes (0, z), whose softmax gives the same probabilities.

    Args:
        logits: [N, K]; or [N], [N, 1]: the log odds of the second class.

    Raises:
        ConfigError: not a tensor, or of another shape.
    """
    if not isinstance(logits, Tensor):
        raise ConfigError(f"the model returned a {type(logits).__name__}, expected logits [N, K]: wrap it to return them alone")
    logits = logits[:, None] if logits.ndim == 1 else logits
    if logits.ndim != 2 or not logits.shape[1]:
        raise ConfigError(f"the model returned a tensor {list(logits.shape)}, expected logits [N, K], one row per input")
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def class_labels(
    labels: Tensor, num_classes: int, *, name: str, num_rows: int, device: torch.device, soft: bool = False
) -> Tensor:
    """Return labels as class indices, int64 [N], or as soft labels [N, K] if they are allowed.

    Args:
        labels: integers or booleans, [N] or [N, 1], or floating point 0 and 1 of a binary classifier; with `soft` also rows on
            the simplex, [N, K].
        num_classes: K.
        name: of the argument, for messages.
        num_rows: N.
        device: of the result.
        soft: whether soft labels are allowed.

    Raises:
        ConfigError: other shapes and kinds, several classes in a row, or a label out of range.
    """
    labels = torch.as_tensor(labels, device=device)
    expected = f"expected {num_rows} class indices in 0..{num_classes - 1}"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or len(labels) != num_rows:
        raise ConfigError(f"{name} has the shape {list(labels.shape)}: {expected}, one per row")
    if labels.is_complex():
        raise ConfigError(f"{name} is {labels.dtype}: {expected}")
    if labels.ndim == 2:
        if labels.shape[1] != num_classes or not bool((_sums_to_one(labels) & (labels >= 0).all(dim=1)).all()):
            raise ConfigError(
                f"{name} of shape {list(labels.shape)} has rows of no or several classes (multi-label?): {expected}"
                f"{f', or rows [{num_rows}, {num_classes}] that sum to one' if soft else ''}"
            )
        if not soft:
            raise ConfigError(f"{name} has soft labels {list(labels.shape)}: {expected}; {name}.argmax(dim=1) gives them")
        return labels if labels.is_floating_point() else labels.float()
    if labels.is_floating_point() and (num_classes != 2 or not bool((labels == labels.round()).all())):
        raise ConfigError(f"{name} is {labels.dtype}: {expected}, integers")
    indices_N = labels.long()
    if num_rows:
        for value in torch.stack(indices_N.aminmax()).tolist():
            if not 0 <= value < num_classes:
                row = int((indices_N == value).nonzero()[0])
                raise ConfigError(f"{name} has the label {value} in row {row}: {expected}; leave the row out, or correct it")
    return indices_N


def _sums_to_one(labels_NK: Tensor) -> Tensor:
    return (labels_NK.to(torch.float64).sum(dim=1) - 1).abs() < _SIMPLEX
