"""Verdict of a comparison in words: are edits worth having, does SAFLEX earn its keep, at what cost.

Numbers in, text out. Differences are paired by seed, with Student's t-interval at 95 %. Wherever one of several conditions
is picked (the best filter, the best use of edits), the select split picks it, never the test splits.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flyp_saflex.comparison.runs import Outcome
from flyp_saflex.evaluation.statistics import Interval, paired_difference, seeds_to_settle, summarise
from flyp_saflex.tables import METRICS, Metric

MOST_SEEDS = 200
USES_OF_EDITS = ("trusted", "saflex", "filter")


@dataclass(frozen=True)
class Finding:
    """One paired comparison and its answer.

    Attributes:
        better, worse: what is compared with what, in words.
        difference: by how much `better` is better, in the metric's unit.
        metric: what is compared.
        missing: further seeds that would settle it at the deviation seen; None: not open, unknown, or more than `MOST_SEEDS`.
    """

    better: str
    worse: str
    difference: Interval
    metric: Metric
    missing: int | None

    @property
    def answer(self) -> str:
        """`yes`, `no` or `not shown`."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return "not shown"
        return "yes" if low > 0 else "no" if high < 0 else "not shown"

    @property
    def text(self) -> str:
        """Difference with its interval, and what would settle it."""
        found = self.difference
        mean, low, high = (self.metric.text(value, sign=True) for value in (found.mean, found.low, found.high))
        unit = " points" if self.metric.is_fraction else ""
        if found.low is None or found.high is None:
            return f"{mean}{unit}, one seed: no interval"
        text = f"{mean} [{low}, {high}]{unit}"
        if self.answer != "not shown":
            return text
        if found.low == found.high:
            return f"{text}, the same with every seed"
        if self.missing is None:
            return f"{text}; more than {MOST_SEEDS} seeds would be needed to settle it"
        return f"{text}; about {self.missing} more seed{'s' if self.missing > 1 else ''} would settle it"


def compare_pair(better: Outcome, worse: Outcome) -> Finding | None:
    """Return the paired comparison of two conditions on the test splits; None without a shared seed."""
    metric = METRICS[better.metric]
    pair = (better, worse) if metric.larger_is_better else (worse, better)
    found = paired_difference(pair[0].test, pair[1].test)
    if found is None:
        return None
    missing = None
    if found.low is not None and found.high is not None and found.low <= 0 <= found.high:
        spread = summarise(better.test[seed] - worse.test[seed] for seed in better.test if seed in worse.test).deviation or 0.0
        needed = seeds_to_settle(found.mean, spread, most=MOST_SEEDS)
        missing = None if needed is None else max(needed - found.n, 1)
    return Finding(better.condition.short_name, worse.condition.short_name, found, metric, missing)


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the condition with the best mean on the select split, the first of equals; None without candidates.

    A condition without a value there (it was trained on the split) is no candidate.
    """

    def goodness(outcome: Outcome) -> float:
        mean = summarise(outcome.select.values()).mean
        return mean if METRICS[outcome.metric].larger_is_better else -mean

    return max((outcome for outcome in outcomes if outcome.select), key=goodness, default=None)


def verdict(outcomes: Sequence[Outcome], *, measure: str, select: str) -> list[str]:
    """Return the answers as paragraphs; with several sets of edits, one of each per set.

    Args:
        outcomes: of every condition, in the recipe's order.
        measure: splits in words.
        select: name of the split that picks conditions.
    """
    sets = list(dict.fromkeys(outcome.condition.edits for outcome in outcomes if outcome.condition.edits)) or [""]
    lines = []
    for edits in sets:
        here = [outcome for outcome in outcomes if outcome.condition.edits in ("", edits)]
        title = f"[{edits}] " if edits else ""
        lines += [f"{title}{line}" for line in (worth_having(here, select), earns_its_keep(here, select), cost(here))]
    notes = [note for edits in sets for note in remarks([o for o in outcomes if o.condition.edits in ("", edits)], edits)]
    metric = METRICS[outcomes[0].metric]
    less = "" if metric.larger_is_better else ", the less the better: a difference is by how much it is better"
    return [*lines, f"Measure: {metric.title} on {measure}{less}; paired by seed, with 95 % t-intervals.", *notes]


def worth_having(outcomes: Sequence[Outcome], select: str) -> str:
    """Answer whether edits are worth having: the best use of them against no edits at equal budget."""
    question = "Are edits worth having?"
    uses = [outcome for outcome in outcomes if outcome.condition.role in USES_OF_EDITS]
    same_steps, same_rows = _first(outcomes, "no-edits"), _first(outcomes, "no-edits-same-rows")
    against = same_rows or same_steps
    use = best(uses) or (uses[0] if len(uses) == 1 else None)
    if use is None or against is None:
        return f"{question} Not asked: it takes a condition with edits and one named no-edits."
    budget = "as many rows per step" if same_rows is not None else "as many steps, fewer rows"
    found = compare_pair(use, against)
    if found is None:
        return f"{question} Not asked: {use.condition.short_name} and {against.condition.short_name} share no seed."
    picked = f", the best of {len(uses)} uses of them on {select}," if len(uses) > 1 else ""
    text = f"{question} {_answer([found])}: {found.better}{picked} against {found.worse} ({budget}): {found.text}"
    other = compare_pair(use, same_steps) if same_steps is not None and same_rows is not None else None
    return f"{text}. Against {other.worse} (as many steps, fewer rows): {other.text}." if other else f"{text}."


def earns_its_keep(outcomes: Sequence[Outcome], select: str) -> str:
    """Answer whether SAFLEX earns its keep: against trusting, the best plain filter, and training on the validation rows."""
    question = "Does SAFLEX earn its keep?"
    ours = _first(outcomes, "saflex")
    if ours is None:
        return f"{question} Not asked: no condition's name starts with saflex."
    filters = [outcome for outcome in outcomes if outcome.condition.role == "filter"]
    filter_ = best(filters) or (filters[0] if len(filters) == 1 else None)
    rivals = [
        (_first(outcomes, "trusted"), "trusting every edit"),
        (filter_, f"the best plain filter on {select}" if len(filters) > 1 else "the plain filter"),
        (_first(outcomes, "validation-trained"), "training on the validation rows"),
    ]
    findings = [(found, words) for rival, words in rivals if rival is not None and (found := compare_pair(ours, rival))]
    if not findings:
        return f"{question} Not asked: there is no condition named trusted, filter or validation-trained with the same seeds."
    parts = [f"against {words} ({found.worse}) {found.answer}, {found.text}" for found, words in findings]
    return f"{question} {_answer([found for found, _ in findings])}: {'. '.join([parts[0], *map(_capital, parts[1:])])}."


def cost(outcomes: Sequence[Outcome]) -> str:
    """Answer at what cost: the median over seeds of the ratio of step times, SAFLEX to trusting."""
    question = "At what cost?"
    ours, trusted = _first(outcomes, "saflex"), _first(outcomes, "trusted")
    if ours is None or trusted is None:
        return f"{question} Not asked: it takes a condition named saflex and one named trusted."
    shared = [seed for seed in ours.step_seconds if seed in trusted.step_seconds]
    alike = [seed for seed in shared if ours.machines.get(seed) == trusted.machines.get(seed)]
    if not alike:
        reason = "the two were trained on different machines" if shared else "no times of training steps are known"
        return f"{question} Not known: {reason}."
    ratio = statistics.median(ours.step_seconds[seed] / trusted.step_seconds[seed] for seed in alike)
    seeds = f"{len(alike)} seed{'s' if len(alike) > 1 else ''}"
    names = ours.condition.short_name, trusted.condition.short_name
    text = f"{question} A step of {names[0]} takes {ratio:.2f} times as long as one of {names[1]} (median over {seeds})"
    once = [ours.evidence_seconds[seed] / trusted.step_seconds[seed] for seed in alike if seed in ours.evidence_seconds]
    return (
        f"{text}; deciding about its edits before training takes as long as {statistics.median(once):.0f} of them."
        if once
        else f"{text}."
    )


def remarks(outcomes: Sequence[Outcome], edits: str) -> list[str]:
    """Return remarks on SAFLEX and its controls: gains of other rows, truth, pretrained model, a single seed."""
    ours, lines = _first(outcomes, "saflex"), []
    title = f"[{edits}] " if edits else ""
    words = {"permuted": "the control with the gains of other rows", "oracle": "the oracle", "zero-shot": "the pretrained model"}
    for role, name in words.items():
        rival = _first(outcomes, role)
        if ours is not None and rival is not None and (found := compare_pair(ours, rival)):
            lines.append(f"{title}SAFLEX against {name} ({found.worse}): {found.answer}, {found.text}.")
    if ours is not None and (share := recovered(ours, _first(outcomes, "trusted"), _first(outcomes, "oracle"))):
        lines.append(f"{title}{share}")
    if max((len(outcome.test) for outcome in outcomes), default=0) == 1:
        lines.append(f"{title}One seed has no interval, so nothing is shown: set compare.seeds to five or more.")
    return lines


def recovered(ours: Outcome, trusted: Outcome | None, oracle: Outcome | None) -> str:
    """Tell how much of the oracle's gain over trusting SAFLEX reaches; empty where that gain is not shown."""
    if trusted is None or oracle is None or (gap := compare_pair(oracle, trusted)) is None or gap.answer != "yes":
        return ""
    seeds = [seed for seed in ours.test if seed in trusted.test and seed in oracle.test]
    gains = [[outcome.test[seed] - trusted.test[seed] for seed in seeds] for outcome in (ours, oracle)]
    if not seeds or not sum(gains[1]):
        return ""
    share = sum(gains[0]) / sum(gains[1])
    return f"SAFLEX reaches {share:.0%} of what the oracle gains over trusting ({gap.text}; means over {len(seeds)} seeds)."


def _answer(findings: Sequence[Finding]) -> str:
    """Return the common answer: yes if all are, no if any is, else not shown; with n."""
    answers, n = [finding.answer for finding in findings], min(finding.difference.n for finding in findings)
    if all(answer == "yes" for answer in answers):
        return f"Yes (n = {n})"
    return f"No (n = {n})" if "no" in answers else f"Not shown at n = {n}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _first(outcomes: Sequence[Outcome], role: str) -> Outcome | None:
    return next((outcome for outcome in outcomes if outcome.condition.role == role), None)
