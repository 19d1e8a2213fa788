"""The null rule: its noise rate is the planted one, and it keeps what there is no evidence against."""

from __future__ import annotations

import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from flyp_saflex.saflex.null_rule import margins, null_rule, pool_adjacent_violators, standardise


def planted(noise, *, num_edits=1200, num_labels=7, strength=4.0, swapped=1.0, seed=0):
    """Return scores, own labels, true labels (K: none) of edits of which a share shows another class, or none."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(num_labels, (num_edits,), generator=generator)
    is_bad = torch.rand(num_edits, generator=generator) < noise
    is_swapped = torch.rand(num_edits, generator=generator) < swapped
    other = (own + torch.randint(1, num_labels, (num_edits,), generator=generator)) % num_labels
    true = torch.where(is_bad, torch.where(is_swapped, other, num_labels), own)
    scores = torch.randn(num_edits, num_labels + 1, generator=generator)
    scores[torch.arange(num_edits), true] += strength
    return scores[:, :num_labels], own, true


@pytest.mark.parametrize("num_labels", [4, 7, 40])
@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5])
def test_the_noise_rate_is_the_planted_one_and_swapped_edits_are_relabelled(noise, num_labels):
    scores, own, true = planted(noise, num_labels=num_labels, strength=5.0)
    verdict = null_rule(scores, own)
    assert verdict.status == "calibrated"
    assert verdict.rho == pytest.approx(noise, abs=0.1)
    good, kept = true == own, verdict.weights_N > 0
    assert verdict.weights_N[good].mean() > (0.8 if noise else 0.98)
    assert (verdict.labels_N == own)[good & kept].float().mean() > 0.99
    if noise:
        weights = verdict.weights_N[~good]
        assert (weights * (verdict.labels_N == true)[~good]).sum() >= 0.9 * weights.sum() > 0  # on the class that they show


@pytest.mark.parametrize("noise", [0.25, 0.5, 0.75])
def test_edits_that_show_no_class_weigh_less_than_good_ones(noise):
    scores, own, true = planted(noise, swapped=0.5)
    verdict = null_rule(scores, own)
    # The label of an edit without rival classes stands above the null of good edits, so part of them count as right.
    assert 0.5 * noise <= verdict.rho <= noise + 0.1
    assert verdict.weights_N[true == 7].mean() < 0.6 * verdict.weights_N[true == own].mean()


def test_a_swap_of_half_of_two_labels_cannot_be_told_from_no_information():
    scores, own, _ = planted(0.5, num_labels=2)
    assert null_rule(scores, own).status == "uninformative"
    scores, own, true = planted(0.25, num_labels=2)
    verdict = null_rule(scores, own)
    assert verdict.rho == pytest.approx(0.25, abs=0.1)
    assert verdict.weights_N[true == own].mean() > 0.8


@pytest.mark.parametrize("scores", [torch.zeros(300, 5), torch.randn(300, 5, generator=torch.Generator().manual_seed(3))])
def test_scores_without_information_drop_nothing(scores):
    own = torch.arange(300) % 5
    verdict = null_rule(scores, own)
    assert verdict.status == "uninformative"
    assert verdict.weights_N.eq(1).all()
    assert torch.equal(verdict.labels_N, own)
    assert verdict.rho != verdict.rho  # NaN: nothing was estimated


def test_scores_of_few_values_are_decided_on():
    scores, own, true = planted(0.25)
    verdict = null_rule((scores > 2).float(), own)  # mostly ties
    assert verdict.status == "calibrated"
    assert verdict.rho == pytest.approx(0.25, abs=0.1)
    assert verdict.weights_N[true == own].mean() > verdict.weights_N[true != own].mean() + 0.3


def test_too_few_edits_get_no_weight():
    scores, own, _ = planted(0.0, num_edits=95)
    verdict = null_rule(scores, own)
    assert verdict.status == "too few"
    assert verdict.weights_N.eq(0).all()
    assert null_rule(scores, own, min_edits=95).status == "calibrated"


def test_shift_and_scale_of_all_scores_change_nothing():
    scores, own, _ = planted(0.5)
    plain, moved = null_rule(scores, own), null_rule(scores * 3 - 100, own)
    assert plain.rho == pytest.approx(moved.rho)
    torch.testing.assert_close(plain.weights_N, moved.weights_N)


def test_the_order_of_edits_and_of_labels_changes_nothing():
    scores, own, _ = planted(0.5)
    plain = null_rule(scores, own)
    rows = torch.randperm(len(own), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(null_rule(scores[rows], own[rows]).weights_N, plain.weights_N[rows])
    renamed = null_rule(scores.flip(1), scores.shape[1] - 1 - own)
    torch.testing.assert_close(renamed.weights_N, plain.weights_N)
    kept = plain.weights_N > 0  # below, labels may be equally likely
    assert torch.equal(renamed.labels_N[kept], scores.shape[1] - 1 - plain.labels_N[kept])


def test_labels_that_never_occur_do_not_disturb():
    scores, own, true = planted(0.25, num_labels=4)
    noise = torch.randn(len(own), 3, generator=torch.Generator().manual_seed(5))
    verdict = null_rule(torch.cat([scores, noise], dim=1), own)
    assert verdict.rho == pytest.approx(0.25, abs=0.1)
    assert verdict.weights_N[true == own].mean() > 0.8


def test_labels_whose_scores_have_another_unit_are_made_comparable():
    scores, own, true = planted(0.25)
    scores[:, 2] = 50 * scores[:, 2] + 1000  # unadjusted, label 2 wins every edit
    verdict = null_rule(scores, own)
    assert verdict.rho == pytest.approx(0.25, abs=0.1)
    assert verdict.weights_N[true == own].mean() > 0.8


def test_scores_that_are_not_finite_concern_their_edit_only():
    scores, own, _ = planted(0.25)
    broken = scores.clone()
    broken[0] = torch.nan
    broken[1, own[1]] = -torch.inf
    verdict, plain = null_rule(broken, own), null_rule(scores[2:], own[2:])
    assert verdict.num_invalid == 2
    assert verdict.weights_N[:2].eq(0).all()
    assert verdict.rho == pytest.approx(plain.rho)
    torch.testing.assert_close(verdict.weights_N[2:], plain.weights_N)
    scores[5, (own[5] + 1) % 7] = torch.inf  # another label: nothing is known about it
    verdict = null_rule(scores, own)
    assert verdict.num_invalid == 0
    assert verdict.posterior_NJ[5, (own[5] + 1) % 7] == 0
    assert verdict.weights_N.isfinite().all()


def test_posteriors_are_probabilities_and_weights_follow_from_them():
    scores, own, _ = planted(0.5)
    verdict = null_rule(scores, own)
    torch.testing.assert_close(verdict.posterior_NJ.sum(dim=1), torch.ones(len(own)))
    best, labels = verdict.posterior_NJ[:, :-1].max(dim=1)
    torch.testing.assert_close(verdict.weights_N, (2 * best - 1).clamp(min=0))
    assert torch.equal(verdict.labels_N, labels)


def test_margins_are_against_the_best_other_label():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]])
    everything = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(margins(scores, everything), torch.tensor([[-2.0, 1.0, -1.0], [0.0, 0.0, -5.0]]))
    without = everything.clone()
    without[0, 1] = False
    assert margins(scores, without)[0].tolist() == [-1.0, -torch.inf, 1.0]


def test_labels_of_one_own_edit_are_standardised_like_the_rest():
    scores, own, _ = planted(0.0, num_labels=4)
    own = torch.zeros_like(own)  # every edit came with label 0, so its null is empty
    own_NK = torch.nn.functional.one_hot(own, 4).bool()
    result = standardise(scores, own_NK, torch.ones_like(own_NK))
    null = result[:, 1:]
    assert result.isfinite().all()
    assert null.mean().abs() < 0.05
    assert abs(float(null.std()) - 1) < 0.05
    torch.testing.assert_close(result[:, 0], (scores[:, 0] - scores[:, 1:].mean()) / scores[:, 1:].std(), atol=0.05, rtol=0.05)


def test_pooling_adjacent_violators_is_isotonic_regression():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values, weights = (torch.rand(12, generator=generator, dtype=torch.float64) for _ in range(2))
        expected = IsotonicRegression().fit_transform(range(12), values.numpy(), sample_weight=weights.numpy())
        torch.testing.assert_close(pool_adjacent_violators(values, weights), torch.from_numpy(expected))
