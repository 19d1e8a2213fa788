"""The step with SigLIP's loss: gains and refusals of rows are those of brute force, and the bias is trained."""

import pytest
import torch
import torch.nn.functional as F
from clip_steps import make_step, make_task
from open_clip.loss import SigLipLoss
from torch.func import functional_call

from flyp_saflex.clip.model import load_clip
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tasks.label_space import Rows

TEXTS = ["a photo of a cat.", "a photo of a dog.", "a photo of an owl.", "two cats asleep on one chair", "an owl"]
TRAIN, AUGMENTED = 4, 3
CAPTIONS = [0, 1, 1, 3, 0, 2, 4]  # they repeat; 3 and 4 are those of single samples
LABELS = torch.tensor([0, 1, 2, 0, 1])
"""Of the validation rows."""


@pytest.fixture
def make(tiny_clip_dir):
    """`make(scope="head", ...)`: a step in float64 with its rows and validation rows."""
    clip = load_clip(f"local-dir:{tiny_clip_dir}")
    clip.model.double()

    def make(*, proxies="captions", saflex=True, scope="all", validation_loss="ce", logit_bias=-3.0, **options):
        torch.manual_seed(0)
        task = make_task(clip, TEXTS, proxies=proxies, logit_bias=logit_bias)
        settings = {"gain_scale": "none", "penalty": 0.0, "weight_rule": "all", "estimator": "exact", "average": 0.0}
        settings |= {"scope": scope, "validation_loss": validation_loss}
        step = make_step(task, saflex=Saflex(**settings) if saflex else None, **options)
        images = torch.randn(TRAIN + AUGMENTED, 3, 32, 32, dtype=torch.float64)
        rows = Rows(images, torch.tensor(CAPTIONS), torch.tensor(CAPTIONS) % 3, torch.arange(7), TRAIN)
        return step, rows, Validation(torch.randn(5, 3, 32, 32, dtype=torch.float64), LABELS, LABELS)

    return make


def all_gains(step, rows, monkeypatch):
    """Return the gains [A, K] that SAFLEX is given in a step."""
    seen, solve = [], step.saflex.solve
    monkeypatch.setattr(step.saflex, "solve", lambda gains, *a, **k: (seen.append(gains), solve(gains, *a, **k))[1])
    step(rows)
    return seen[0]


def moved(parameters, direction, rate):
    """Return the parameters moved by `rate * direction`."""
    return {name: value.detach() + rate * part for (name, value), part in zip(parameters.items(), direction, strict=True)}


@torch.no_grad()
def loss_of_validation(step, parameters, validation):
    inputs = validation.inputs, step.task.tokens_ML[:3]
    out = functional_call(step.task.network, parameters, inputs, tie_weights=False)
    if step.saflex.settings.validation_loss == "ce":
        return F.cross_entropy(out.logits(), validation.labels_V)
    present = sorted(set(LABELS.tolist()))  # `train`: SigLIP's loss over the captions of the validation rows
    logits, labels = out.logits()[:, present], F.one_hot(LABELS, 3)[:, present]
    return F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="sum") / len(labels)


@pytest.mark.parametrize("validation_loss", ["ce", "train"])
@pytest.mark.parametrize("scope", ["head", "all"])
def test_a_gain_is_what_a_tiny_step_on_a_row_and_label_takes_off_the_validation_loss(make, monkeypatch, scope, validation_loss):
    """A step down and one up SigLIP's loss of one row with one label, by open_clip's formula; the loss is measured at both."""
    step, rows, validation = make(scope=scope, validation_loss=validation_loss)
    network, choices = step.task.network, sorted(set(CAPTIONS))
    step.refresh(validation)
    gains_AK = all_gains(step, rows, monkeypatch)
    network.eval()
    trained, rate, largest = network.parameters_in(scope), 1e-9, float(gains_AK.abs().max())
    for row in range(AUGMENTED):
        logits = network(rows.inputs[TRAIN + row, None], step.task.tokens_ML[choices]).logits()[0]
        for label in range(len(choices)):
            signs = 2 * F.one_hot(torch.tensor(label), len(choices)) - 1
            loss = -F.logsigmoid(signs * logits).sum()
            found = torch.autograd.grad(loss, [*trained.values()], retain_graph=True, allow_unused=True, materialize_grads=True)
            down, up = (float(loss_of_validation(step, moved(trained, found, length), validation)) for length in (-rate, rate))
            assert float(gains_AK[row, label]) == pytest.approx((up - down) / (2 * rate), rel=1e-4, abs=1e-5 * largest)
    assert gains_AK.min() < -1 < 1 < gains_AK.max(), "some help, some harm"


def test_the_plain_step_is_open_clips_loss_over_the_whole_batch(make):
    step, rows, _ = make(proxies="batch", saflex=False)
    rows.num_train = len(rows.inputs)
    model, texts = step.task.clip.model, step.task.tokens_ML[rows.captions_N]
    features = model.encode_image(rows.inputs, normalize=True), model.encode_text(texts, normalize=True)
    expected = SigLipLoss()(*features, model.logit_scale.exp(), model.logit_bias)
    found = step(rows).loss
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    (ours,), (theirs,) = (torch.autograd.grad(loss, [model.logit_bias], retain_graph=True) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    assert ours.abs() > 0.1, "the bias learns"


def test_lowest_losses_are_those_of_the_sigmoid_loss(make):
    """The softmax, which never sees the bias, keeps other rows."""
    step, rows, _ = make(saflex=False, upstream_filter="lowest-loss", logit_bias=5.0)
    rows.num_train = 1
    choices, num_rows, differ = sorted(set(CAPTIONS)), len(CAPTIONS) - 1, 0
    with torch.no_grad():
        logits = step.task.network(rows.inputs[1:], step.task.tokens_ML[choices]).logits()
    labels = torch.tensor([[float(choice == caption) for choice in choices] for caption in CAPTIONS[1:]])
    losses = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none").sum(dim=1)
    softmax = -(labels * logits.log_softmax(dim=1)).sum(dim=1)
    for number in range(1, num_rows):
        step.augmented.keep_fraction = number / num_rows
        kept = (step(rows).weights_A > 0).nonzero()[:, 0].tolist()
        assert kept == sorted(losses.argsort()[:number].tolist())
        differ += kept != sorted(softmax.argsort()[:number].tolist())
    assert differ, "or the test tells nothing"
