"""Bank of pooled features of SAFLEX's validation rows, of which each refresh renews a part.

In head scope a validation gradient costs a forward pass of the image tower over its rows and a backward pass of the text tower.
The image tower changes slowly, so most rows keep the features of earlier refreshes; projection and text tower, whose gradient
is taken, are always current. Many validation rows, which reduce the sampling noise of the gradient, then cost as little as few.

Shapes: V rows in the bank, R rows renewed per refresh, F pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class ValidationBank:
    """Bank of V validation rows in slots, renewed in turn.

    Attributes:
        num_read: number of rows stored so far, which determines the next slots.
        pooled_VF: pooled features; None while the bank is empty.
        labels_V: class labels; None while the bank is empty.
        captions_V: caption ids; None while the bank is empty.
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
        """Return the next slots to renew: all `num_rows` of an empty bank, else `num_renewed` of them in turn."""
        count = num_rows if self.pooled_VF is None else num_renewed
        return [position % num_rows for position in range(self.num_read, self.num_read + count)]

    def renew(self, slots_R: Tensor, pooled_RF: Tensor, labels_R: Tensor, captions_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store rows in their slots; return features, labels and caption ids of the whole bank.

        Tensors returned earlier are not changed.

        Args:
            slots_R: slots of the rows, see `next_slots`.
            pooled_RF: pooled features.
            labels_R: class labels.
            captions_R: caption ids.
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
        """Return the state for a bit-exact resume; it shares tensors, which are never changed in place."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.num_read = state["num_read"]
        self.pooled_VF, self.labels_V, self.captions_V = state["pooled_VF"], state["labels_V"], state["captions_V"]
