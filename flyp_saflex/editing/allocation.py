"""Allocation of edits to cells (class x text x level) by an upper confidence bound on their usefulness.

    usefulness of an edit   weight that a run gave it under its own class, 0..1; 0 if it was dropped or relabelled
    prior of a cell         text's mean + class's mean + level's mean - 2 x mean of all
    mean, variance          of the cell's own edits and PRIOR more, of which a part `prior` is useful and the others are not
    upper bound             mean + 1.28 standard errors, below which usefulness is with a probability of about 90 %; where an
                            edit is useful or not (1 or 0), that of Beta(PRIOR x prior + sum, PRIOR x (1 - prior) + edits - sum)
    funded                  cells whose bound reaches the mean of all or of their class, the lower one, and `floor`; of a
                            text whose own bound is below the mean of all, cells whose mean reaches it
    share of the budget     1 - explore, evenly over funded cells; explore, evenly over the cells of texts whose
                            bound reaches half of the mean, and of classes whose bound reaches `floor`

The means of texts, classes and levels are shrunk in the same way towards the mean of all, and a cell counts in them as at most
PRIOR edits, so that they do not lean to the cells that got most. A cell with few edits thus resembles its text and its class,
and one with many is itself. A cell that had bad luck comes back by exploration; a text that is useless for every class does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flyp_saflex.editing.plan import Cell, stable_hash

PRIOR = 4.0
"""Edits that a prior counts as; not tuned."""
CERTAINTY = 1.28
"""Standard errors from mean to upper bound: 90 % of one side."""
FLOOR, EXPLORE = 0.1, 0.1
"""Default of the smallest upper bound that is funded, and of the exploration share."""


@dataclass(frozen=True, slots=True)
class _Sums:
    """Number of edits, and sums of their usefulness and of its squares."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> _Sums:
        values = list(values)
        return cls(len(values), math.fsum(values), math.fsum(value * value for value in values))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def capped(self, most: float) -> _Sums:
        """Return the sums of at most so many edits."""
        part = min(1.0, most / self.count)
        return _Sums(part * self.count, part * self.total, part * self.squares)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Usefulness of a cell, text, class or level, 0..1: shrunk mean and upper bound."""

    mean: float
    upper: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """Estimates per cell and per text, and share of the next edits per cell; the shares sum to 1."""

    cells: Mapping[Cell, Estimate]
    texts: Mapping[int | float | None, Estimate]
    shares: Mapping[Cell, float]


def allocate(
    outcomes: Mapping[Cell, Iterable[float]], cells: Iterable[Cell], *, floor: float = FLOOR, explore: float = EXPLORE
) -> Allocation:
    """Return the share of the next edits that every cell gets.

    Args:
        outcomes: usefulness of the edits made so far, 0..1, by cell; at least one edit.
        cells: all cells that edits can be made in.
        floor: upper bound, 0..1, below which no cell is funded; if none reaches it, no cell gets a share.
        explore: exploration share, 0..1.
    """
    made = {cell: sums for cell, found in outcomes.items() if (sums := _Sums.of(found)).count}
    assert made, "at least one edit is needed"
    cells = sorted({*cells, *made}, key=lambda cell: (cell[0], cell[1], cell[2] or 0.0))
    capped = {cell: sums.capped(PRIOR) for cell, sums in made.items()}
    overall = math.fsum(sums.total for sums in capped.values()) / math.fsum(sums.count for sums in capped.values())
    classes, texts, levels = (_marginal(capped, cells, part, overall) for part in range(3))
    of_class, of_text = (_marginal(made, cells, part, overall) for part in range(2))
    estimates = {
        (label, text, level): _estimate(
            made.get((label, text, level), _Sums()),
            classes[label].mean + texts[text].mean + levels[level].mean - 2 * overall,
        )
        for label, text, level in cells
    }
    bar = {label: max(floor, min(overall, found.mean)) for label, found in classes.items()}
    is_open = {text: found.upper >= max(floor, overall) for text, found in of_text.items()}
    funded = [cell for cell in cells if (estimates[cell].upper if is_open[cell[1]] else estimates[cell].mean) >= bar[cell[0]]]
    explored = [
        (label, text, level)
        for label, text, level in cells
        if of_text[text].upper >= max(floor, overall / 2) and of_class[label].upper >= floor
    ]
    if not funded:
        return Allocation(estimates, of_text, {})
    explore = explore if explored else 0.0
    shares = dict.fromkeys(funded, (1 - explore) / len(funded))
    for cell in explored:
        shares[cell] = shares.get(cell, 0.0) + explore / len(explored)
    return Allocation(estimates, of_text, {cell: shares[cell] for cell in cells if shares.get(cell)})


def split_budget(shares: Mapping[Cell, float], most: Mapping[Cell, int], budget: int, *, seed: int) -> dict[Cell, int]:
    """Return the number of edits per cell: on average its share, never more than it can have.

    Systematic sampling rounds: cells in the order of a hash, an edit wherever the sum of their parts passes a whole one. What a
    full cell leaves goes to the others by their shares. If all are full the numbers sum to less than `budget`.
    """
    numbers = dict.fromkeys(shares, 0)
    order = sorted(shares, key=lambda cell: stable_hash(seed, "cell", *cell))
    left = budget
    while left:
        room = [cell for cell in order if shares[cell] > 0 and numbers[cell] < most.get(cell, 0)]
        if not room:
            break
        total, passed, given = math.fsum(shares[cell] for cell in room), 0.0, 0
        for place, cell in enumerate(room, 1):
            passed += left * shares[cell] / total
            whole = left if place == len(room) else min(left, int(passed + 0.5))
            numbers[cell] += whole - given
            given = whole
        over = {cell: numbers[cell] - most[cell] for cell in room if numbers[cell] > most[cell]}
        for cell in over:
            numbers[cell] = most[cell]
        left = sum(over.values())
    return numbers


def _marginal(
    capped: Mapping[Cell, _Sums], cells: Iterable[Cell], part: int, overall: float
) -> dict[int | float | None, Estimate]:
    """Return the estimate of every class (part 0), text (1) or level (2)."""
    sums = {cell[part]: _Sums() for cell in cells}
    for cell, own in capped.items():
        sums[cell[part]] += own
    return {key: _estimate(own, overall) for key, own in sums.items()}


def _estimate(own: _Sums, prior: float) -> Estimate:
    """Return mean and bound of edits and PRIOR more that are useful or not; weights vary less than ones and zeros."""
    prior, weight = min(max(prior, 0.01), 0.99), PRIOR + own.count
    mean, square = (PRIOR * prior + own.total) / weight, (PRIOR * prior + own.squares) / weight
    return Estimate(mean, min(1.0, mean + CERTAINTY * math.sqrt(max(0.0, square - mean**2) / (weight + 1))))
