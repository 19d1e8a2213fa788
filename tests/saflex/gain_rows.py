"""Gains of made-up rows."""

from __future__ import annotations

import torch

from flyp_saflex.saflex.closed_form import gains


def random_gains(rows=12, labels=5, seed=0):
    """Gains as a model gives them, at the raw scale that was measured (a standard deviation of tens)."""
    generator = torch.Generator().manual_seed(seed)
    logits, tangent = (torch.randn(rows, labels, generator=generator, dtype=torch.float64) for _ in range(2))
    return gains(logits, 30 * tangent), torch.randint(labels, (rows,), generator=generator)
