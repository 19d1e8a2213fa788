"""Views of rows: a source that gives one random view of every row, the same at every reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flyp_saflex.images.reader import Source
from flyp_saflex.records import Edit, Sample
from flyp_saflex.training.sampling import derived_seed
from flyp_saflex.training.upstreams import ItemOperation


class ViewSource:
    """Source of rows changed by random operations.

    Args:
        source: of the rows as they are.
        operations: applied in order.
        seed: of the view; every row has draws of its own.
    """

    def __init__(self, source: Source, operations: Sequence[ItemOperation], seed: int) -> None:
        self.source, self.operations, self.seed = source, operations, seed
        self.notes: list[str] = []

    def read(self, item: Sample | Edit, *, box_crop: bool = False) -> Any:
        """Return the row's view."""
        row = self.source.read(item, box_crop=box_crop)
        for number, operation in enumerate(self.operations):
            row = operation.on(row, derived_seed(self.seed, item.item, number))
        return row

    def tensor(self, row: Any) -> Tensor:
        """Return what the model takes."""
        return self.source.tensor(row)

    def key(self, item: Sample | Edit) -> str:
        """Return the empty string: views are not kept."""
        return ""
