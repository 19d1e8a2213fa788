"""Averages of runs: every formula by hand, and the choices on the select split."""

import math

import pytest
import torch

from flyp_saflex.evaluation.averages import GRID, Finetuned, depths_of, mean_state, stock_ratio
from flyp_saflex.tables import AVERAGES

START = {
    "blocks.0.w": torch.tensor([1.0, 1.0]),
    "blocks.2.w": torch.tensor([0.0, 0.0]),
    "out": torch.tensor([2.0]),
    "n": torch.tensor(1),
}


def state(first, last, out, n=7):
    return {
        "blocks.0.w": torch.tensor(first),
        "blocks.2.w": torch.tensor(last),
        "out": torch.tensor([out]),
        "n": torch.tensor(n),
    }


RUNS = [state([2.0, 1.0], [1.0, 0.0], 4.0), state([1.0, 2.0], [3.0, 4.0], 6.0, n=9)]


def combine(name, score=None, states=RUNS, grid=GRID):
    def scores(candidates):
        return [score(candidate()) for candidate in candidates]

    return AVERAGES[name].combine(Finetuned(states=states, start=START, score=scores, grid=grid))


def test_a_soup_is_the_mean_and_keeps_the_first_runs_counters():
    found, _ = combine("soup")
    assert found["blocks.0.w"].tolist() == [1.5, 1.5]
    assert found["out"].tolist() == [5.0]
    assert found["n"].item() == 7


def test_the_mean_of_half_precision_is_taken_in_float32():
    assert mean_state([{"w": torch.ones(1, dtype=torch.float16)}])["w"].dtype == torch.float32


def test_model_stock_by_hand():
    found, told = combine("model-stock")
    # changes of blocks.0.w are orthogonal: t = 0; of blocks.2.w: cos = 3/5, t = 2 c / (1 + c) = 0.75; of out: cos = 1, t = 1
    assert found["blocks.0.w"].tolist() == [1.0, 1.0]
    assert found["blocks.2.w"].tolist() == pytest.approx([0.75 * 2, 0.75 * 2])
    assert found["out"].tolist() == pytest.approx([5.0])
    assert told["mean_ratio"] == pytest.approx((0 + 0.75 + 1) / 3)


def test_model_stocks_ratio_of_three_runs_by_hand():
    changes = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0])]
    cosine = (math.sqrt(0.5) + 0 + math.sqrt(0.5)) / 3
    assert stock_ratio(changes) == pytest.approx(3 * cosine / (1 + 2 * cosine))


def test_runs_that_disagree_give_the_pretrained_tensor_and_untouched_tensors_stay():
    assert stock_ratio([torch.tensor([1.0]), torch.tensor([-1.0])]) == 0.0
    assert stock_ratio([torch.tensor([1.0]), torch.tensor([0.0])]) == 0.0
    assert stock_ratio([torch.zeros(2), torch.zeros(2)]) == 1.0


def test_lines_scales_a_blocks_change_by_its_depth_and_the_rest_by_alpha():
    found, told = combine("lines", score=lambda found: -abs(float(found["out"]) - 2 - 3 * 0.4), grid=(0.2, 0.4, 1.0))
    assert told["alpha"] == 0.4
    # three blocks, of which the runs have the first and the last: factors 0.4 and 0.4 + 0.6 * 2/2
    assert found["blocks.0.w"].tolist() == pytest.approx([1 + 0.4 * 0.5] * 2)
    assert found["blocks.2.w"].tolist() == pytest.approx([2.0, 2.0])
    assert found["out"].tolist() == pytest.approx([2 + 0.4 * 3])


def test_each_tower_has_its_own_depth():
    names = ["clip.visual.transformer.resblocks.0.w", "clip.visual.transformer.resblocks.4.w", "clip.transformer.resblocks.1.w"]
    depths = depths_of({name: torch.zeros(1) for name in (*names, "clip.transformer.resblocks.0.w", "clip.logit_scale")})
    assert [depths[name] for name in names] == [0.0, 1.0, 1.0]
    assert depths["clip.logit_scale"] == 0.0


def test_wise_takes_the_better_alpha_and_the_larger_of_equal_ones():
    found, told = combine("wise", score=lambda found: -abs(float(found["out"]) - 3.5), grid=(0.0, 0.5, 1.0))
    assert (told["alpha"], found["out"].tolist()) == (0.5, [3.5])
    assert combine("wise", score=lambda found: 1.0, grid=(0.0, 0.5, 1.0))[1]["alpha"] == 1.0


def test_a_greedy_soup_starts_with_the_best_run_and_leaves_out_what_lowers_the_score():
    states = [state([0.0, 0.0], [0.0, 0.0], out) for out in (0.0, 4.0, 3.0)]
    found, told = combine("greedy", score=lambda found: -abs(float(found["out"]) - 3.4), states=states)
    # alone: 3.0 is best; with 4.0: 3.5, better; with 0.0 as well: 2.33, worse
    assert told["taken"] == [1, 2]
    assert found["out"].tolist() == [3.5]


def test_one_run_averages_to_itself():
    for name in ("soup", "lines", "wise"):
        found, _ = combine(name, score=lambda found: 0.0, states=RUNS[:1], grid=(1.0,))
        assert all(torch.equal(found[key], value) for key, value in RUNS[0].items())
