"""Pooled features of SAFLEX's validation rows, a part of them renewed at every refresh (floor 2: tensors only).

In head scope a validation gradient costs an image pass over its rows and a text backward pass. The image tower drifts
slowly, so most rows may keep the features of some refreshes ago, while projection and text, along which the gradient is
taken, are always current: many rows, which the gradient's sampling noise asks for, at the price of a few.

Shapes: V rows in the bank, R renewed at a time, F pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class ValidationBank:
    """V rows in slots; slots are renewed in turn.

    Attributes:
        num_read: rows put in so far, which says what comes next.
        pooled_VF: pooled features, None while the bank is empty.
        labels_V: class labels.
        captions_V: caption ids.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Empty the bank."""
        self.num_read = 0
        self.pooled_VF: Tensor | None = None
        self.labels_V: Tensor | None = None
        self.captions_V: Tensor | None = None

    def next_slots(self, num_rows: int, num_renewed: int) -> list[int]:
        """Return the slots that come next: all `num_rows` of an empty bank, else `num_renewed` of them in turn."""
        count = num_rows if self.pooled_VF is None else num_renewed
        return [position % num_rows for position in range(self.num_read, self.num_read + count)]

    def renew(self, slots_R: Tensor, pooled_RF: Tensor, labels_R: Tensor, captions_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put rows into their slots; return features, labels and caption ids of the whole bank.

        Tensors given out before are left as they are.
        """
        self.num_read += len(slots_R)
        if self.pooled_VF is None or self.labels_V is None or self.captions_V is None:
            order = torch.argsort(slots_R)
            self.pooled_VF, self.labels_V, self.captions_V = pooled_RF[order], labels_R[order], captions_R[order]
        else:
            self.pooled_VF = self.pooled_VF.index_copy(0, slots_R, pooled_RF.to(self.pooled_VF.dtype))
            self.labels_V = self.labels_V.index_copy(0, slots_R, labels_R)
            self.captions_V = self.captions_V.index_copy(0, slots_R, captions_R)
        return self.pooled_VF, self.labels_V, self.captions_V

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit; tensors are shared, and never changed in place here."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.num_read = state["num_read"]
        self.pooled_VF, self.labels_V, self.captions_V = state["pooled_VF"], state["labels_V"], state["captions_V"]
