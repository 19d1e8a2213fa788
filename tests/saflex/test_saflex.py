"""The Saflex object solves the paper's program, joins any loop and touches nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from gain_rows import random_gains
from torch import nn
from torch.func import functional_call

from flyp_saflex.errors import ConfigError
from flyp_saflex.presets import PRESETS, SaflexSettings, preset
from flyp_saflex.saflex.closed_form import gains
from flyp_saflex.saflex.losses import clip_loss, cross_entropy, soft_cross_entropy
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.tables import WEIGHT_RULES


def problem(seed=0, noise=0.5, rows=400, warm_steps=60):
    """A linear-in-truth 4-class problem: a half-trained network, validation rows, augmented rows with wrong labels."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(6, 4, generator=generator).double()
    x_val, x_aug = (torch.randn(rows, 6, generator=generator).double() for _ in range(2))
    y_val, y_aug = (x_val @ truth).argmax(1), (x_aug @ truth).argmax(1)
    wrong = torch.rand(rows, generator=generator) < noise
    y_aug = torch.where(wrong, (y_aug + torch.randint(1, 4, (rows,), generator=generator)) % 4, y_aug)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x_train = torch.randn(64, 6, generator=generator).double()
    for _ in range(warm_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x_train), (x_train @ truth).argmax(1)).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, x_val, y_val, x_aug, y_aug, wrong


def connect(saflex, model, x_val, y_val, x_aug):
    parameters = dict(model.named_parameters())
    saflex.refresh(parameters, lambda p: cross_entropy(functional_call(model, p, (x_val,)), y_val))
    return parameters, lambda p: functional_call(model, p, (x_aug,))


# --- the program of Theorem 1


def test_no_weights_and_labels_beat_the_hard_solution():
    pi, upstream = random_gains(rows=8)
    saflex = Saflex(preset="paper", temperature=1e-6, weight_rule="label")
    weights, labels = saflex.solve(pi, upstream)
    best = (weights[:, None] * labels * pi).sum()
    generator = torch.Generator().manual_seed(1)
    for _ in range(500):
        w = (torch.rand(8, generator=generator) < torch.rand(1, generator=generator)).double()
        y = torch.distributions.Dirichlet(torch.full((5,), 0.3)).expand((8,)).sample().double()
        assert (w[:, None] * y * pi).sum() <= best
    # With free labels nothing is dropped, because the best label never has a negative gain.
    assert weights.tolist() == [1.0] * 8
    # With retained labels the best weights are the `upstream` rule's, found by trying all of them.
    weights, labels = Saflex(preset="paper", penalty=1e30, weight_rule="upstream").solve(pi, upstream)
    best = (weights[:, None] * labels * pi).sum()
    own = pi.gather(1, upstream[:, None])[:, 0]
    everything = [sum(own[i] for i in range(8) if code >> i & 1) for code in range(1, 256)]
    torch.testing.assert_close(best, torch.stack(everything).max())


# --- weights, Eq. (11) and the other rules


def test_rules_on_a_hand_made_example():
    pi = torch.tensor([[3.0, -1, -1], [-2, 1, 0.5], [0, -4, 1], [-1, 2, -1], [-6, 1, 1]])
    upstream = torch.tensor([0, 0, 0, 1, 1])
    kept = {
        "upstream": [1, 0, 1, 1, 1],  # own gain 3, -2, 0, 2, 1
        "sum": [1, 0, 0, 1, 0],  # sums 1, -0.5, -3, 0, -4
        "label": [1, 1, 1, 1, 1],  # the learned label is the best one
        "soft": [3 * 3 / 6, 0, 0, 2 * 3 / 6, 1 * 3 / 6],  # own gain where positive, three rows kept
        "all": [1, 1, 1, 1, 1],
        "evidence": [1, 1, 1, 1, 1],  # decided before training; gains drop nothing
    }
    assert set(kept) == set(WEIGHT_RULES)
    for rule, expected in kept.items():
        for scale in ("none", "std"):  # the scale of the gains changes no rule at beta = 0
            saflex = Saflex(temperature=0.01, penalty=0.0, weight_rule=rule, gain_scale=scale, class_balance=0.0)
            torch.testing.assert_close(saflex.solve(pi, upstream)[0], torch.tensor(expected).float())


def test_the_label_rule_adds_the_penalty():
    # At tau = 1000 the learned label is uniform: <Pi, y> = -1 and beta y_upstream = beta / 3.
    pi, upstream = torch.tensor([[1.0, -2.0, -2.0]]), torch.tensor([0])
    for penalty, kept in ((2.9, 0.0), (3.1, 1.0)):
        saflex = Saflex(temperature=1e3, penalty=penalty, weight_rule="label", gain_scale="none")
        assert saflex.solve(pi, upstream)[0].item() == kept


def test_mixed_upstream_labels_are_judged_by_their_own_gain():
    pi = torch.tensor([[1.0, -3.0, 0.0]])
    for share, kept in ((0.8, 1.0), (0.7, 0.0)):
        upstream = torch.tensor([[share, 1 - share, 0.0]])
        weights, labels = Saflex(preset="robust").solve(pi, upstream)
        assert weights.item() == kept
        assert torch.equal(labels, upstream)


@pytest.mark.parametrize("rule", sorted(WEIGHT_RULES))
def test_weights_sum_to_the_number_of_kept_rows(rule):
    pi, upstream = random_gains(rows=40)
    weights, labels = Saflex(weight_rule=rule, penalty=0.0).solve(pi, upstream)
    assert weights.sum().item() == pytest.approx(int((weights > 0).sum()))
    torch.testing.assert_close(labels.sum(1), torch.ones(40).double())


@pytest.mark.parametrize("name", PRESETS)
def test_permuting_the_batch_permutes_the_weights(name):
    pi, upstream = random_gains(rows=30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    weights, labels = Saflex(preset=name).solve(pi, upstream)
    permuted_weights, permuted_labels = Saflex(preset=name).solve(pi[order], upstream[order])
    assert torch.equal(permuted_weights, weights[order])
    torch.testing.assert_close(permuted_labels, labels[order])  # the scale is summed in another order


def test_permuting_the_classes_permutes_the_labels():
    pi, upstream = random_gains()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    weights, labels = Saflex(penalty=0.5).solve(pi, F.one_hot(upstream, 5).double())
    permuted_weights, permuted_labels = Saflex(penalty=0.5).solve(pi[:, order], F.one_hot(upstream, 5).double()[:, order])
    torch.testing.assert_close(permuted_weights, weights)
    torch.testing.assert_close(permuted_labels, labels[:, order])


def test_std_scale_makes_the_temperature_mean_the_same_at_every_raw_scale():
    pi, upstream = random_gains()
    settings = preset("robust", penalty=1.0)
    for scale in (1e-3, 1e3):
        torch.testing.assert_close(Saflex(settings).solve(scale * pi, upstream)[1], Saflex(settings).solve(pi, upstream)[1])


# --- off, nothing kept, nothing known


def test_switched_off_by_settings_equals_the_plain_loss_to_the_last_bit():
    pi, upstream = random_gains(rows=5)
    weights, labels = Saflex(weight_rule="all", penalty=1e30).solve(pi.float(), upstream)
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(soft_cross_entropy(logits, labels, weights), F.cross_entropy(logits, upstream))
    assert torch.equal(clip_loss(logits, labels, weights), clip_loss(logits, F.one_hot(upstream, 5)))


def test_all_dropped_is_a_plain_step_on_the_train_rows():
    pi = torch.tensor([[-1.0, 1.0], [-2.0, 1.0]])
    weights, labels = Saflex(preset="robust").solve(pi, torch.tensor([0, 0]))
    assert weights.tolist() == [0.0, 0.0]
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    train = F.one_hot(torch.tensor([0, 1, 1, 0]), 2).float()
    both = clip_loss(logits, torch.cat([train, labels]), torch.cat([torch.ones(4), weights]))
    torch.testing.assert_close(both, clip_loss(logits[:4], train))


def test_rows_without_finite_gains_are_dropped_and_counted_and_hurt_no_other_row():
    pi, upstream = random_gains(rows=6)
    saflex = Saflex(penalty=0.0, class_balance=0.0)
    weights, labels = saflex.solve(pi, upstream)
    broken = torch.cat([pi, torch.full((1, 5), torch.nan), torch.tensor([[1.0, torch.inf, 0, 0, 0]])])
    more_weights, more_labels = saflex.solve(broken, torch.cat([upstream, torch.tensor([1, 2])]))
    assert more_weights.tolist() == [*weights.tolist(), 0.0, 0.0]
    torch.testing.assert_close(more_labels[:6], labels)
    assert torch.equal(more_labels[6:], F.one_hot(torch.tensor([1, 2]), 5).double())
    assert saflex.diagnostics.num_invalid == 2


@pytest.mark.parametrize("name", PRESETS)
def test_rows_with_zero_gains_keep_their_label_and_weight(name):
    weights, labels = Saflex(preset=name).solve(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    assert weights.tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(labels, F.one_hot(torch.tensor([0, 1, 2]), 4).float())


def test_no_rows_give_no_weights():
    saflex = Saflex()
    weights, labels = saflex.solve(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert weights.shape == (0,)
    assert labels.shape == (0, 4)
    assert saflex.diagnostics.kept_fraction == 0.0


def test_a_second_vote_drops_rows():
    pi = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    weights, _ = Saflex().solve(pi, torch.tensor([0, 0]), keep_A=torch.tensor([True, False]))
    assert weights.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("agreement", "expected"), [("ignore", [1, 0, 1, 0]), ("keep", [1, 1, 1, 0]), ("require", [1, 0, 0, 0])])
def test_the_models_own_prediction_can_overrule_the_gain(agreement, expected):
    pi = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [2.0, -1.0], [-2.0, 1.0]])
    saflex = Saflex(agreement=agreement, class_balance=0.0)
    weights, _ = saflex.solve(pi, torch.zeros(4, dtype=torch.long), agrees_A=torch.tensor([True, True, False, False]))
    assert weights.tolist() == expected


def test_class_balance_gives_every_class_its_share_of_the_weight():
    # Class 0 keeps 30 of 40 rows, class 1 keeps 10 of 40: after many such steps both weigh the same.
    gain_A = torch.cat([torch.ones(30), -torch.ones(10), torch.ones(10), -torch.ones(30)])
    upstream = torch.cat([torch.zeros(40), torch.ones(40)]).long()
    pi = torch.zeros(80, 2).scatter(1, upstream[:, None], gain_A[:, None])
    saflex = Saflex(class_balance=1.0)
    for _ in range(200):
        weights, _ = saflex.solve(pi, upstream)
    assert weights[:40].sum() == pytest.approx(float(weights[40:].sum()), rel=0.02)
    assert weights.sum() == pytest.approx(40)
    assert torch.equal(weights > 0, gain_A > 0)
    unbalanced, _ = Saflex(class_balance=0.0).solve(pi, upstream)
    assert unbalanced[:40].sum() == 3 * unbalanced[40:].sum()


def test_class_balance_survives_a_checkpoint():
    pi, upstream = random_gains(rows=30)
    first, second = Saflex(), Saflex()
    first.solve(pi, upstream)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.solve(pi, upstream)[0], second.solve(pi, upstream)[0])


def test_diagnostics_of_a_hand_made_example():
    saflex = Saflex(weight_rule="upstream", penalty=0.0, temperature=1e3, gain_scale="none")
    assert saflex.diagnostics.num_rows == 0
    saflex.solve(torch.tensor([[2.0, 0.0], [-4.0, 0.0], [torch.nan, 0.0]]), torch.tensor([0, 0, 0]))
    found = saflex.diagnostics
    assert (found.num_rows, found.num_invalid, found.mean_gain) == (3, 1, -1.0)
    assert found.kept_fraction == pytest.approx(1 / 3)
    assert found.label_entropy == pytest.approx(math.log(2), rel=1e-5)


# --- the object in a loop


def test_taking_the_step_lowers_the_validation_loss_as_predicted():
    model, x_val, y_val, x_aug, y_aug, _ = problem()
    saflex = Saflex(penalty=0.5, weight_rule="upstream", gain_scale="std")
    parameters, logits_fn = connect(saflex, model, x_val, y_val, x_aug)
    pi = gains(*saflex.tangent(logits_fn, parameters))
    weights, labels = saflex(logits_fn, parameters, y_aug)
    soft_cross_entropy(model(x_aug), labels, weights).backward()
    before = cross_entropy(model(x_val), y_val).item()
    lr = 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(lr * parameter.grad)
    predicted = lr * ((weights[:, None] * labels * pi).sum() / weights.sum()).item()
    assert predicted > 0
    # The second-order term is of the order of lr times the curvature (about one here).
    assert before - cross_entropy(model(x_val), y_val).item() == pytest.approx(predicted, rel=1e-3)


def test_corrupted_rows_have_lower_gains_and_the_upstream_rule_drops_more_of_them():
    for seed in range(5):
        model, x_val, y_val, x_aug, y_aug, wrong = problem(seed)
        saflex = Saflex(preset="robust")
        parameters, logits_fn = connect(saflex, model, x_val, y_val, x_aug)
        weights, _ = saflex(logits_fn, parameters, y_aug)
        assert weights[~wrong].mean() > weights[wrong].mean() + 0.2


def test_a_call_touches_nothing_and_returns_constants():
    model, x_val, y_val, x_aug, y_aug, _ = problem(rows=20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saflex = Saflex(preset="paper")
    parameters, logits_fn = connect(saflex, model, x_val, y_val, x_aug)
    weights, labels = saflex(logits_fn, parameters, y_aug)
    assert not weights.requires_grad
    assert not labels.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not value.requires_grad for value in saflex.state_dict()["gradient"].values())


def test_refresh_returns_the_norm_and_keeps_a_running_average():
    saflex = Saflex(average=0.75, refresh_every=3)
    assert saflex.due(1), "without a gradient a refresh is always due"
    assert saflex.update({"a": torch.tensor([3.0, 4.0])}) == 5.0
    assert [saflex.due(step) for step in range(7)] == [True, False, False, True, False, False, True]
    before, given = saflex.state_dict()["gradient"]["a"], torch.tensor([-1.0, 0.0])
    saflex.update({"a": given})
    assert saflex.state_dict()["gradient"]["a"].tolist() == [2.0, 3.0]
    assert (before.tolist(), given.tolist()) == ([3.0, 4.0], [-1.0, 0.0]), "the average is in memory of its own"
    newest = Saflex(average=0.0)
    newest.update({"a": torch.tensor([3.0, 4.0])})
    newest.update({"a": torch.tensor([-1.0, 0.0])})
    assert newest.state_dict()["gradient"]["a"].tolist() == [-1.0, 0.0]


def test_a_gradient_that_still_has_its_graph_is_cut_from_it():
    saflex = Saflex()
    saflex.update({"a": torch.ones(1, requires_grad=True)})
    assert not saflex.state_dict()["gradient"]["a"].requires_grad


def test_gradients_of_several_processes_can_be_reduced():
    saflex = Saflex()
    norm = saflex.refresh({"a": torch.ones(1)}, lambda p: 2 * p["a"].sum(), reduce=lambda g: {k: v / 2 for k, v in g.items()})
    assert norm == 1.0


def test_splitting_the_validation_rows_over_processes_changes_nothing():
    model, x_val, y_val, x_aug, y_aug, _ = problem(rows=40)
    whole = Saflex()
    parameters, logits_fn = connect(whole, model, x_val, y_val, x_aug)
    halves = []
    for part in (slice(0, 20), slice(20, 40)):
        one = Saflex()
        connect(one, model, x_val[part], y_val[part], x_aug)
        halves.append(one.state_dict()["gradient"])
    split = Saflex()
    split.update({name: (halves[0][name] + halves[1][name]) / 2 for name in parameters})
    assert torch.equal(split(logits_fn, parameters, y_aug)[0], whole(logits_fn, parameters, y_aug)[0])


@pytest.mark.parametrize("estimator", ["auto", "exact", "central", "one-sided"])
def test_a_resumed_object_goes_on_bit_for_bit(estimator):
    model, x_val, y_val, x_aug, y_aug, _ = problem(rows=20)
    settings = preset("robust", penalty=0.5, estimator=estimator)
    first = Saflex(settings)
    parameters, logits_fn = connect(first, model, x_val, y_val, x_aug)
    first(logits_fn, parameters, y_aug)
    second = Saflex(settings)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        connect(first, model, x_val[:7], y_val[:7], x_aug)
        connect(second, model, x_val[:7], y_val[:7], x_aug)
        ours, theirs = first(logits_fn, parameters, y_aug), second(logits_fn, parameters, y_aug)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("estimator", ["central", "one-sided"])
def test_finite_differences_decide_as_the_exact_derivative_does(estimator):
    model, x_val, y_val, x_aug, y_aug, _ = problem(rows=200)
    decisions = []
    for name in ("exact", estimator):
        saflex = Saflex(preset="robust", estimator=name)
        parameters, logits_fn = connect(saflex, model, x_val, y_val, x_aug)
        for _ in range(2):  # the second call takes its step size from the first
            weights, _ = saflex(logits_fn, parameters, y_aug)
        decisions.append(weights)
    # Only rows whose gain is within the estimator's error (1e-3) of zero may change sides.
    assert (decisions[0] != decisions[1]).double().mean() <= 0.01


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("penalty", math.nan), ("estimator", "exakt"), ("average", 1.0)]
)
def test_settings_constructed_directly_are_checked_too(name, value):
    with pytest.raises(ConfigError, match=f"saflex.{name} = {value!r}: "):
        Saflex(SaflexSettings(**{name: value}))


def test_a_call_before_the_first_refresh_says_so():
    with pytest.raises(ConfigError, match="call refresh"):
        Saflex()(lambda p: p["a"], {"a": torch.ones(1, 2)}, torch.tensor([0]))


def test_another_scope_than_before_is_refused():
    saflex = Saflex()
    saflex.update({"a": torch.ones(1)})
    with pytest.raises(ConfigError, match="'b'"):
        saflex.update({"a": torch.ones(1), "b": torch.ones(1)})
