"""Validation rows as SAFLEX's default settings read them: a full bank of features, some of which a refresh renews."""

from __future__ import annotations

import torch
from torch import Tensor

from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tasks.network import Network


def usual_validation(saflex: Saflex, network: Network, image_CHW: Tensor, class_captions_K: Tensor) -> Validation:
    """Fill the bank with noise, which costs what features do; return what a later refresh reads: noise for images too.

    Outside of head scope there is no bank: as many rows as the settings renew would be no default there, so all are read.
    """
    settings, device = saflex.settings, image_CHW.device
    labels_V = torch.randint(len(class_captions_K), (settings.validation_rows,), device=device)
    if settings.scope != "head" or not settings.validation_renewed:
        images = torch.randn(len(labels_V), *image_CHW.shape, device=device)
        return Validation(images, labels_V, class_captions_K[labels_V])
    with torch.no_grad():
        shape = network.pool(image_CHW[None]).shape[1:]
    slots_V = torch.arange(len(labels_V), device=device)
    saflex.bank.renew(slots_V, torch.randn(len(labels_V), *shape, device=device), labels_V, class_captions_K[labels_V])
    few = slice(settings.validation_renewed)
    images = torch.randn(settings.validation_renewed, *image_CHW.shape, device=device)
    return Validation(images, labels_V[few], class_captions_K[labels_V[few]], slots_V[few])
