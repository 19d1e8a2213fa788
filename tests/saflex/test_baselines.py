"""The baselines do what their one sentence says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flyp_saflex.errors import ConfigError
from flyp_saflex.saflex.baselines import (
    keep_at_random,
    keep_lowest_losses,
    keep_where_argmax_agrees,
    permuted_gains,
    smooth_by_strength,
    smoothing_curve,
)
from flyp_saflex.saflex.losses import soft_cross_entropy


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_smoothing_leaves_untouched_rows_alone_and_spreads_the_rest_evenly():
    labels = smooth_by_strength(torch.tensor([2, 0, 1]), torch.tensor([0.0, 0.5, 1.0]), 3, alpha=lambda strength: 0.4 * strength)
    torch.testing.assert_close(labels, torch.tensor([[0, 0, 1], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2]]))
    curve = smoothing_curve(torch.tensor([0.0, 0.5, 1.0, 7.0]), lowest_confidence=0.2, power=2)
    torch.testing.assert_close(curve, torch.tensor([0.0, 0.2, 0.8, 0.8]))
    default = smooth_by_strength(torch.tensor([0]), torch.tensor([1.0]), 4)
    torch.testing.assert_close(default, torch.tensor([[0.5, 0.5 / 3, 0.5 / 3, 0.5 / 3]]))
    with pytest.raises(ConfigError, match="at least 2 classes, found 1"):
        smooth_by_strength(torch.tensor([0]), torch.tensor([0.5]), 1)


def test_argmax_filter():
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [torch.nan, 0.0]])
    assert keep_where_argmax_agrees(logits, torch.tensor([0, 1, 0])).tolist() == [1.0, 0.0, 0.0]


def test_lowest_losses_filter():
    losses = torch.tensor([3.0, 1.0, torch.nan, 2.0])
    assert keep_lowest_losses(losses, 0.5).tolist() == [0.0, 1.0, 0.0, 1.0]
    assert keep_lowest_losses(losses, 0.75).tolist() == [1.0, 1.0, 0.0, 1.0]
    assert keep_lowest_losses(losses, 1.0).tolist() == [1.0] * 4
    assert keep_lowest_losses(losses, 0.0).tolist() == [0.0] * 4


def test_random_filter_keeps_the_fraction_and_is_seeded():
    kept = keep_at_random(1000, 0.3, seeded())
    assert kept.sum() == 300
    assert torch.equal(kept, keep_at_random(1000, 0.3, seeded()))
    assert not torch.equal(kept, keep_at_random(1000, 0.3, seeded(1)))


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_fractions_outside_0_1_are_refused(fraction):
    with pytest.raises(ConfigError, match=r"keep_fraction = .* from 0 to 1"):
        keep_at_random(4, fraction, seeded())
    with pytest.raises(ConfigError, match="keep_fraction"):
        keep_lowest_losses(torch.ones(4), fraction)


def test_filters_are_weights_of_the_losses():
    logits, labels = torch.randn(6, 3, generator=seeded()), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = keep_where_argmax_agrees(logits, labels)
    kept = weights > 0
    assert 0 < kept.sum() < 6
    found = soft_cross_entropy(logits, F.one_hot(labels, 3), weights)
    torch.testing.assert_close(found, F.cross_entropy(logits[kept], labels[kept]))


def test_permuted_gains_move_every_row_and_keep_the_gains_of_own_labels():
    gains_AK, ids_A = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) * 7
    labels_A = torch.arange(12) % 4
    upstream_AK = torch.nn.functional.one_hot(labels_A, 4).float()
    moved_AK = permuted_gains(gains_AK, upstream_AK, ids_A)
    own, moved_own = gains_AK[torch.arange(12), labels_A], moved_AK[torch.arange(12), labels_A]
    assert torch.equal(own.sort().values, moved_own.sort().values)
    assert not (own == moved_own).any()
    rows, moved = ({tuple(sorted(row)) for row in gains.tolist()} for gains in (gains_AK, moved_AK))
    assert rows == moved


def test_permuted_gains_do_not_depend_on_how_rows_are_shared_among_processes():
    generator = torch.Generator().manual_seed(1)
    gains_AK, ids_A, order = torch.randn(9, 3, generator=generator), torch.arange(9) * 5, torch.randperm(9, generator=generator)
    upstream_AK = torch.eye(3)[torch.arange(9) % 3]
    moved_AK = permuted_gains(gains_AK, upstream_AK, ids_A)
    assert torch.equal(permuted_gains(gains_AK[order], upstream_AK[order], ids_A[order]), moved_AK[order])
