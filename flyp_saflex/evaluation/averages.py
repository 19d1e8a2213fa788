"""Averages of the weights of several runs, with the choice that some of them make on a select split.

    soup         theta = mean_i theta_i                                                        arXiv 2203.05482
    greedy       the same over the runs that do not lower the score, from the best on          arXiv 2203.05482
    model-stock  theta = t mean_i theta_i + (1 - t) theta_0,  t = N c / (1 + (N - 1) c)        arXiv 2403.19522
    lines        theta = theta_0 + (a + b l / (L - 1)) (mean_i theta_i - theta_0)              arXiv 2410.17146
    wise         theta = theta_0 + a (mean_i theta_i - theta_0)                                arXiv 2109.01903

theta_0 is the pretrained model, N the number of runs, c the mean cosine between their changes of a tensor, l one of L blocks. A
new average is one function of `Finetuned` and one line in `tables.AVERAGES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flyp_saflex.evaluation.weight_averaging import interpolate

State = Mapping[str, Tensor]
Lazy = Callable[[], State]

GRID = tuple(step / 10 for step in range(11))
"""Alphas that `wise` and `lines` choose among."""
BLOCK = re.compile(r"^(?P<tower>.*?)\b(?:resblocks|blocks|layers?|stages)\.?(?P<number>\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """Runs to average.

    Attributes:
        states: of their networks, at least one.
        start: state that all of them started from; None for an average that needs none.
        score: states -> their scores on the select split, larger is better; each image is read once per call.
        grid: alphas to choose among.
    """

    states: Sequence[State]
    start: State | None
    score: Callable[[Sequence[Lazy]], list[float]]
    grid: Sequence[float] = GRID

    @property
    def known_start(self) -> State:
        """State that the runs started from, for averages that need it."""
        assert self.start is not None, "the average is not marked as needing the start"
        return self.start


@dataclass(frozen=True, kw_only=True)
class Average:
    """A value of `--average`.

    Attributes:
        combine: finetuned runs -> the average's state, and what is to be told about it.
        fewest: runs that it needs at least.
        needs_start: whether it needs the pretrained weights.
        chooses: whether it looks at the select split.
        has_grid: whether it chooses an alpha.
    """

    combine: Callable[[Finetuned], tuple[State, dict[str, Any]]]
    fewest: int = 2
    needs_start: bool = False
    chooses: bool = False
    has_grid: bool = False


def mean_state(states: Sequence[State]) -> State:
    """Return the mean of states, float32 (float64 stays); integer and boolean buffers are those of the first."""
    first = states[0]
    return {name: _mean([state[name] for state in states]) if first[name].is_floating_point() else first[name] for name in first}


def uniform_soup(runs: Finetuned) -> tuple[State, dict[str, Any]]:
    """Average all runs."""
    return mean_state(runs.states), {}


def greedy_soup(runs: Finetuned) -> tuple[State, dict[str, Any]]:
    """Average the runs that do not lower the score, taken from the best on (Recipe 1 of the paper)."""
    alone = runs.score([partial(_itself, state) for state in runs.states])
    order = sorted(range(len(alone)), key=lambda place: -alone[place])
    taken, best = order[:1], alone[order[0]]
    for place in order[1:]:
        (value,) = runs.score([partial(mean_state, [runs.states[other] for other in (*taken, place)])])
        if value >= best:
            taken, best = [*taken, place], value
    return mean_state([runs.states[place] for place in taken]), {"taken": sorted(taken), "score": best}


def model_stock(runs: Finetuned) -> tuple[State, dict[str, Any]]:
    """Move every tensor of the mean towards the pretrained one where the runs disagree.

    c is the mean over pairs of runs, per tensor as in the authors' code (`compute_angle`, `compute_ratio`). Runs that
    disagree (c < 0) give the pretrained tensor: the formula, made for c >= 0, would extrapolate beyond it. A tensor that
    no run has changed stays.
    """
    start, ratios = runs.known_start, {}
    averaged = dict(mean_state(runs.states))
    for name, mean in averaged.items():
        if mean.is_floating_point():
            before = start[name].to(mean.dtype)
            ratios[name] = stock_ratio([state[name].to(mean.dtype) - before for state in runs.states])
            averaged[name] = before + ratios[name] * (mean - before)
    return averaged, {"mean_ratio": sum(ratios.values()) / max(len(ratios), 1)}


def stock_ratio(changes: Sequence[Tensor]) -> float:
    """Return Model Stock's ratio t, 0..1, of the changes of one tensor by N runs."""
    if any(not change.any() for change in changes):  # no angle: all stay, or one run has not moved
        return 1.0 if not any(change.any() for change in changes) else 0.0
    pairs = [float(cosine_similarity(one.flatten(), other.flatten(), dim=0)) for one, other in combinations(changes, 2)]
    cosine = min(max(sum(pairs) / len(pairs), 0.0), 1.0)
    return len(changes) * cosine / (1 + (len(changes) - 1) * cosine)


def lines(runs: Finetuned) -> tuple[State, dict[str, Any]]:
    """Scale the change of every block by its depth; the smallest factor a is chosen.

    The first block has factor a, the last 1 (b = 1 - a). Tensors outside of the blocks are scaled by a, as in the authors' code
    (wang-kee/LiNeS, `LiNeS_scaling`).
    Each tower has its own depth.
    """
    mean, start = mean_state(runs.states), runs.known_start
    depths = depths_of(mean)
    best, told = _best_of_grid(
        runs, lambda alpha: scaled(start, mean, {name: alpha + (1 - alpha) * depths[name] for name in mean})
    )
    return best, told


def wise(runs: Finetuned) -> tuple[State, dict[str, Any]]:
    """Interpolate between the pretrained model and the mean of the runs; alpha is chosen."""
    mean, start = mean_state(runs.states), runs.known_start
    return _best_of_grid(runs, lambda alpha: interpolate(start, mean, alpha))


def scaled(start: State, finetuned: State, factors: Mapping[str, float]) -> State:
    """Return start + factor * (finetuned - start) for every tensor; buffers of integers are the finetuned ones."""
    return {
        name: value if not value.is_floating_point() else start[name].to(value.dtype) + factors[name] * (value - start[name])
        for name, value in finetuned.items()
    }


def depths_of(state: State) -> dict[str, float]:
    """Return the depth l / (L - 1) of every tensor's block.

    It is 0 outside of the blocks, and in a tower of one block.
    """
    found = {name: match for name in state if (match := BLOCK.match(name))}
    numbers: dict[str, set[int]] = {}
    for match in found.values():
        numbers.setdefault(match["tower"], set()).add(int(match["number"]))
    depths = dict.fromkeys(state, 0.0)
    for name, match in found.items():
        first, last = min(numbers[match["tower"]]), max(numbers[match["tower"]])  # a ResNet counts its stages from 1
        depths[name] = (int(match["number"]) - first) / max(last - first, 1)
    return depths


def _best_of_grid(runs: Finetuned, at: Callable[[float], State]) -> tuple[State, dict[str, Any]]:
    """Return the state with the best score; of equal ones that with the larger alpha, as `evaluate` has it."""
    values = runs.score([partial(at, alpha) for alpha in runs.grid])
    value, alpha = max(zip(values, runs.grid, strict=True))
    return at(alpha), {"alpha": alpha, "score": value}


def _itself(state: State) -> State:
    return state


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    total = tensors[0].to(dtype).clone()
    for tensor in tensors[1:]:
        total += tensor
    return total / len(tensors)


SOUP = Average(combine=uniform_soup)
GREEDY = Average(combine=greedy_soup, chooses=True)
MODEL_STOCK = Average(combine=model_stock, needs_start=True)
LINES = Average(combine=lines, fewest=1, needs_start=True, chooses=True, has_grid=True)
WISE = Average(combine=wise, fewest=1, needs_start=True, chooses=True, has_grid=True)
