"""Evidence on edits: kinds that tell something are used, others are not, and good edits are kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flyp_saflex.saflex.evidence import combine, decide, on_grid, own_source_evidence, source_evidence

K, D = 6, 40


def planted(noise, *, num_edits=900, strength=3.0, seed=0):
    """Return own and true labels (K: none), and a function that draws a kind of evidence of a given strength."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(K, (num_edits,), generator=generator)
    other = (own + torch.randint(1, K, (num_edits,), generator=generator)) % K
    true = torch.where(torch.rand(num_edits, generator=generator) < noise, other, own)

    def kind(strength=strength):
        scores = torch.randn(num_edits, K, generator=generator)
        return scores + strength * F.one_hot(true, K)

    return own, true, kind


def pictures(*, num_sources=60, edits_each=4, noise=0.3, seed=0):
    """Return features of sources and edits: an edit is its source, or another class's, moved by its instruction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_sources) % K
    sources = torch.randn(num_sources, D, generator=generator)
    source = torch.arange(num_sources).repeat_interleave(edits_each)
    groups = torch.arange(edits_each).repeat(num_sources)
    swap = torch.rand(len(source), generator=generator) < noise
    shown = torch.where(swap, (source + torch.randint(1, K, (len(source),), generator=generator)) % num_sources, source)
    moves = 5 * torch.randn(edits_each, D, generator=generator)
    edits = sources[shown] + moves[groups] + 0.5 * torch.randn(len(source), D, generator=generator)
    return edits, sources, labels, source, groups, labels[shown]


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5])
def test_good_edits_are_kept_and_the_noise_rate_is_the_planted_one(noise):
    own, true, kind = planted(noise)
    decision = decide({"a": kind(), "b": kind()}, own)
    assert decision.status == "calibrated"
    assert decision.rho == pytest.approx(noise, abs=0.1)
    assert decision.weights_N[true == own].mean() > (0.9 if noise else 0.98)
    if noise:
        swapped = true != own
        right = decision.labels_NK[swapped, true[swapped]] * decision.weights_N[swapped]
        assert right.sum() > 0.8 * decision.weights_N[swapped].sum()
        assert decision.relabelled_fraction > 0
    assert 0 < decision.kept_fraction <= 1


def test_a_kind_that_says_nothing_gets_no_weight_and_spoils_nothing():
    own, true, kind = planted(0.5)
    useful, noise = kind(), kind(0.0)
    alone, both = combine({"useful": useful}, own), combine({"useful": useful, "noise": noise}, own)
    assert both.weights["noise"] < 0.1 * both.weights["useful"]
    assert both.separations["useful"] == pytest.approx(alone.separations["useful"])
    weights = decide({"useful": useful, "noise": 100 * noise}, own).weights_N
    torch.testing.assert_close(
        weights[true == own].mean(), decide({"useful": useful}, own).weights_N[true == own].mean(), atol=0.05, rtol=0
    )


def test_a_kind_that_speaks_against_own_labels_is_left_out():
    own, _, kind = planted(0.25)
    useful = kind()
    combined = combine({"useful": useful, "reversed": -kind()}, own)
    assert combined.weights["reversed"] == 0
    assert combined.separations["reversed"] < 0


def test_kinds_are_weighted_by_what_they_tell_at_any_noise_rate():
    ratios = []
    for noise in (0.0, 0.5):
        own, _, kind = planted(noise, num_edits=6000)
        weights = combine({"strong": kind(2.0), "weak": kind(1.0)}, own).weights
        ratios.append(weights["strong"] / weights["weak"])
    assert ratios[0] == pytest.approx(2, rel=0.2)  # of independent kinds: as their distances
    assert ratios[1] == pytest.approx(ratios[0], rel=0.25)


def test_a_kind_given_twice_counts_once():
    own, _, kind = planted(0.25)
    first, second = kind(), kind()
    once, twice = combine({"a": first, "b": second}, own), combine({"a": first, "a again": first, "b": second}, own)
    assert twice.weights["a"] + twice.weights["a again"] == pytest.approx(once.weights["a"], rel=0.05)
    decided = [decide({"a": first, "b": second} | more, own).weights_N for more in ({}, {"a again": first})]
    torch.testing.assert_close(*decided, atol=0.15, rtol=0)


def test_the_unit_of_a_kind_and_an_offset_per_edit_do_not_matter():
    own, _, kind = planted(0.25)
    first, second = kind(), kind()
    plain = combine({"a": first, "b": second}, own).scores_NK
    moved = combine({"a": 1000 * first + torch.arange(len(own))[:, None], "b": second}, own).scores_NK
    torch.testing.assert_close(plain, moved, atol=1e-3, rtol=1e-3)  # float32 loses digits to the offset


def test_without_information_or_with_few_edits_everything_is_kept():
    own, _, kind = planted(0.25)
    for scores, labels, status in (
        (kind(0.0), own, "uninformative"),
        (torch.zeros_like(kind()), own, "uninformative"),
        (kind()[:50], own[:50], "too few"),
    ):
        decision = decide({"a": scores}, labels)
        assert decision.status == status
        assert decision.weights_N.eq(1).all()
        assert torch.equal(decision.labels_NK, F.one_hot(labels, K).float())
        assert torch.equal(decision.candidates_NK, F.one_hot(labels, K).bool())


def test_missing_evidence_is_left_to_the_other_kind_and_lost_edits_get_no_weight():
    own, _, kind = planted(0.25)
    first, second = kind(), kind()
    first[0] = torch.nan
    first[1], second[1] = torch.nan, torch.nan
    for evidence in ({"a": first, "b": second}, {"a": first[:50], "b": second[:50]}):
        decision = decide(evidence, own[: len(evidence["a"])])
        assert decision.weights_N[1] == 0
        assert decision.weights_N.isfinite().all()
        assert decision.labels_NK.isfinite().all()
    assert combine({"a": first, "b": second}, own).scores_NK[0].isfinite().all()


def test_a_lower_threshold_is_more_lenient_and_labels_stay_on_the_simplex():
    own, _, kind = planted(0.5, strength=2.0)
    evidence = {"a": kind()}
    lenient, strict = decide(evidence, own, threshold=0.1), decide(evidence, own, threshold=0.5)
    assert (lenient.weights_N >= strict.weights_N - 1e-6).all()
    assert lenient.kept_fraction > strict.kept_fraction
    for decision in (lenient, strict):
        torch.testing.assert_close(decision.labels_NK.sum(dim=1), torch.ones(len(own)))
        assert decision.candidates_NK.any(dim=1).all()
        assert decision.candidates_NK.gather(1, decision.labels_NK.argmax(dim=1, keepdim=True)).all()


def test_edits_resemble_sources_of_the_class_that_they_show():
    edits, sources, labels, source, groups, shown = pictures()
    scores = source_evidence(edits, sources, labels, groups, K)
    assert (scores.argmax(dim=1) == shown).float().mean() > 0.95
    moved = source_evidence(edits + 100 * groups[:, None], sources, labels, groups, K)
    torch.testing.assert_close(moved, scores, atol=1e-2, rtol=1e-3)  # what an instruction does to all pictures does not count
    decision = decide({"source": scores}, labels[source])
    assert decision.weights_N[shown == labels[source]].mean() > 0.9
    plain = own_source_evidence(edits, sources, labels, source, groups, K)
    assert (plain.argmax(dim=1) == shown).float().mean() > 0.95


def test_the_number_of_sources_of_a_class_does_not_speak_for_it():
    edits, sources, labels, _, groups, shown = pictures(noise=0.0)
    unrelated = torch.randn(400, D, generator=torch.Generator().manual_seed(9))
    many = source_evidence(
        edits, torch.cat([sources, unrelated]), torch.cat([labels, torch.zeros(400, dtype=torch.long)]), groups, K
    )
    assert (many.argmax(dim=1) == shown)[shown != 0].float().mean() > 0.9


def test_classes_without_source_and_broken_features_are_not_finite():
    edits, sources, labels, _, groups, _ = pictures()
    edits[3], sources[5] = torch.nan, torch.inf
    scores = source_evidence(edits, sources, labels, groups, K + 1)
    assert scores[:, K].eq(-torch.inf).all()
    assert not scores[3].isfinite().any()
    assert scores[torch.arange(len(edits)) != 3, :K].isfinite().all()


def test_both_kinds_of_activations_are_pooled_to_a_grid():
    maps = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8)
    tokens = torch.cat([torch.full((2, 1, 3), 1e9), maps.flatten(2).transpose(1, 2)], dim=1)
    assert on_grid(maps).shape == (2, 48)
    torch.testing.assert_close(on_grid(maps), on_grid(tokens))
    torch.testing.assert_close(on_grid(maps), on_grid(tokens[:, 1:]))  # SigLIP has no class token
    torch.testing.assert_close(on_grid(maps, side=8), maps.flatten(1))
