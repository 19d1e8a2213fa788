"""Zero-shot head: one text embedding per class.

As in CLIP (arXiv 2103.00020, section 3.1.4), with e the text encoder and t_m the templates:

    head_k = normalise( mean_m normalise( e(t_m(class_k)) ) )

Shapes: K classes, M templates, C distinct captions, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flyp_saflex.clip.model import Clip
from flyp_saflex.clip.text_tower import encode_text
from flyp_saflex.errors import DataError


def class_captions(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Fill every class name into every template: K lists of M captions.

    Raises:
        DataError: no class, no template, or a template without `{}`.
    """
    if not class_names or not templates:
        missing = "class" if not class_names else "caption template"
        raise DataError(
            f"a zero-shot head needs at least one {missing}, found none: check the dataset's prompts folder (data.prompts)"
        )
    for template in templates:
        if "{}" not in template:
            raise DataError(
                f"caption template '{template}' has no {{}} for the class name: write for example 'a photo of a {{}}.'"
            )
    return [[template.replace("{}", name) for template in templates] for name in class_names]


def text_digest(model: Any) -> str:
    """Return a digest of all weights but those of the image tower: equal digests give equal zero-shot heads."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias"):
            data = value.detach().cpu().contiguous()
            digest.update(f"{name} {data.dtype} {tuple(data.shape)} {value.device}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def zero_shot_head(clip: Clip, class_names: Sequence[str], templates: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """Compute the zero-shot head with the current weights of the model, without gradient.

    Args:
        clip: model on any device, with its tokeniser.
        class_names: K class names.
        templates: M caption templates with `{}` for the class name.
        batch_size: captions per forward pass; equal captions are encoded once.

    Returns:
        Float32 [K, D] on the model's device; rows have Euclidean norm 1.

    Raises:
        DataError: no class, no template, or a template without `{}`.
    """
    captions_KM = class_captions(class_names, templates)
    distinct = {caption: index for index, caption in enumerate(dict.fromkeys(caption for row in captions_KM for caption in row))}
    captions_C = list(distinct)
    device = next(clip.model.parameters()).device
    embeddings = []
    for start in range(0, len(captions_C), batch_size):
        tokens_BL = clip.tokenizer(captions_C[start : start + batch_size]).to(device)
        embeddings.append(normalize(encode_text(clip.model, tokens_BL).float(), dim=-1))
    embeddings_CD = torch.cat(embeddings)
    index_KM = torch.tensor([[distinct[caption] for caption in row] for row in captions_KM], device=device)
    head_KD = normalize(embeddings_CD[index_KM].mean(dim=1), dim=-1)
    assert head_KD.shape == (len(class_names), embeddings_CD.shape[1]), head_KD.shape
    return head_KD
