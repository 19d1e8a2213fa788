"""The step: gains are those of brute-force gradients, the loss is the sum of its parts."""

from dataclasses import replace
from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_steps import apart as exchange_forward
from clip_steps import make_step, make_task
from torch.utils.flop_counter import FlopCounterMode

from flyp_saflex.clip.model import Clip, load_clip
from flyp_saflex.saflex.losses import margin
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.step_gains import products_for
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.tasks.proxy_classes import first_with_equal_tokens

CLASSES = ["a photo of a cat.", "a photo of a dog.", "a photo of an owl."]
OWN = ["two cats asleep on one chair", "an owl"]
TRAIN, AUGMENTED = 4, 3
# Captions repeat, also between training and augmented rows (twice: halves are exact); 3 and 4 are captions of single samples.
CAPTIONS = [0, 1, 1, 3, 0, 2, 4]
LABELS = [0, 1, 1, 0, 0, 2, 2]


@pytest.fixture
def clip(tiny_clip_dir):
    clip = load_clip(f"local-dir:{tiny_clip_dir}")
    clip.model.double()
    return clip


def make(clip, *, head=False, num_frozen=0, dtype=torch.float64, proxies="captions", **options):
    torch.manual_seed(0)
    task = make_task(clip, [*CLASSES, *OWN], head=head, num_frozen=num_frozen, proxies=proxies)
    chosen = {"scope": "head", "validation_loss": "ce", "estimator": "exact", "average": 0.5}
    chosen = {name: options.pop(name, default) for name, default in chosen.items()}
    options.setdefault("saflex", Saflex(gain_scale="none", penalty=0.0, weight_rule="all", **chosen))
    step, network = make_step(task, **options), task.network
    images = torch.randn(TRAIN + AUGMENTED, 3, 32, 32, dtype=dtype)
    rows = Rows(network.lower(images).detach(), torch.tensor(CAPTIONS), torch.tensor(LABELS), torch.arange(7), TRAIN)
    labels = torch.tensor([0, 1, 2, 0, 1])
    validation = Validation(network.lower(torch.randn(5, 3, 32, 32, dtype=dtype)).detach(), labels, labels)
    return network, step, rows, validation


def gains_of(step, rows, monkeypatch):
    """Run a step and return the gains that SAFLEX was given [A, K], and the result."""
    seen = []
    solve = step.saflex.solve
    monkeypatch.setattr(step.saflex, "solve", lambda gains, *a, **k: (seen.append(gains), solve(gains, *a, **k))[1])
    return step(rows), seen[0]


def apart(step):
    """Wrap the forward pass: the derivative is then taken in a pass of its own."""
    exchange_forward(step, partial(type(step.task.network).__call__, step.task.network))


def brute_force(network, step, rows, columns, choices):
    """<g, grad(-log p)> of every augmented row and choice, by one backward pass each; repeated columns share a choice's mass."""
    gradient = step.saflex.state_dict()["gradient"]
    parameters = dict(network.named_parameters())
    network.eval()
    if network.head is None:
        logits = network(rows.inputs[TRAIN:], step.task.tokens_ML[columns]).logits()
    else:
        logits = network(rows.inputs[TRAIN:]).logits()
    log_probs = logits.log_softmax(dim=1)
    gains = torch.empty(AUGMENTED, len(choices), dtype=torch.float64)
    for row in range(AUGMENTED):
        for k, choice in enumerate(choices):
            value = -log_probs[row, torch.tensor([column == choice for column in columns])].mean()
            found = torch.autograd.grad(value, [parameters[name] for name in gradient], retain_graph=True, allow_unused=True)
            gains[row, k] = sum((g * v).sum() for g, v in zip(found, gradient.values(), strict=True) if g is not None)
    return gains


@pytest.mark.parametrize("proxies", ["captions", "batch"])
@pytest.mark.parametrize("scope", ["head", "all", "all, in a pass of its own"])
@pytest.mark.parametrize("validation_loss", ["ce", "train"])
def test_gains_match_brute_force(clip, monkeypatch, proxies, scope, validation_loss):
    settings = {"scope": scope.split(",")[0], "proxies": proxies, "num_frozen": 1, "validation_loss": validation_loss}
    network, step, rows, validation = make(clip, **settings)
    if "own" in scope:
        apart(step)
    step.refresh(validation)
    result, gains = gains_of(step, rows, monkeypatch)
    choices = sorted(set(CAPTIONS))
    expected = brute_force(network, step, rows, CAPTIONS if proxies == "batch" else choices, choices)
    torch.testing.assert_close(gains, expected, rtol=1e-8, atol=1e-8)
    assert gains.abs().max() > 1e-3
    own = [choices.index(caption) for caption in CAPTIONS[TRAIN:]]
    torch.testing.assert_close(result.gains_A, expected[range(AUGMENTED), own], rtol=1e-8, atol=1e-8)
    assert result.top_labels_AJ[:, 0].tolist() == [choices[k] for k in expected.argmax(dim=1)]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("scope", ["head", "all"])
def test_gains_of_cross_entropy_match_brute_force(clip, monkeypatch, head, scope):
    network, step, rows, validation = make(clip, scope=scope, head=head, contrastive=False)
    step.refresh(validation)
    result, gains = gains_of(step, rows, monkeypatch)
    torch.testing.assert_close(gains, brute_force(network, step, rows, [0, 1, 2], [0, 1, 2]), rtol=1e-8, atol=1e-8)
    assert result.top_labels_AJ[:, 0].tolist() == gains.argmax(dim=1).tolist()


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_refresh_in_parts_equals_refresh_at_once(clip, scope, loss):
    gradients = []
    for rows_at_once in (2, 100):
        _, step, _, validation = make(clip, scope=scope, validation_loss=loss, rows_at_once=rows_at_once)
        step.refresh(validation)
        gradients.append(step.saflex.state_dict()["gradient"])
    for name in gradients[1]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=0, atol=1e-12)


def test_head_scope_gradient_is_a_part_of_the_whole_one(clip):
    gradients = {}
    for scope in ("head", "all"):
        _, step, _, validation = make(clip, scope=scope)
        step.refresh(validation)
        gradients[scope] = step.saflex.state_dict()["gradient"]
    assert gradients["head"].keys() < gradients["all"].keys()
    for name, value in gradients["head"].items():
        torch.testing.assert_close(value, gradients["all"][name], rtol=0, atol=1e-12)


def test_learned_mass_is_in_the_loss(clip, monkeypatch):
    """Labels are learned and two of three rows dropped: the loss is Eq. (14) with just these."""
    network, step, rows, validation = make(clip)
    step.refresh(validation)
    labels = torch.tensor([[0.5, 0.0, 0.2, 0.3, 0.0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.0, 0.0, 1.0])
    labels = labels[[1, 2, 0]]
    monkeypatch.setattr(step.saflex, "solve", lambda *a, **k: (weights, labels))
    loss = step(rows).loss
    logits = network(rows.inputs, step.task.tokens_ML).logits()[[0, 1, 2, 3, 6]]
    mass = torch.cat([F.one_hot(torch.tensor(CAPTIONS[:TRAIN]), 5), labels[2:]])
    expected = -(mass * logits.log_softmax(1)).sum() - (mass * logits.log_softmax(0)).sum()
    torch.testing.assert_close(loss, expected / 2 / 5, rtol=1e-6, atol=0)


def test_nothing_of_the_model_is_touched(clip):
    network, step, rows, validation = make(clip, scope="all")
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    step.refresh(validation)
    step(rows)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(("name", "kept"), [("argmax", None), ("lowest-loss", 1), ("random", 1), ("none", 3)])
def test_plain_filters_drop_rows(clip, name, kept):
    network, step, rows, _ = make(clip, saflex=None, upstream_filter=name, keep_fraction=0.34)
    result = step(rows, generator=torch.Generator().manual_seed(0))
    if name == "argmax":
        choices = sorted(set(CAPTIONS))
        agrees = network(rows.inputs[TRAIN:], step.task.tokens_ML[choices]).logits().argmax(dim=1)
        assert (result.weights_A > 0).tolist() == [choices[k] == own for k, own in zip(agrees, CAPTIONS[TRAIN:], strict=True)]
    else:
        assert int((result.weights_A > 0).sum()) == kept
    assert result.ids_A.tolist() == [4, 5, 6]


def test_a_step_without_augmented_rows_has_none(clip):
    _, step, rows, validation = make(clip)
    step.refresh(validation)
    few = Rows(rows.inputs[:TRAIN], rows.captions_N[:TRAIN], rows.labels_N[:TRAIN], rows.ids_N[:TRAIN], TRAIN)
    result = step(few)
    assert len(result.weights_A) == len(result.ids_A) == 0
    assert result.loss.isfinite()


def test_captions_that_read_the_same_are_one_proxy_class():
    tokens = torch.tensor([[1, 2, 0], [1, 3, 0], [1, 2, 0], [4, 0, 0], [1, 3, 0]])
    assert first_with_equal_tokens(tokens).tolist() == [0, 1, 0, 3, 1]


def count_passes(network, monkeypatch):
    passes = []
    upper = network.tower.upper
    monkeypatch.setattr(network.tower, "upper", lambda inputs: (passes.append(len(inputs)), upper(inputs))[1])
    return passes


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("method", ["captions", "batch", "cross entropy", "linear head"])
def test_the_training_passs_products_save_work_and_change_nothing(clip, monkeypatch, method, scope):
    """1e-12 in float64: training's attention kernel sums in another order than the plain formula."""
    options = {"proxies": method} if method in ("captions", "batch") else {"contrastive": False, "head": method == "linear head"}
    found, operations = [], []
    for used in (True, False):
        network, step, rows, validation = make(clip, scope=scope, **options)
        network.train()
        if not used:
            apart(step)
        step.refresh(validation)
        with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
            result, gains = gains_of(step, rows, patch)
        operations.append(counter.get_total_flops())
        network.zero_grad()
        result.loss.backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        found.append((result.loss.detach(), gains, gradients))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert found[0][1].abs().max() > 1e-3
    trivial = scope == "head" and method == "linear head"  # the projection is no layer
    assert operations[0] < operations[1] or trivial


@pytest.mark.parametrize("scope", ["head", "all"])
def test_the_exact_derivative_in_half_precision_is_near_that_in_full(clip, monkeypatch, scope):
    clip.model.float()
    found = []
    for half in (False, True):
        network, step, rows, validation = make(clip, scope=scope, dtype=torch.float32)
        step.refresh(validation)
        if half:
            network.forward = torch.autocast("cpu", dtype=torch.bfloat16)(network.forward)  # as accelerate does
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            found.append(gains_of(step, rows, monkeypatch)[1])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.05 * float(found[0].abs().max()))


@pytest.mark.parametrize(
    "reason", ["dropout", "recomputed activations", "autocast", "a difference", "a compiler", "no augmented rows"]
)
def test_products_are_kept_only_where_they_are_those_of_the_same_function(clip, reason):
    options = {"scope": "all", "estimator": "central" if reason == "a difference" else "exact"}
    network, step, rows, validation = make(clip, **options)
    network.train()
    step.refresh(validation)
    assert products_for(network, network, step.saflex, rows) is not None or reason == "a difference"
    if reason == "dropout":
        clip.model.visual.transformer.resblocks[0].attn.dropout = 0.1
    network.recomputes = reason == "recomputed activations"
    if reason == "a compiler":
        apart(step)
    if reason == "no augmented rows":
        rows.num_train = len(rows.inputs)
    with torch.autocast("cpu", enabled=reason == "autocast"):
        assert products_for(step.forward, network, step.saflex, rows) is None


@pytest.mark.parametrize("estimator", ["exact", "one-sided"])
def test_the_derivative_of_a_convnet_that_trains_in_half_precision(monkeypatch, estimator):
    """PyTorch has no forward mode for BatchNorm in mixed precision, and differences are lost in it: both stay in float32."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()
    tokenizer = partial(open_clip.tokenize, context_length=16)
    clip = Clip(model, lambda image: image, tokenizer, {"preprocess_cfg": {"size": 32}})
    found = []
    for half in (False, True):
        network, step, rows, validation = make(clip, scope="all", estimator=estimator, dtype=torch.float32)
        step.refresh(validation)
        if half:  # as accelerate does
            network.forward = torch.autocast("cpu", dtype=torch.bfloat16)(network.forward)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            found.append(gains_of(step, rows, monkeypatch)[1])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.02 * float(found[0].abs().max()))


@pytest.mark.parametrize("proxies", ["captions", "batch"])
def test_one_sided_differences_start_from_the_steps_own_logits(clip, monkeypatch, proxies):
    clip.model.float()
    found = {}
    for estimator in ("exact", "auto"):
        network, step, rows, validation = make(clip, scope="all", proxies=proxies, estimator=estimator, dtype=torch.float32)
        network.train()
        step.refresh(validation)
        step(rows)  # finds the step size
        with monkeypatch.context() as patch:
            passes = count_passes(network, patch)
            _, found[estimator] = gains_of(step, rows, patch)
        if estimator == "auto":
            assert passes == [TRAIN + AUGMENTED, AUGMENTED], "the step's pass and one beside it"
            clip.model.visual.transformer.resblocks[0].attn.dropout = 0.1  # another function than in evaluation mode
            with monkeypatch.context() as patch:
                passes = count_passes(network, patch)
                _, dropped = gains_of(step, rows, patch)
            assert passes == [TRAIN + AUGMENTED, AUGMENTED, AUGMENTED]
            clip.model.visual.transformer.resblocks[0].attn.dropout = 0.0
            torch.testing.assert_close(dropped, found["auto"], rtol=0, atol=0.01 * float(found["auto"].abs().max()))
    # 1 %: twice the truncation at a logit change of 3e-3, on random weights
    assert float((found["auto"] - found["exact"]).norm() / found["exact"].norm()) < 0.01


def test_auto_falls_back_to_exact_within_the_step(clip, monkeypatch, capsys):
    clip.model.float()
    gains = {}
    for estimator in ("exact", "auto"):
        network, step, rows, validation = make(clip, scope="all", estimator=estimator, dtype=torch.float32)
        step.refresh(validation)
        if estimator == "auto":  # a step far too long for a first-order difference
            step.saflex._previous_rms = 1e-7
        _, gains[estimator] = gains_of(step, rows, monkeypatch)
    torch.testing.assert_close(gains["auto"], gains["exact"], rtol=1e-5, atol=0)  # with products of the training pass or not
    assert step.saflex.estimator_for(network.parameters_in("all")) == "exact"
    assert "exact from now on" in capsys.readouterr().out


def test_a_bank_mixes_old_and_new_features_under_the_current_text(clip):
    network, step, _, validation = make(clip, validation_loss="margin", average=0.0)
    slots = torch.tensor([0, 1, 2, 3, 4])
    step.refresh(validation)
    fresh = step.saflex.state_dict()["gradient"]
    step.refresh(replace(validation, slots_V=slots))
    for name, value in step.saflex.state_dict()["gradient"].items():
        torch.testing.assert_close(value, fresh[name], rtol=0, atol=1e-12)
    with torch.no_grad():
        old = network.tower.upper(validation.inputs)
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        new = network.tower.upper(validation.inputs)
    assert step.saflex.bank.next_slots(5, 2) == [0, 1]
    few = slice(0, 2)
    step.refresh(Validation(validation.inputs[few], validation.labels_V[few], validation.captions_V[few], slots[few]))
    assert step.saflex.bank.next_slots(5, 4) == [2, 3, 4, 0]
    mixed = torch.cat([new[:2], old[2:]])
    logits = network(mixed, step.task.tokens_ML[:3], from_pooled=True).logits()
    names = step.saflex.state_dict()["gradient"]
    parameters = [dict(network.named_parameters())[name] for name in names]
    expected = torch.autograd.grad(margin(logits, validation.labels_V), parameters)
    for value, other in zip(names.values(), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12)
