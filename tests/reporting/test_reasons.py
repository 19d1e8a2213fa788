"""Reasons in words: they name what decided, and only that."""

import math

import pytest

from flyp_saflex import recipe
from flyp_saflex.reporting.gallery import Decision, last_decisions, shares
from flyp_saflex.reporting.reasons import group_reason, reason

NAMES = {0: "dog", 1: "horse"}


def config(*options):
    return recipe.load("folder", ["saflex.enabled=true", "augment.upstream=cache", *options])


def dropped(**fields):
    return Decision("e", 0, 0.0, [(0, 1.0)], **fields)


def test_negative_gain_and_the_vote_are_told():
    told = reason(dropped(gain=-2.5), config("saflex.preset=robust"), NAMES)
    assert told == (
        "Its own label would not lower the validation loss (gain of its own label: \N{MINUS SIGN}2.5), "
        "and the model under training did not predict dog."
    )
    assert "predict" not in reason(dropped(gain=-2.5), config("saflex.preset=robust", "saflex.agreement=ignore"), NAMES)


def test_vote_alone_is_told_where_the_gain_is_positive():
    told = reason(dropped(gain=2.5), config("saflex.preset=robust", "saflex.agreement=require"), NAMES)
    assert told == "The model under training did not predict dog (gain of its own label: +2.5)."


def test_filter_is_told_where_the_rule_keeps():
    told = reason(dropped(gain=2.5), config("saflex.preset=robust", "augment.filter=argmax"), NAMES)
    assert told.startswith("The filter augment.filter = argmax dropped it")


def test_evidence_tells_the_posterior_and_the_kinds():
    options = config("saflex.preset=posterior", "saflex.evidence_threshold=0.3")
    told = reason(dropped(own_posterior=0.004, none_posterior=0.8, gain=-1.0), options, NAMES)
    assert told == "Evidence: dog below 1 %, none of the classes 80 %."
    assert reason(dropped(), options, NAMES) == "Evidence: dog is not likely enough.", "logs of earlier versions"
    group = group_reason("dropped", options)
    assert "no class more than 30 % likely" in group
    assert group.count("resemblance to training pictures") == 1, "two layers of one kind are one reason"
    assert "gain" not in told + group
    assert group_reason("dropped", config("saflex.preset=robust")) == ""


@pytest.mark.parametrize("preset", ["robust", "posterior", "paper-log"])
def test_gain_that_is_not_finite_is_told_before_anything_else(preset):
    assert "not finite" in reason(dropped(gain=math.nan), config(f"saflex.preset={preset}"), NAMES)


@pytest.mark.parametrize("preset", ["robust", "posterior", "paper-log"])
def test_kept_edits_need_no_reason_and_all_dropped_ones_have_one(preset):
    kept = Decision("e", 0, 1.0, [(0, 1.0)], gain=1.0)
    assert reason(kept, config(f"saflex.preset={preset}"), NAMES) == ""
    assert reason(dropped(gain=-1.0), config(f"saflex.preset={preset}"), NAMES) != ""
    assert reason(dropped(gain=-1.0), None, NAMES) == ""


def test_shares_count_fates_and_average_gains_over_visits():
    def row(name, label, weight, gain, top):
        return {"id": name, "label": label, "weight": weight, "gain": gain, "learned_label": top}

    decisions = last_decisions(
        [row("a", 0, 0, 1.0, 0), row("a", 0, 1, 3.0, 0), row("b", 0, 0, None, 0), row("c", 0, 1, 5.0, 1), row("d", 1, 0, -1.0, 1)]
    )
    dog, horse = shares(decisions, lambda decision: decision.label)
    assert (dog.name, dog.n, dog.kept, dog.relabelled) == (0, 3, pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert dog.mean_gain == pytest.approx((2.0 + 5.0) / 2), "a gain that was not finite does not count"
    assert (horse.n, horse.kept, horse.mean_gain) == (1, 0, -1.0)
