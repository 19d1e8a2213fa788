"""Options of the command `compare`: a recipe's `[compare]` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The command `compare`: conditions, seeds, and the measure of its verdict."""

    seeds: Annotated[tuple[int, ...], Meta(min_length=1)] = (0, 1, 2, 3, 4)
    """Seeds of every condition; differences are paired by seed."""
    baseline: str = ""
    """Condition that the tables of the report compare with; empty: the one without edits, else the first."""
    metric: str = "accuracy"
    """Metric of the verdict, a name in `tables.METRICS`."""
    split: str = ""
    """Test split of the verdict; empty: the mean over the OOD test splits, or over the ID ones if there are no others."""
    common: tuple[str, ...] = ()
    """Overrides `section.field=value` of every condition. In overrides `{seed}` stands for the seed, and `{kept}` for the mean
    fraction of the augmented rows that SAFLEX kept with the same seed."""
    conditions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Overrides by condition. A name starts with its role in the verdict: `zero-shot`, `no-edits`, `no-edits-same-rows`,
    `trusted`, `filter`, `saflex`, `validation-trained`, `permuted` or `oracle`. Empty: the usual conditions."""
    edits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Overrides by set of edits: each condition with augmented rows is run on every set, as `condition @ set`, and every set
    has a verdict of its own. Empty: the edits of the recipe."""
    keep: Literal["results", "models", "all"] = "models"
    """Large files kept in the folder of an evaluated run: none, its model, or its checkpoints as well."""
