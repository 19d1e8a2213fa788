"""The losses equal their references, stay linear in weights and labels, and never turn a dropped row into a NaN."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from flyp_saflex.saflex.losses import (
    VALIDATION_LOSSES,
    clip_loss,
    cross_entropy,
    margin,
    nt_xent,
    nt_xent_logits,
    nt_xent_partners,
    sigmoid_loss,
    sigmoid_losses,
    soft_cross_entropy,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def simplex(rows, columns, generator, dtype=torch.float64):
    return torch.rand(rows, columns, generator=generator, dtype=dtype).softmax(dim=1)


def value_and_gradient(loss_fn, logits):
    leaf = logits.clone().requires_grad_()
    loss = loss_fn(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# Above 16 and 4096 rows PyTorch's kernel changes how it adds rows up.
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 33, 256, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_onehot_cross_entropy_is_pytorchs_to_the_last_bit(num_rows, dtype, generator):
    logits = 10 * torch.randn(num_rows, 11, generator=generator, dtype=dtype)
    labels = torch.randint(11, (num_rows,), generator=generator)
    expected = value_and_gradient(lambda z: F.cross_entropy(z, labels), logits)
    for weights in (None, torch.ones(num_rows)):
        found = value_and_gradient(lambda z, weights=weights: soft_cross_entropy(z, F.one_hot(labels, 11), weights), logits)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_soft_cross_entropy_is_eq_7_over_the_sum_of_weights(generator):
    logits, labels = torch.randn(6, 4, generator=generator, dtype=torch.float64), simplex(6, 4, generator)
    weights = torch.rand(6, generator=generator, dtype=torch.float64)
    by_hand = sum(-weights[i] * labels[i, k] * torch.log(logits[i].softmax(0)[k]) for i in range(6) for k in range(4))
    torch.testing.assert_close(soft_cross_entropy(logits, labels, weights), by_hand / weights.sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("loss_fn", [soft_cross_entropy, clip_loss, sigmoid_loss])
def test_half_precision_logits_are_computed_in_float32(loss_fn, generator):
    logits, labels = torch.randn(5, 5, generator=generator).bfloat16(), torch.eye(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_fn(logits, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss_fn(logits.float(), labels))


def test_impossible_classes_without_mass_are_harmless():
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    loss, gradient = value_and_gradient(lambda z: soft_cross_entropy(z, torch.tensor([[1.0, 0.0, 0.0]])), logits)
    torch.testing.assert_close(loss, torch.log(torch.tensor(1 + math.e)))
    assert gradient.isfinite().all()
    assert soft_cross_entropy(logits, torch.tensor([[0.5, 0.0, 0.5]])) == math.inf  # mass on the impossible is not hidden


@pytest.mark.parametrize("loss_fn", [soft_cross_entropy, clip_loss, sigmoid_loss])
def test_all_weights_zero_is_zero_with_zero_gradient(loss_fn, generator):
    logits = torch.randn(4, 4, generator=generator)
    loss, gradient = value_and_gradient(lambda z: loss_fn(z, torch.eye(4), torch.zeros(4)), logits)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(logits))
    assert loss_fn(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


@pytest.mark.parametrize("num_rows", [2, 16, 33, 300])
def test_plain_clip_loss_is_open_clips_to_the_last_bit(num_rows, generator):
    # Features in eighths make both of ClipLoss' matrix products exact in float32, so that they are each other's transpose:
    # what is compared is the loss, not the rounding of two products.
    image, text = (torch.randint(-8, 9, (num_rows, 16), generator=generator) / 8 for _ in range(2))
    scale = torch.tensor(4.0)
    image, text = image.requires_grad_(), text.requires_grad_()
    expected = ClipLoss()(image, text, scale)
    found = clip_loss(scale * image @ text.T, torch.eye(num_rows))
    assert torch.equal(found, expected)
    assert torch.equal(clip_loss(scale * image @ text.T, torch.eye(num_rows), torch.ones(num_rows)), expected)
    # The gradients differ in the order in which the two products' parts are added.
    for a, b in zip(torch.autograd.grad(found, [image, text]), torch.autograd.grad(expected, [image, text]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_plain_clip_loss_is_open_clips_in_float64(generator):
    image, text = (F.normalize(torch.randn(20, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    image, text = image.requires_grad_(), text.requires_grad_()
    expected, found = ClipLoss()(image, text, 100.0), clip_loss(100.0 * image @ text.T, torch.eye(20))
    assert abs(found - expected) < 1e-12
    for a, b in zip(torch.autograd.grad(found, [image, text]), torch.autograd.grad(expected, [image, text]), strict=True):
        assert (a - b).abs().max() < 1e-12


def by_hand(logits, assignment_NC, weights):
    """Both terms of Eq. (13), generalised as Eq. (14), with loops: dropped rows are no negatives."""
    kept = [i for i in range(len(logits)) if weights[i] > 0]
    total = loss = 0.0
    for i in kept:
        for j in range(logits.shape[1]):
            mass = float(weights[i] * assignment_NC[i, j])
            row = math.log(sum(math.exp(float(z)) for z in logits[i]))
            column = math.log(sum(math.exp(float(logits[k, j])) for k in kept))
            loss += mass * (row - float(logits[i, j])) + mass * (column - float(logits[i, j]))
            total += mass
    return loss / total / 2


@pytest.mark.parametrize("case", ["shared captions", "soft labels", "column without mass"])
def test_clip_loss_is_the_written_formula(case, generator):
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    if case == "shared captions":  # several images of one caption: several positives in its column
        mass = F.one_hot(torch.tensor([0, 1, 0, 2, 3, 1]), 4).double()
    elif case == "soft labels":
        mass = simplex(6, 4, generator)
    else:  # caption 1 belongs to dropped rows only, caption 3 to none
        mass = F.one_hot(torch.tensor([0, 1, 0, 2, 2, 1]), 4).double()
    loss, gradient = value_and_gradient(lambda z: clip_loss(z, mass, weights), logits)
    assert abs(float(loss) - by_hand(logits, mass, weights)) < 1e-12
    assert gradient.isfinite().all()
    dropped = gradient[weights == 0]
    assert torch.equal(dropped, torch.zeros_like(dropped))  # a dropped row teaches nothing, in either term
    assert torch.autograd.gradcheck(lambda z: clip_loss(z, mass, weights), logits.clone().requires_grad_())


@pytest.mark.parametrize("loss_fn", [clip_loss, sigmoid_loss])
def test_dropping_rows_equals_leaving_them_out(loss_fn, generator):
    logits, mass = torch.randn(7, 5, generator=generator, dtype=torch.float64), simplex(7, 5, generator)
    kept = torch.tensor([True, False, True, True, False, False, True])
    torch.testing.assert_close(loss_fn(logits, mass, kept.double()), loss_fn(logits[kept], mass[kept]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("loss_fn", [soft_cross_entropy, clip_loss, sigmoid_loss])
def test_losses_times_mass_are_linear_in_labels(loss_fn, generator):
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    first, second = simplex(5, 4, generator), simplex(5, 4, generator)
    mixed = loss_fn(logits, 0.3 * first + 0.7 * second)
    torch.testing.assert_close(mixed, 0.3 * loss_fn(logits, first) + 0.7 * loss_fn(logits, second), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_rows", [1, 2, 33])
def test_plain_sigmoid_loss_is_open_clips(num_rows, dtype, tolerance, generator):
    images, texts = (F.normalize(torch.randn(num_rows, 8, generator=generator, dtype=dtype), dim=1) for _ in range(2))
    leaves = [images, texts, torch.tensor(20.0, dtype=dtype), torch.tensor(-10.0, dtype=dtype)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    images, texts, scale, bias = leaves
    expected, found = SigLipLoss()(*leaves), sigmoid_loss(scale * images @ texts.T + bias, torch.eye(num_rows, dtype=dtype))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_sigmoid_loss_is_the_written_formula(generator):
    logits, labels = torch.randn(6, 4, generator=generator, dtype=torch.float64), simplex(6, 4, generator)
    weights = torch.rand(6, generator=generator, dtype=torch.float64)
    by_hand = sum(
        weights[i] * (math.log1p(math.exp(logits[i, j])) - labels[i, j] * logits[i, j]) for i in range(6) for j in range(4)
    )
    torch.testing.assert_close(sigmoid_loss(logits, labels, weights), by_hand / weights.sum(), rtol=1e-13, atol=0)


def test_sigmoid_losses_of_large_logits_keep_their_digits():
    """softplus(z) - z of z = 20 is 2e-9; as a difference of float32 numbers it would be zero."""
    found = sigmoid_losses(torch.tensor([[20.0, -20.0]]), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([2 * math.exp(-20)]), rtol=1e-5, atol=0)


def test_nt_xent_is_the_textbook_formula(generator):
    first, second = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    views = torch.cat([first, second])
    loss = 0.0
    for i in range(8):
        partner = (i + 4) % 8
        similar = [float(F.cosine_similarity(views[i], views[j], dim=0)) / 0.2 for j in range(8)]
        loss += -similar[partner] + math.log(sum(math.exp(similar[j]) for j in range(8) if j != i))
    assert abs(float(nt_xent(first, second, 0.2)) - loss / 8) < 1e-12
    # Its proxies are the other views: the diagonal is gone, the rest is in order.
    logits, partners = nt_xent_logits(first, second, 0.2), nt_xent_partners(4)
    assert logits.shape == (8, 7)
    for i in range(8):
        others = [j for j in range(8) if j != i]
        assert others[int(partners[i])] == (i + 4) % 8
        expected = torch.stack([F.cosine_similarity(views[i], views[j], dim=0) for j in others]) / 0.2
        torch.testing.assert_close(logits[i], expected)


def test_nt_xent_takes_soft_labels_and_weights(generator):
    first, second = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, weights = simplex(6, 5, generator), torch.tensor([1.0, 0, 1, 0.5, 1, 1], dtype=torch.float64)
    expected = soft_cross_entropy(nt_xent_logits(first, second, 0.5), labels, weights)
    assert torch.equal(nt_xent(first, second, 0.5, labels, weights), expected)


def test_margin_is_cross_entropy_at_infinite_temperature(generator):
    logits, labels = torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 0])
    hot = 1e6  # the error of the limit is var(z) / (2 T)
    limit = hot * (cross_entropy(logits / hot, labels) - math.log(4))
    torch.testing.assert_close(margin(logits, labels), limit, rtol=0, atol=1e-5)
    by_hand = sum(logits[i].mean() - logits[i, labels[i]] for i in range(5)) / 5
    torch.testing.assert_close(margin(logits, labels), by_hand)
    assert set(VALIDATION_LOSSES) == {"ce", "margin"}
