"""The estimator is chosen by precision, device and scope, compared with the exact one, and given up when it errs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from flyp_saflex.saflex.estimators import Watch, choose, fidelity
from flyp_saflex.saflex.losses import cross_entropy
from flyp_saflex.saflex.saflex import Saflex


def parameters(dtype=torch.float32):
    return {"a": torch.ones(2, dtype=dtype)}


def test_the_choice_follows_scope_and_precision():
    assert choose(parameters(), "all") == "one-sided"
    assert choose(parameters(), "head") == "exact"
    assert choose(parameters(torch.bfloat16), "all") == choose(parameters(torch.float64), "all") == "exact"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose(parameters(), "all") == "exact"


def test_tensor_float_32_is_too_coarse_for_a_difference():
    on_gpu = {"a": SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)}  # all that is looked at
    assert choose(on_gpu, "all") == "one-sided"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert choose(on_gpu, "all") == "exact"
        assert choose(parameters(), "all") == "one-sided", "a CPU has no TF32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_fidelity_of_known_gains():
    exact = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [torch.nan, 1.0]])
    found = torch.tensor([[4.0, 3.0], [-1.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
    seen = fidelity(found, exact, torch.tensor([1, 0, 0, 0]))
    assert seen.rows == 3, "a row without exact gains tells nothing"
    assert seen.row_cosine == pytest.approx((24 / 25 - 1 + 1) / 3)
    assert seen.sign_agreement == pytest.approx(2 / 3)
    assert seen.argmax_agreement == pytest.approx(1 / 3)
    assert seen.error == pytest.approx((6 / 26) ** 0.5)  # squares of the difference: 1, 1, 4, 0, 0, 0; of the exact gains: 26


def test_a_row_that_is_not_finite_agrees_in_nothing():
    exact = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    seen = fidelity(torch.tensor([[1.0, 0.0], [torch.inf, 0.0]]), exact, F.one_hot(torch.tensor([0, 0]), 2))
    assert (seen.row_cosine, seen.sign_agreement, seen.argmax_agreement) == (0.5, 0.5, 0.5)
    assert fidelity(exact[:0], exact[:0], torch.tensor([], dtype=torch.long)).rows == 0


def watch(**options):
    watch = Watch(**{"every": 3, "may_give_up": True} | options)
    told = []
    watch.tell = told.append
    return watch, told


def test_the_first_call_and_every_nth_are_compared():
    one, _ = watch()
    assert [one.due("one-sided") for _ in range(7)] == [True, False, False, True, False, False, True]
    assert not any(watch(every=0)[0].due("one-sided") for _ in range(3))
    assert not any(watch()[0].due("exact") for _ in range(3))


def test_one_row_next_to_zero_decides_nothing_but_two_do():
    torch.manual_seed(0)
    exact = torch.randn(8, 5)
    upstream = torch.zeros(8, dtype=torch.long)
    found = exact.clone()
    exact[0, 0], found[0, 0] = 1e-3, -1e-3
    one, told = watch()
    assert not one.compare(found, exact, upstream)
    assert one.last.sign_agreement == 7 / 8
    assert told == []
    assert one.compare(found, exact, upstream), "39 of 40 rows are enough, 46 of 48 are not"
    assert len(told) == 1
    assert "sign agreement 0.875" in told[0]
    assert "\n" not in told[0]


def test_poor_rows_give_it_up_at_once_unless_it_was_asked_for():
    torch.manual_seed(0)
    found, exact, upstream = torch.randn(8, 5), torch.randn(8, 5), torch.zeros(8, dtype=torch.long)
    assert watch()[0].compare(found, exact, upstream)
    named, told = watch(may_give_up=False)
    assert not named.compare(found, exact, upstream)
    assert told == []
    assert named.log_row()["estimator_row_cosine"] < 0.9, "told in the metrics all the same"


def problem(rough=False):
    """A network in float32 as a function of its parameters; a rough one rounds its hidden layer as half precision does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    x_val, x_aug, y_val, y_aug = torch.randn(30, 6), torch.randn(20, 6), torch.arange(30) % 4, torch.arange(20) % 4

    def logits(values, x):
        if rough:
            values = {name: value.bfloat16().float() for name, value in values.items()}
        return functional_call(model, values, (x,))

    saflex_parameters = dict(model.named_parameters())
    return saflex_parameters, lambda p: cross_entropy(logits(p, x_val), y_val), lambda p: logits(p, x_aug), y_aug


def test_auto_estimates_where_it_can_and_tells_how_well(capsys):
    values, loss_fn, logits_fn, y_aug = problem()
    auto, exact = (Saflex(scope="all", estimator=name, check_every=2) for name in ("auto", "exact"))
    for saflex in (auto, exact):
        saflex.refresh(values, loss_fn)
    for _ in range(4):
        found, expected = auto(logits_fn, values, y_aug), exact(logits_fn, values, y_aug)
        assert torch.equal(found[0] > 0, expected[0] > 0)
    assert auto.estimator_for(values) == "one-sided"
    assert auto.watch.calls == 4
    assert 0 < auto.log_row()["estimator_error"] < 0.01
    assert auto.log_row()["estimator_row_cosine"] > 0.999
    assert "estimator_error" not in exact.log_row()
    assert capsys.readouterr().out == ""


def test_auto_gives_up_on_a_rough_function_and_is_exact_from_the_same_call_on(capsys):
    values, loss_fn, logits_fn, y_aug = problem(rough=True)
    auto, exact = (Saflex(scope="all", estimator=name, check_every=2) for name in ("auto", "exact"))
    for saflex in (auto, exact):
        saflex.refresh(values, loss_fn)
    for _ in range(3):
        assert torch.equal(auto(logits_fn, values, y_aug)[0], exact(logits_fn, values, y_aug)[0])
    assert auto.estimator_for(values) == "exact"
    assert capsys.readouterr().out.count("exact from now on") == 1
    resumed = Saflex(auto.settings)
    resumed.load_state_dict(auto.state_dict())
    assert resumed.estimator_for(values) == "exact"
    assert resumed.log_row() == Saflex(auto.settings).log_row() | resumed.watch.log_row()
    auto.reset()
    assert auto.estimator_for(values) == "one-sided", "other parameters: another try"
