"""Labels of cached edits from one class into another, which rows of the manifest state by `target` and `strength`.

Diff-Mix (arXiv 2403.19600) moves an image of class i towards class j by a diffusion of strength s, and labels it (1 - s^gamma)
i + s^gamma j, as in the authors' code (dataset/base.py, `get_syn_item`). To keep the source's label, or to take the target's,
are its two limits.

Shapes: N edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Edit
from flyp_saflex.user_text import quoted

Rule = Literal["source", "target", "diff-mix"]


def source_share(rule: Rule, strength: float, gamma: float) -> float:
    """Return the part of an edit's label that stays its source class; the rest is the target's.

    Args:
        rule: `augment.inter_class`.
        strength: s, how much of the diffusion was run, above 0 and at most 1.
        gamma: exponent.
    """
    return {"source": 1.0, "target": 0.0, "diff-mix": 1.0 - strength**gamma}[rule]


def stated_labels(edits: Sequence[Edit], class_names: Sequence[str], rule: Rule, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the two classes of every edit [N, 2], and the share of the first.

    Edits that state no target keep their label.

    Args:
        edits: N of the cache.
        class_names: a target is one of them, or an index.
        rule: `augment.inter_class`.
        gamma: `augment.inter_class_gamma`.

    Raises:
        DataError: no edit states a target, or one is no class, or its strength is no number above 0 and up to 1.
    """
    labels, shares, num_stated = [], [], 0
    for edit in edits:
        if edit.provenance.get("target") is None:
            labels.append((edit.label, edit.label))
            shares.append(1.0)
            continue
        num_stated += 1
        target = _class_index(edit, class_names)
        share = source_share(rule, _strength(edit) if rule == "diff-mix" else 1.0, gamma)
        labels.append((target, target) if share == 0 else (edit.label, target))
        shares.append(share or 1.0)
    if not num_stated:
        raise DataError(
            f'augment.inter_class = "{rule}": none of the {len(edits)} edits states the class that it was made into; write '
            "`target` and `strength` into the rows of metadata.jsonl, or leave the option out"
        )
    return torch.tensor(labels, dtype=torch.long), torch.tensor(shares, dtype=torch.float32)


def _class_index(edit: Edit, class_names: Sequence[str]) -> int:
    target = edit.provenance["target"]
    if isinstance(target, str) and target in class_names:
        return list(class_names).index(target)
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(class_names):
        return target
    raise DataError(
        f"edit {quoted(edit.aug_id)}: target {quoted(repr(target))} is no class, expected a name or an index below "
        f"{len(class_names)}{nearest(str(target), class_names)}; correct the row of metadata.jsonl"
    )


def _strength(edit: Edit) -> float:
    strength = edit.provenance.get("strength")
    if isinstance(strength, (int, float)) and not isinstance(strength, bool) and 0 < strength <= 1:
        return float(strength)
    raise DataError(
        f"edit {quoted(edit.aug_id)}: strength {quoted(repr(strength))}, expected a number above 0 and up to 1; correct the row "
        'of metadata.jsonl, or set augment.inter_class="target"'
    )
