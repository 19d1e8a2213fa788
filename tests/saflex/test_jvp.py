"""Gains equal brute-force gradients, row by row and label by label, on every kind of model that open_clip builds."""

from __future__ import annotations

from types import SimpleNamespace

import open_clip.model
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from flyp_saflex.saflex.closed_form import gains, symmetric_gains
from flyp_saflex.saflex.jvp import directional_derivative, gradient, rms
from flyp_saflex.saflex.losses import cross_entropy, margin, nt_xent_logits, soft_cross_entropy

MODELS = ("mlp", "vit-clip", "resnet-clip", "efficientnet-clip", "convnet")
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}
VISION = {
    "vit-clip": {"image_size": 16, "patch_size": 8, "layers": 2, "width": 16, "head_width": 8},
    "resnet-clip": {"image_size": 32, "layers": (1, 1, 1, 1), "width": 2, "head_width": 8},
    "efficientnet-clip": {"image_size": 32, "timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear"},
}
NUM_ROWS = 3


def settle(model, dtype=torch.float64):
    """Evaluation mode with BatchNorm statistics and affine parameters away from their initial zeros and ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.to(dtype).eval()


def case(kind, dtype=torch.float64):
    """A tiny model as a function of its parameters: augmented rows' logits, validation loss, parameters."""
    torch.manual_seed(0)
    labels = torch.tensor([1, 0, 2, 3])
    if kind in VISION:
        model = settle(open_clip.model.CLIP(16, VISION[kind], TEXT), dtype)
        nn.init.normal_(model.text_projection, std=0.3)
        size = VISION[kind]["image_size"]
        images, validation = (torch.randn(n, 3, size, size, dtype=dtype) for n in (NUM_ROWS, 4))
        captions = torch.randint(1, 31, (4, 8))

        def logits_of(parameters, batch):
            image, text, scale = functional_call(model, parameters, (batch, captions))[:3]
            return scale * image @ text.T

    else:
        if kind == "mlp":
            model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
            images, validation = (torch.randn(n, 5, dtype=dtype) for n in (NUM_ROWS, 4))
        else:
            model = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 4)
            )
            images, validation = (torch.randn(n, 3, 8, 8, dtype=dtype) for n in (NUM_ROWS, 4))
        settle(model, dtype)

        def logits_of(parameters, batch):
            return functional_call(model, parameters, (batch,))

    return SimpleNamespace(
        model=model,
        parameters=dict(model.named_parameters()),
        logits_fn=lambda parameters: logits_of(parameters, images),
        train_logits_fn=lambda parameters: logits_of(parameters, validation),
        validation_loss_fn=lambda parameters: cross_entropy(logits_of(parameters, validation), labels),
        margin_fn=lambda parameters: margin(logits_of(parameters, validation), labels),
    )


def brute_force(loss_of, shape, parameters, direction):
    """<direction, gradient of the loss of row i with label k>, one backward pass for each."""
    found = torch.zeros(shape, dtype=torch.float64)
    for i in range(shape[0]):
        for k in range(shape[1]):
            each = gradient(lambda p, i=i, k=k: loss_of(p, i, k), parameters)
            found[i, k] = sum((each[name] * direction[name]).sum() for name in parameters)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_gains_match_brute_force_per_sample_gradients(kind):
    c = case(kind)
    g = gradient(c.validation_loss_fn, c.parameters)
    logits, tangent = directional_derivative(c.logits_fn, c.parameters, g)
    assert rms(tangent) > 1e-6, "the direction moves the logits"
    expected = brute_force(lambda p, i, k: -c.logits_fn(p)[i].log_softmax(0)[k], logits.shape, c.parameters, g)
    torch.testing.assert_close(gains(logits, tangent), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["vit-clip", "resnet-clip", "efficientnet-clip"])
def test_symmetric_gains_match_brute_force_on_both_terms_of_the_clip_loss(kind):
    c = case(kind)
    g = gradient(c.margin_fn, c.parameters)
    logits, tangent = directional_derivative(c.logits_fn, c.parameters, g)
    train = directional_derivative(c.train_logits_fn, c.parameters, g)

    def loss_with(blocks):
        def loss_of(p, i, k):
            z = torch.cat([fn(p) for fn in blocks])
            return -(z.log_softmax(1)[i, k] + z.log_softmax(0)[i, k]) / 2

        return loss_of

    expected = brute_force(loss_with([c.logits_fn]), logits.shape, c.parameters, g)
    torch.testing.assert_close(symmetric_gains(logits, tangent), expected, rtol=1e-8, atol=1e-8)
    expected = brute_force(loss_with([c.logits_fn, c.train_logits_fn]), logits.shape, c.parameters, g)
    torch.testing.assert_close(symmetric_gains(logits, tangent, *train), expected, rtol=1e-8, atol=1e-8)


def test_gains_match_brute_force_on_nt_xent():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    parameters = dict(encoder.named_parameters())
    first, second, x_val, y_val = (torch.randn(3, 5).double() for _ in range(4))

    def logits_of(p, a, b):
        return nt_xent_logits(functional_call(encoder, p, (a,)), functional_call(encoder, p, (b,)), 0.5)

    g = gradient(lambda p: soft_cross_entropy(logits_of(p, x_val, y_val), F.one_hot(torch.arange(6) % 5, 5)), parameters)
    logits, tangent = directional_derivative(lambda p: logits_of(p, first, second), parameters, g)
    expected = brute_force(lambda p, i, k: -logits_of(p, first, second)[i].log_softmax(0)[k], (6, 5), parameters, g)
    torch.testing.assert_close(gains(logits, tangent), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("estimator", ["central", "one-sided"])
def test_finite_differences_come_close_in_float32(kind, estimator):
    c = case(kind, torch.float32)
    g = gradient(c.validation_loss_fn, c.parameters)
    _, exact = directional_derivative(c.logits_fn, c.parameters, g)
    # At a logit change of 3e-3 the one-sided truncation is up to 1.3 times the change; rounding, and for the central
    # difference a ReLU that switches inside the step, are a part of it. Random networks are rough: twice that.
    tolerance = {"central": 6e-3, "one-sided": 1e-2}[estimator]
    for previous in (None, rms(exact)):  # step size by trial, and from the last step's derivative
        logits, found = directional_derivative(c.logits_fn, c.parameters, g, estimator=estimator, previous_rms=previous)
        assert rms(found - exact) < tolerance * rms(exact)
        torch.testing.assert_close(logits, c.logits_fn(c.parameters).detach(), rtol=1e-3, atol=1e-3)


def test_finite_differences_err_as_their_order_says():
    c = case("mlp")
    g = gradient(c.validation_loss_fn, c.parameters)
    _, exact = directional_derivative(c.logits_fn, c.parameters, g)

    def error(estimator, target):
        _, found = directional_derivative(
            c.logits_fn, c.parameters, g, estimator=estimator, target_rms=target, previous_rms=rms(exact)
        )
        return rms(found - exact) / rms(exact)

    # Float64: truncation only. A tenth of the step is a tenth of the one-sided error, a hundredth of the central one.
    assert error("one-sided", 1e-3) / error("one-sided", 1e-2) == pytest.approx(0.1, rel=0.2)
    assert error("central", 1e-2) / error("central", 1e-1) == pytest.approx(0.01, rel=0.2)


def test_one_sided_takes_the_training_steps_logits_and_saves_a_pass():
    c = case("mlp", torch.float32)
    g = gradient(c.validation_loss_fn, c.parameters)
    passes = []

    def counted(parameters):
        passes.append(1)
        return c.logits_fn(parameters)

    base = c.logits_fn(c.parameters)
    logits, found = directional_derivative(counted, c.parameters, g, estimator="one-sided", logits=base, previous_rms=0.1)
    assert len(passes) == 1
    assert torch.equal(logits, base.detach())
    # Half-precision logits are recomputed: their rounding would be the whole difference.
    _, again = directional_derivative(counted, c.parameters, g, estimator="one-sided", logits=base.bfloat16(), previous_rms=0.1)
    assert len(passes) == 3
    assert torch.equal(found, again)
    # So are those of an autocast step: they may have been computed in half precision and converted since.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        off = base.bfloat16().float()
        _, again = directional_derivative(counted, c.parameters, g, estimator="one-sided", logits=off, previous_rms=0.1)
    assert torch.equal(found, again)


@pytest.mark.parametrize("estimator", ["exact", "central", "one-sided"])
def test_autocast_does_not_reach_the_derivative(estimator):
    c = case("vit-clip", torch.float32)
    g = gradient(c.validation_loss_fn, c.parameters)
    plain = directional_derivative(c.logits_fn, c.parameters, g, estimator=estimator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = directional_derivative(c.logits_fn, c.parameters, g, estimator=estimator, logits=plain[0].bfloat16())
    assert cast[0].dtype == cast[1].dtype == torch.float32
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


@pytest.mark.parametrize("estimator", ["exact", "central", "one-sided"])
def test_a_zero_direction_gives_a_zero_tangent(estimator):
    c = case("mlp")
    zeros = {name: torch.zeros_like(value) for name, value in c.parameters.items()}
    logits, tangent = directional_derivative(c.logits_fn, c.parameters, zeros, estimator=estimator)
    assert torch.equal(tangent, torch.zeros_like(logits))


@pytest.mark.parametrize("estimator", ["central", "one-sided"])
def test_a_direction_that_the_logits_ignore_gives_a_zero_tangent(estimator):
    c = case("mlp")
    parameters = c.parameters | {"unused": torch.ones(2, dtype=torch.float64)}
    direction = {name: torch.zeros_like(value) for name, value in parameters.items()} | {"unused": torch.ones(2)}

    def logits_fn(p):
        return c.logits_fn({name: value for name, value in p.items() if name != "unused"})

    _, tangent = directional_derivative(logits_fn, parameters, direction, estimator=estimator)
    assert torch.equal(tangent, torch.zeros_like(tangent))


def test_derivatives_leave_the_model_and_the_settings_alone():
    c = case("vit-clip", torch.float32)
    before = {name: value.clone() for name, value in c.model.state_dict().items()}
    backends = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    with torch.no_grad():  # a caller's no_grad does not empty the gradient
        g = gradient(c.validation_loss_fn, c.parameters)
    logits, tangent = directional_derivative(c.logits_fn, c.parameters, g)
    assert any(value.abs().sum() > 0 for value in g.values())
    assert not logits.requires_grad
    assert not tangent.requires_grad
    assert all(parameter.grad is None for parameter in c.parameters.values())
    assert all(torch.equal(before[name], value) for name, value in c.model.state_dict().items())
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == backends


def test_gradient_is_zero_for_unused_parameters():
    parameters = {"used": torch.tensor([1.0, 2.0]), "unused": torch.ones(3)}
    found = gradient(lambda p: p["used"].square().sum(), parameters)
    assert found["used"].tolist() == [2.0, 4.0]
    assert found["unused"].tolist() == [0.0, 0.0, 0.0]
    assert gradient(lambda p: torch.tensor(1.0), parameters)["used"].tolist() == [0.0, 0.0]


def test_a_part_of_the_parameters_is_a_scope():
    c = case("vit-clip")
    full = gradient(c.validation_loss_fn, c.parameters)
    head = {name: value for name, value in c.parameters.items() if not name.startswith("visual.transformer")}
    g = gradient(c.validation_loss_fn, head)
    assert g.keys() == head.keys()
    assert all(torch.allclose(g[name], full[name]) for name in head)
    rest = {name: torch.zeros_like(value) for name, value in c.parameters.items()}
    _, part = directional_derivative(c.logits_fn, head, g)
    _, padded = directional_derivative(c.logits_fn, c.parameters, rest | g)
    torch.testing.assert_close(part, padded)


def test_timm_efficientnet_with_in_place_activations_is_exact():
    torch.manual_seed(0)
    model = settle(timm.create_model("test_efficientnet", num_classes=4))
    images = torch.randn(2, 3, 32, 32).double()
    parameters = dict(model.named_parameters())
    direction = {name: torch.randn_like(value) for name, value in parameters.items()}
    _, exact = directional_derivative(lambda p: functional_call(model, p, (images,)), parameters, direction)
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    logits = functional_call(model, leaves, (images,))
    for i in range(2):
        for k in range(4):
            each = torch.autograd.grad(logits[i, k], list(leaves.values()), retain_graph=True)
            dot = sum((a * direction[name]).sum() for a, name in zip(each, leaves, strict=True))
            torch.testing.assert_close(exact[i, k], dot, rtol=1e-8, atol=1e-8)
