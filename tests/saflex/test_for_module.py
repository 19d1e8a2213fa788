"""`Saflex.for_module` joins a training loop with the preset's scope and loss, predicts the step where BatchNorm trains, and moves
nothing of the model."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call

from flyp_saflex import Saflex
from flyp_saflex.errors import ConfigError
from flyp_saflex.saflex.closed_form import gains
from flyp_saflex.saflex.losses import cross_entropy, joint_loss, margin

CLASSES = 4


class Bed:
    """A small BatchNorm net in training, train and validation rows, and shifted augmented rows, half with a wrong label."""

    def __init__(self, seed: int = 0, num_steps: int = 40) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.prototypes = 0.7 * torch.randn(CLASSES, 2, 8, 8, generator=self.generator)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = batchnorm_net()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        for _ in range(num_steps):
            x, y = self.draw(32)
            optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        self.x, self.y = self.draw(32)
        self.x_aug, self.y_aug = self.draw(24, shift=0.5)
        wrong = torch.rand(24, generator=self.generator) < 0.5
        self.y_aug = torch.where(wrong, (self.y_aug + 1) % CLASSES, self.y_aug)
        self.x_val, self.y_val = self.draw(64)

    def draw(self, num_rows: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(CLASSES, (num_rows,), generator=self.generator)
        noise = torch.randn(num_rows, 2, 8, 8, generator=self.generator)
        return (self.prototypes[labels] + noise + shift).double(), labels


def batchnorm_net() -> nn.Sequential:
    stem = [
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    ]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES)).double()


def plain_net(outputs: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


def plain_rows(num_rows: int = 6, num_classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(num_classes, (num_rows,), generator=generator)


def decide(model: nn.Module, y_aug: object, *, num_classes: int = 3, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    (x_aug, _), (x_val, y_val) = plain_rows(), plain_rows(9, num_classes, seed=1)
    return Saflex.for_module(model, **options)(0, x_aug, y_aug, x_val, y_val)


# --- it moves nothing


@pytest.mark.parametrize("rows", ["auto", "joint", "eval"])
@pytest.mark.parametrize("scope", ["all", "head"])
@pytest.mark.parametrize("estimator", ["exact", "one-sided"])
def test_it_moves_no_statistic_parameter_gradient_mode_or_random_number(rows, scope, estimator):
    bed = Bed(num_steps=2)
    bed.model[4].eval()  # a frozen norm stays frozen
    before, modes = copy.deepcopy(bed.model.state_dict()), [module.training for module in bed.model.modules()]
    random_state = torch.get_rng_state()
    saflex = Saflex.for_module(bed.model, rows=rows, scope=scope, estimator=estimator)
    for step in range(2):
        weights, labels = saflex(step, bed.x_aug, bed.y_aug, bed.x_val, bed.y_val, bed.x)
    assert all(torch.equal(before[name], value) for name, value in bed.model.state_dict().items())
    assert [module.training for module in bed.model.modules()] == modes
    assert all(parameter.grad is None for parameter in bed.model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not weights.requires_grad
    assert not labels.requires_grad


# --- it predicts the step


def real_changes(bed, names, loss_fn, lr=1e-4):
    """Decrease of the validation loss by a step on the joint batch in which, of the augmented rows, one row counts."""
    found = []
    for row in range(len(bed.x_aug)):
        model = copy.deepcopy(bed.model)
        optimizer = torch.optim.SGD([value for name, value in model.named_parameters() if name in names], lr=lr)
        logits = model(torch.cat([bed.x, bed.x_aug]))
        weights = torch.zeros(len(bed.x_aug)).double()
        weights[row] = 1
        labels = F.one_hot(bed.y_aug, CLASSES).double()
        joint_loss(logits[: len(bed.x)], bed.y, logits[len(bed.x) :], labels, weights).backward()
        model.eval()
        with torch.no_grad():
            before = loss_fn(model(bed.x_val), bed.y_val)
            optimizer.step()
            found.append(float(before - loss_fn(model(bed.x_val), bed.y_val)))
    return found


@pytest.mark.parametrize(("validation_loss", "loss_fn"), [("ce", cross_entropy), ("margin", margin)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_joint_gains_rank_rows_as_the_real_step_does_and_gains_in_evaluation_mode_do_not(seed, validation_loss, loss_fn):
    bed, agreement = Bed(seed), {}
    for rows in ("auto", "eval"):
        saflex = Saflex.for_module(bed.model, scope="all", validation_loss=validation_loss, rows=rows)
        saflex(0, bed.x_aug, bed.y_aug, bed.x_val, bed.y_val, bed.x)
        values, tangent = saflex.saflex.tangent(saflex.rows_fn(bed.x_aug, bed.x), saflex.parameters)
        own = gains(values, tangent).gather(1, bed.y_aug[:, None])[:, 0]
        agreement[rows] = spearmanr(own, real_changes(bed, saflex.parameters, loss_fn)).statistic
    # Not 1: the step moves the running statistics at which the validation loss is taken afterwards.
    assert agreement["auto"] >= 0.98
    assert agreement["eval"] < 0.95


def test_rows_of_a_joint_batch_are_the_logits_of_the_training_pass():
    bed = Bed(num_steps=2)
    saflex = Saflex.for_module(bed.model)
    found = saflex.rows_fn(bed.x_aug, bed.x)(saflex.parameters)
    alone = saflex.rows_fn(bed.x_aug)(saflex.parameters)
    evaluated = Saflex.for_module(bed.model, rows="eval").rows_fn(bed.x_aug, bed.x)(saflex.parameters)
    model = copy.deepcopy(bed.model)
    assert torch.equal(found, model(torch.cat([bed.x, bed.x_aug]))[len(bed.x) :])
    assert torch.equal(alone, copy.deepcopy(bed.model)(bed.x_aug))
    assert torch.equal(evaluated, copy.deepcopy(bed.model).eval()(bed.x_aug))


def test_joint_is_chosen_only_where_batch_statistics_train():
    bed = Bed(num_steps=2)
    saflex = Saflex.for_module(bed.model)
    bed.model.eval()
    assert torch.equal(saflex.rows_fn(bed.x_aug, bed.x)(saflex.parameters), bed.model(bed.x_aug))


# --- it is the preset's method


@pytest.mark.parametrize("name", ["robust", "paper-log", "paper-prob"])
def test_it_equals_the_loop_written_by_hand(name):
    bed = Bed(num_steps=5)
    ours = Saflex.for_module(bed.model, preset=name)
    by_hand = Saflex(preset=name)
    loss_fn = {"margin": margin, "train": F.cross_entropy}[by_hand.settings.validation_loss]
    optimizer = torch.optim.SGD(bed.model.parameters(), lr=0.05)

    def rows_fn(parameters):
        buffers = {key: value.clone() for key, value in bed.model.named_buffers()}
        return functional_call(bed.model, {**parameters, **buffers}, (torch.cat([bed.x, bed.x_aug]),))[len(bed.x) :]

    for step in range(6):
        weights, labels = ours(step, bed.x_aug, bed.y_aug, bed.x_val, bed.y_val, x_train=bed.x)
        head = {key: value for key, value in bed.model.named_parameters() if key.startswith("8.")}
        parameters = head if by_hand.settings.scope == "head" else dict(bed.model.named_parameters())
        if by_hand.due(step):
            bed.model.eval()
            by_hand.refresh(parameters, lambda p: loss_fn(functional_call(bed.model, p, (bed.x_val,)), bed.y_val))
            bed.model.train()
        expected_weights, expected_labels = by_hand(rows_fn, parameters, bed.y_aug)
        assert torch.equal(weights, expected_weights)
        assert torch.equal(labels, expected_labels)
        optimizer.zero_grad()
        logits = bed.model(torch.cat([bed.x, bed.x_aug]))
        joint_loss(logits[: len(bed.x)], bed.y, logits[len(bed.x) :], labels, weights).backward()
        optimizer.step()
    assert (weights > 0).any()
    assert bool((weights == 0).any()) == (name != "paper-prob")  # gains of probabilities sum to zero: nothing is dropped


def test_gains_of_probabilities_are_another_method_than_gains_of_log_probabilities():
    labels = [decide(plain_net(), plain_rows()[1], preset=name)[1] for name in ("paper-log", "paper-prob")]
    assert not torch.equal(*labels)


def test_the_scope_is_the_presets_and_the_head_is_the_last_linear_layer_or_the_named_one():
    model = plain_net()
    assert set(Saflex.for_module(model).parameters) == {"2.weight", "2.bias"}
    assert set(Saflex.for_module(model, head="0").parameters) == {"0.weight", "0.bias"}
    assert set(Saflex.for_module(model, preset="paper").parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    model[0].requires_grad_(False)
    assert set(Saflex.for_module(model, scope="all").parameters) == {"2.weight", "2.bias"}
    assert set(Saflex.for_module(nn.Linear(5, 3)).parameters) == {"weight", "bias"}


def test_a_compiled_model_decides_as_the_model_that_it_wraps():
    model, y = plain_net(), plain_rows()[1]
    expected, found = decide(model, y, penalty=0.5), decide(torch.compile(model), y, penalty=0.5)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_without_augmented_rows_or_without_gains_there_is_nothing_to_compute():
    model, (x_val, y_val) = plain_net(), plain_rows(9, seed=1)
    weights, labels = Saflex.for_module(model, agreement="require")(0, x_val[:0], y_val[:0], x_val, y_val)
    assert (weights.shape, labels.shape) == ((0,), (0, 3))
    trusting = Saflex.for_module(model, weight_rule="all", agreement="ignore")
    weights, labels = trusting(0, x_val, y_val, x_val, y_val)
    assert weights.tolist() == [1.0] * 9
    assert torch.equal(labels, F.one_hot(y_val, 3).double())
    assert trusting.saflex.due(1), "no gradient was taken"


# --- labels


KINDS = {
    "uint8": lambda y: y.to(torch.uint8),
    "int8": lambda y: y.to(torch.int8),
    "int32": lambda y: y.to(torch.int32),
    "column": lambda y: y[:, None],
    "uint8 column": lambda y: y.to(torch.uint8)[:, None],
    "one-hot": lambda y: F.one_hot(y, 3),
    "list": lambda y: y.tolist(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_label_gives_what_int64_gives(kind):
    y = plain_rows(num_rows=6)[1]
    expected, found = decide(plain_net(), y, penalty=0.5), decide(plain_net(), KINDS[kind](y), penalty=0.5)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", ["column", "flat"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_one_logit_is_a_classifier_of_two(shape, kind):
    one = plain_net(outputs=1)
    two = copy.deepcopy(one)
    two[2] = nn.Linear(7, 2).double()
    with torch.no_grad():
        two[2].weight.copy_(torch.cat([torch.zeros(1, 7), one[2].weight]))
        two[2].bias.copy_(torch.tensor([0.0, float(one[2].bias)]))
    if shape == "flat":
        one.append(nn.Flatten(0))
    y = plain_rows(num_classes=2)[1]
    (x_aug, _), (x_val, y_val) = plain_rows(), plain_rows(9, 2, seed=1)
    y_given, y_val_given = y.to(kind), y_val.to(kind)[:, None]
    weights, labels = Saflex.for_module(one, head="2")(0, x_aug, y_given, x_val, y_val_given)
    assert labels.shape == (6, 2)
    # The loss is the binary cross entropy of the kept rows.
    logits = one(x_aug)
    losses = F.binary_cross_entropy_with_logits(logits.flatten(), labels[:, 1], reduction="none")
    found = joint_loss(logits[:0], y[:0], logits, labels, weights)
    torch.testing.assert_close(found, (losses * weights).sum() / weights.sum())
    # With two rows of weights both logits move, by opposite amounts: all gains are doubled, and the same rows are kept.
    assert torch.equal(Saflex.for_module(two)(0, x_aug, y, x_val, y_val)[0] > 0, weights > 0)


REFUSED = {
    "too large": (torch.tensor([0, 1, 2, 3, 0, 1]), r"y_aug has the label 3 in row 3: expected 6 class indices in 0\.\.2"),
    "too large, a column of uint8": (torch.tensor([0, 1, 2, 255, 0, 1]).to(torch.uint8)[:, None], "label 255 in row 3"),
    "negative": (torch.tensor([0, 1, -100, 2, 0, 1]), "label -100 in row 2"),
    "multi-label": (torch.ones(6, 3, dtype=torch.long), "multi-label"),
    "no class": (torch.zeros(6, 3), "multi-label"),
    "floating point": (torch.arange(6.0) % 3, "float32"),
    "complex": (torch.zeros(6, dtype=torch.complex64), "complex64"),
    "too few": (torch.tensor([0, 1]), r"shape \[2\]: expected 6"),
    "of other classes": (torch.full((6, 2), 0.5), r"\[6, 2\]"),
    "a map": (torch.zeros(6, 2, 2, dtype=torch.long), r"\[6, 2, 2\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_are_not_one_class_per_row_are_refused_in_one_line(case):
    labels, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        decide(plain_net(), labels)
    assert "\n" not in str(caught.value)


def test_validation_and_train_labels_are_checked_too():
    (x, y), model = plain_rows(), plain_net()
    with pytest.raises(ConfigError, match=r"y_val has the label 7 in row 5"):
        Saflex.for_module(model)(0, x, y, x, torch.tensor([0, 1, 2, 0, 1, 7]))
    with pytest.raises(ConfigError, match=r"y_val has soft labels"):
        Saflex.for_module(model)(0, x, y, x, F.one_hot(y, 3))
    with pytest.raises(ConfigError, match=r"y_train has the label 9 in row 0"):
        joint_loss(model(x), torch.full((6,), 9), model(x), F.one_hot(y, 3).double(), torch.ones(6).double())
    with pytest.raises(ConfigError, match="x_val has no rows"):
        Saflex.for_module(model)(0, x, y, x[:0], y[:0])


# --- models that are refused


class HiddenDropout(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, training=self.training))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def with_dropout():
    return nn.Sequential(OrderedDict(body=nn.Linear(5, 7), drop=nn.Dropout(0.5), fc=nn.Linear(7, 3)))


def conv_head():
    return nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 3, 1), nn.Flatten())


def with_integer_parameter():
    model = plain_net()
    model.register_parameter("offsets", nn.Parameter(torch.arange(3), requires_grad=False))
    return model


MODELS = {
    "dropout": (with_dropout, {}, r"'drop' \(Dropout\).*dropout=\"off\""),
    "recurrent dropout": (lambda: nn.LSTM(5, 3, num_layers=2, dropout=0.1), {"head": ""}, "LSTM"),
    "hidden dropout": (lambda: HiddenDropout(5, 3), {}, "draws random numbers"),
    "integers": (with_integer_parameter, {}, "'offsets' is torch.int64, expected floating point"),
    "complex": (lambda: nn.Linear(5, 3, dtype=torch.complex64), {}, "'weight' is torch.complex64"),
    "lazy": (lambda: nn.LazyLinear(3), {}, "'weight' is not initialised"),
    "no head": (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(5)), {}, "no Linear layer"),
    "another head": (plain_net, {"head": "fc"}, "head = 'fc': the model has no such module"),
    "head without parameters": (plain_net, {"head": "1"}, "no parameter of the head '1' is trained"),
    "frozen": (lambda: plain_net().requires_grad_(False), {"scope": "all"}, "no parameter of the model is trained"),
    "a pair": (lambda: Pair(5, 3), {}, "returned a tuple"),
    "a map": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (2, 2))), {}, r"\[2, 2, 2\]"),
    "wrapped": (lambda: nn.DataParallel(plain_net()), {}, "pass model.module"),
    "not the last": (conv_head, {}, "'0' has 4 outputs"),
    "rows": (plain_net, {"rows": "jont"}, "rows = 'jont': expected one of auto, joint, eval; did you mean 'joint'"),
    "option of dropout": (plain_net, {"dropout": "on"}, "dropout = 'on'"),
    "preset": (plain_net, {"preset": "robst"}, "did you mean 'robust'"),
    "evidence": (plain_net, {"preset": "posterior"}, "evidence is taken by the trainer"),
    "permuted": (plain_net, {"permute_gains": True}, "control experiment"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_and_options_that_do_not_fit_are_refused_in_one_line(case):
    make, options, message = MODELS[case]
    (x, y), model = plain_rows(), make()
    with pytest.raises(ConfigError, match=message) as caught:
        Saflex.for_module(model, **options)(0, x.float(), y, x.float(), y)
    assert "\n" not in str(caught.value)


def test_dropout_is_left_out_on_request_or_where_its_rate_is_zero_or_it_does_not_train():
    body, head = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
    y = plain_rows()[1]
    expected = decide(nn.Sequential(body, head), y, penalty=0.5)
    frozen = nn.Sequential(body, nn.Dropout(0.5).eval(), head)
    for model, options in (
        (nn.Sequential(body, nn.Dropout(0.5), head), {"dropout": "off"}),
        (nn.Sequential(body, nn.Dropout(0.0), head), {}),
        (frozen, {}),
    ):
        found = decide(model, y, penalty=0.5, **options)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    saflex = Saflex.for_module(frozen)
    frozen.train()
    (x_val, y_val) = plain_rows()
    with pytest.raises(ConfigError, match="'1'"):
        saflex(0, x_val, y_val, x_val, y_val)


def test_dropout_in_a_forward_that_is_left_out_draws_no_random_number():
    torch.manual_seed(0)
    model, (x, y), state = HiddenDropout(5, 3), plain_rows(), torch.get_rng_state()
    plain = nn.Linear(5, 3)
    plain.load_state_dict(model.state_dict())
    torch.set_rng_state(state)
    weights, labels = Saflex.for_module(model, dropout="off", penalty=0.5)(0, x.float(), y, x.float(), y)
    assert torch.equal(torch.get_rng_state(), state)
    expected = Saflex.for_module(plain, penalty=0.5)(0, x.float(), y, x.float(), y)
    assert torch.equal(weights, expected[0])
    assert torch.equal(labels, expected[1])


# --- the joint loss


def test_joint_loss_of_weights_one_is_the_cross_entropy_of_the_concatenation():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 4, generator=generator), torch.randint(4, (9,), generator=generator)
    expected = F.cross_entropy(logits, labels)
    for y_train in (labels[:5], labels[:5, None].to(torch.uint8), F.one_hot(labels[:5], 4)):
        found = joint_loss(logits[:5], y_train, logits[5:], F.one_hot(labels[5:], 4).float(), torch.ones(4))
        assert torch.equal(found, expected)


def test_a_kept_row_weighs_as_much_as_a_train_row():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(32, 4, generator=generator).double(), torch.randint(4, (32,), generator=generator)
    logits.requires_grad_()
    for kept in (0, 1, 5, 16):
        weights = (torch.arange(16) < kept).double()
        loss = joint_loss(logits[:16], labels[:16], logits[16:], F.one_hot(labels[16:], 4).double(), weights)
        torch.testing.assert_close(loss, F.cross_entropy(logits[: 16 + kept], labels[: 16 + kept]))
        gradient, errors = torch.autograd.grad(loss, logits)[0], logits.softmax(dim=1) - F.one_hot(labels, 4)
        sizes = (gradient / errors).mean(dim=1)
        torch.testing.assert_close(sizes, torch.where(torch.arange(32) < 16 + kept, 1 / (16 + kept), 0.0).double())
