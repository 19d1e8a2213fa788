"""What several processes are told before they start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from timm.layers import BatchNormAct2d
from torch import nn

from flyp_saflex.config import Config
from flyp_saflex.training.distributed import statistics_note


@pytest.mark.parametrize(
    ("norm", "num_processes", "options", "told"),
    [
        (BatchNormAct2d(4), 2, ("train.freeze_batchnorm=false",), True),
        (BatchNormAct2d(4), 1, ("train.freeze_batchnorm=false",), False),
        (BatchNormAct2d(4), 2, ("train.freeze_batchnorm=true",), False),
        (nn.BatchNorm2d(4), 2, ("train.freeze_batchnorm=false",), False),
        (nn.LayerNorm(4), 2, ("train.freeze_batchnorm=false",), False),
    ],
)
def test_norms_that_are_not_shared_by_processes_are_told(
    make_config: Callable[..., Config], norm: nn.Module, num_processes: int, options: tuple[str, ...], told: bool
) -> None:
    notes = statistics_note(nn.Sequential(norm), make_config("train.batch_size=6", *options), num_processes)
    assert len(notes) == told
    if told:
        assert notes[0].startswith(
            "1 norms (first: 0) normalise each process's own rows (3 training rows), so 2 processes do not"
        )
