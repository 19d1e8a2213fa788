"""The verdict on planted numbers: yes, no, not shown, how many more seeds, and who is chosen where."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from flyp_saflex.comparison.conditions import ROLES, Condition, role_of
from flyp_saflex.comparison.runs import Outcome
from flyp_saflex.comparison.verdict import best, compare_pair, cost, earns_its_keep, verdict, worth_having
from flyp_saflex.evaluation.statistics import seeds_to_settle

FLAT = (0.5, 0.5, 0.5, 0.5)


def planted(
    name, test=FLAT, select=FLAT, seconds=(1.0, 1.0, 1.0, 1.0), machines=("cpu",) * 4, edits="", metric="accuracy", once=()
):
    by_seed = [dict(enumerate(values)) for values in (test, select, seconds, once, machines)]
    return Outcome(Condition(name, role_of(name), edits, ()), metric, *by_seed)


def above(points, spread=0.1):
    """Values around 50 % plus `points`, with a deviation of about `spread` points."""
    return tuple(0.5 + (points + spread * wiggle) / 100 for wiggle in (-1, 1, -1, 1))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((role, role) for role in ROLES),
        ("filter-argmax", "filter"),
        ("no-edits-same-rows-twice", "no-edits-same-rows"),
        ("no-edits-long", "no-edits"),
        ("SAFLEX paper", "saflex"),
        ("saflex-robust @ half", "saflex"),
        ("filters", ""),
        ("mine", ""),
        ("my-saflex", ""),
    ],
)
def test_a_condition_plays_the_part_that_its_name_starts_with(name, role):
    assert role_of(name) == role


@pytest.mark.parametrize(("points", "answer"), [(3, "Yes (n = 4)"), (-3, "No (n = 4)"), (0.01, "Not shown at n = 4")])
def test_edits_are_worth_having_when_their_interval_is_above_no_edits(points, answer):
    text = worth_having([planted("no-edits"), planted("trusted", above(points))], "id_val")
    assert f"Are edits worth having? {answer}: trusted against no-edits (as many steps, fewer rows)" in text


def test_equal_budget_is_as_many_rows_where_that_condition_is_there():
    outcomes = [planted("no-edits", above(-5)), planted("no-edits-same-rows", above(2)), planted("trusted", above(0))]
    text = worth_having(outcomes, "id_val")
    assert "No (n = 4): trusted against no-edits-same-rows (as many rows per step): -2.0" in text
    assert "Against no-edits (as many steps, fewer rows): +5.0" in text


def test_the_best_use_of_edits_and_the_best_filter_are_chosen_on_the_select_split():
    outcomes = [
        planted("no-edits"),
        planted("trusted", above(1), select=above(1)),
        planted("saflex", above(4), select=above(2)),
        planted("filter-lucky", test=above(9), select=above(-1)),
        planted("filter-honest", test=above(2), select=above(3)),
    ]
    assert "filter-honest, the best of 4 uses of them on id_val," in worth_having(outcomes, "id_val")
    text = earns_its_keep(outcomes, "id_val")
    assert "the best plain filter on id_val (filter-honest) yes, +2.0" in text
    assert "filter-lucky" not in text


def test_a_condition_trained_on_the_select_split_is_not_chosen_on_it():
    assert best([planted("filter-a", select=()), planted("filter-b")]).condition.name == "filter-b"
    assert best([planted("filter-a", select=())]) is None


@pytest.mark.parametrize(
    ("rivals", "answer"),
    [
        ((-2, -3, -1), "Yes (n = 4)"),
        ((-2, 3, -1), "No (n = 4)"),
        ((-2, 0, -1), "Not shown at n = 4"),
        ((0, 0, 3), "No (n = 4)"),
    ],
)
def test_saflex_earns_its_keep_only_against_all_of_its_rivals(rivals, answer):
    names = ("trusted", "filter-argmax", "validation-trained")
    outcomes = [planted("saflex", above(0)), *(planted(n, above(p, -0.1)) for n, p in zip(names, rivals, strict=True))]
    text = earns_its_keep(outcomes, "id_val")
    assert text.startswith(f"Does SAFLEX earn its keep? {answer}: against trusting every edit (trusted)")
    assert all(f"({name})" in text for name in names)


def test_answers_agree_with_a_paired_t_test():
    rng, answers = np.random.default_rng(0), []
    for _ in range(60):
        a, b = rng.normal(0.52, 0.02, size=6), rng.normal(0.5, 0.02, size=6)
        found = compare_pair(planted("saflex", a), planted("trusted", b))
        answers.append(found.answer)
        expected = "not shown" if ttest_rel(a, b).pvalue > 0.05 else "yes" if a.mean() > b.mean() else "no"
        assert found.answer == expected
        assert (found.missing is not None) <= (found.answer == "not shown")
    assert {"yes", "not shown"} <= set(answers)


def test_seeds_to_settle_equals_brute_force():
    from scipy.stats import t

    for mean, deviation in [(1, 1), (-1, 3), (0.3, 1), (5, 1), (1, 6.9), (1, 7.2), (0.01, 1), (0, 1)]:
        enough = [n for n in range(2, 201) if t.ppf(0.975, n - 1) * deviation / n**0.5 < abs(mean)]
        assert seeds_to_settle(mean, deviation) == (enough[0] if enough else None)
    assert seeds_to_settle(1, 7.2) is None


def test_missing_seeds_are_told_as_a_number_up_to_two_hundred():
    few = compare_pair(planted("saflex", (0.52, 0.50, 0.53, 0.49)), planted("trusted"))
    deviation = float(np.std([0.02, 0.0, 0.03, -0.01], ddof=1))
    assert few.missing == seeds_to_settle(0.01, deviation) - 4
    assert f"about {few.missing} more seeds would settle it" in few.text
    many = compare_pair(planted("saflex", (0.6, 0.4, 0.6, 0.401)), planted("trusted"))
    assert many.missing is None
    assert "more than 200 seeds would be needed" in many.text
    assert "the same with every seed" in compare_pair(planted("saflex"), planted("trusted")).text


def test_one_seed_has_no_interval_and_says_so():
    lines = verdict([planted("no-edits", (0.5,)), planted("trusted", (0.9,))], measure="night", select="id_val")
    assert "Not shown at n = 1: trusted against no-edits" in lines[0]
    assert "+40.0 points, one seed: no interval" in lines[0]
    assert any(line.startswith("One seed has no interval") for line in lines)


def test_cost_is_the_median_over_seeds_of_ratios_on_one_machine():
    trusted = planted("trusted", seconds=(1.0, 2.0, 1.0, 1.0))
    assert "takes 1.20 times as long as one of trusted (median over 4 seeds)" in cost(
        [trusted, planted("saflex", seconds=(1.1, 2.2, 1.3, 9.0))]
    )
    moved = planted("saflex", seconds=(1.1, 2.4, 1.3, 9.0), machines=("cpu", "cpu", "gpu", "gpu"))
    assert "takes 1.15 times as long as one of trusted (median over 2 seeds)" in cost([trusted, moved])
    early = planted("saflex", once=(30.0, 30.0, 40.0, 30.0))
    assert "(median over 4 seeds); deciding about its edits before training takes as long as 30 of them." in cost(
        [trusted, early]
    )
    assert "different machines" in cost([trusted, planted("saflex", machines=("gpu",) * 4)])


@pytest.mark.parametrize("names", [("trusted",), ("no-edits",), ("mine",)])
def test_what_cannot_be_asked_is_said(names):
    lines = verdict([planted(name) for name in names], measure="night", select="id_val")
    assert all("Not asked" in line for line in lines[:3])


def test_controls_are_told_below_the_answers():
    outcomes = [planted("saflex", above(2)), planted("permuted"), planted("oracle", above(5)), planted("zero-shot")]
    text = "\n".join(verdict(outcomes, measure="night", select="id_val")[3:])
    assert "the gains of other rows (permuted): yes, +2.0" in text
    assert "the oracle (oracle): no, -3.0" in text
    assert "the pretrained model (zero-shot): yes, +2.0" in text


def test_the_share_of_the_oracles_gain_is_told_where_there_is_such_a_gain():
    outcomes = [planted("trusted", above(-2)), planted("saflex", above(1)), planted("oracle", above(2))]
    share = "SAFLEX reaches 75% of what the oracle gains over trusting (+4.0 [+4.0, +4.0] points; means over 4 seeds)."
    assert share in verdict(outcomes, measure="night", select="id_val")
    useless = [*outcomes[:2], planted("oracle", above(-2, -0.1))]
    assert not any("reaches" in line for line in verdict(useless, measure="night", select="id_val"))


def test_a_metric_that_is_the_better_the_less_is_compared_by_improvement():
    outcomes = [
        planted("trusted", above(0), select=above(0), metric="ece"),
        planted("filter-a", above(-3), select=above(-2), metric="ece"),
        planted("filter-b", above(3), select=above(2), metric="ece"),
        planted("saflex", above(-5, -0.1), metric="ece"),
    ]
    lines = verdict(outcomes, measure="night", select="id_val")
    assert lines[1].startswith("Does SAFLEX earn its keep? Yes (n = 4): against trusting every edit (trusted) yes, +5.0")
    assert "(filter-a) yes, +2.0" in lines[1]
    assert "Calibration error on night, the less the better" in lines[3]


def test_sets_of_edits_have_answers_of_their_own():
    outcomes = [planted("no-edits"), planted("trusted @ a", above(2), edits="a"), planted("trusted @ b", above(-2), edits="b")]
    lines = verdict(outcomes, measure="night", select="id_val")
    assert lines[0].startswith("[a] Are edits worth having? Yes (n = 4): trusted against no-edits")
    assert lines[3].startswith("[b] Are edits worth having? No (n = 4): trusted against no-edits")
