"""Number types with a range, for options; msgspec checks them and refuses NaN. Every range is finite."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

LARGEST = 1e300
"""Largest value of an option without another limit: infinity is none."""
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]
NonNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
