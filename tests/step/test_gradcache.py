"""A step of two passes has the loss and every gradient of a step of one, and sends no more rows through than it says."""

from copy import deepcopy
from dataclasses import replace

import open_clip
import pytest
import torch
from clip_steps import apart, make_step, make_task
from torch import nn

from flyp_saflex.clip.model import load_clip
from flyp_saflex.saflex.primal_cache import Products
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step import gradcache
from flyp_saflex.step.gradcache import obstacle
from flyp_saflex.step.skip_dropped import BREAK_EVEN, ON_BELOW, Selecting, chosen_rows
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.tasks.task import Processes

CAPTIONS = ["a photo of a cat.", "a photo of a dog.", "a photo of an owl.", "two cats asleep on one chair", "an owl"]
TRAIN, AUGMENTED = 4, 6
# The last caption is that of an augmented row only, which is dropped in some tests: its column must stay.
ROWS = [0, 1, 1, 3, 0, 1, 2, 2, 0, 4]
LABELS = [0, 1, 1, 0, 0, 1, 2, 2, 0, 2]
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


class Counted:
    """A network that notes how many rows (none with pooled features) and texts each of its passes with gradient had."""

    def __init__(self, network):
        self.network, self.passes = network, []

    def __call__(self, inputs, tokens, from_pooled=False):
        if torch.is_grad_enabled():
            self.passes.append((0 if from_pooled else len(inputs), len(tokens)))
        return self.network(inputs, tokens, from_pooled=from_pooled)


@pytest.fixture(scope="module")
def build(_tiny_clip):
    """`build("vit", dtype)`: a model of the test's own, and the captions' tokens; read from disk once."""
    clip = load_clip(f"local-dir:{_tiny_clip}")
    torch.manual_seed(0)
    models = {"vit": clip.model, "resnet": open_clip.CLIP(**RESNET)}
    return lambda tower, dtype: replace(clip, model=deepcopy(models[tower]).to(dtype))


def make(
    build,
    *,
    tower="vit",
    scope="head",
    head=False,
    saflex=True,
    mixed=False,
    dtype=torch.float64,
    proxies="captions",
    logit_bias=None,
    refresh=True,
    **options,
):
    torch.manual_seed(0)
    task = make_task(build(tower, dtype), CAPTIONS, num_frozen=1, head=head, proxies=proxies, logit_bias=logit_bias)
    network = task.network
    network.set_mode(training=True, freeze_batchnorm=True)
    counted = Counted(network)
    if saflex is True:
        saflex = Saflex(scope=scope, agreement="ignore", validation_loss="ce", estimator="exact")
    step = make_step(task, counted, saflex=saflex or None, **options)
    images = torch.randn(TRAIN + AUGMENTED, 3, 32, 32, dtype=dtype)
    with torch.no_grad():
        inputs = network.lower(images)
        seen = network.lower(torch.randn(5, 3, 32, 32, dtype=dtype))
    rows = Rows(inputs, torch.tensor(ROWS), torch.tensor(LABELS), torch.arange(len(ROWS)), TRAIN)
    if mixed:
        everyone = torch.arange(len(ROWS))
        everyone[TRAIN:] = torch.tensor([5, 6, 7, 8, 9, 4])
        rows.partners_N, rows.partner_labels_N = rows.captions_N[everyone], rows.labels_N[everyone]
        rows.share_N = torch.cat([torch.ones(TRAIN), torch.full((AUGMENTED,), 0.7)])
    labels = torch.tensor([0, 1, 2, 0, 1])
    if step.saflex is not None and refresh:
        step.refresh(Validation(seen, labels, labels))
    counted.passes.clear()
    return network, step, rows


def train_on(network, step, rows, backward=lambda value: value.backward()):
    """Return the step's result and every gradient, as a trainer takes them."""
    result = step(rows, generator=torch.Generator().manual_seed(3))
    for surrogate in result.surrogates:
        backward(surrogate())
    return result, {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


def assert_same_step(one, other, tolerance=1e-12):
    (result, gradients), (expected, wanted) = one, other
    torch.testing.assert_close(result.loss, expected.loss, rtol=0, atol=tolerance)
    torch.testing.assert_close(result.weights_A, expected.weights_A, rtol=0, atol=1e-6)
    for name in ("gains_A", "top_labels_AJ", "top_shares_AJ"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert max(float(value.abs().max()) for value in wanted.values()) > 1e-3


METHODS = {
    "captions": {},
    "captions, all": {"scope": "all"},
    "batch": {"proxies": "batch"},
    "batch, all": {"proxies": "batch", "scope": "all"},
    "resnet": {"tower": "resnet"},
    "resnet, all, batch": {"tower": "resnet", "scope": "all", "proxies": "batch"},
    "sigmoid": {"logit_bias": -3.0},
    "sigmoid, all, batch": {"logit_bias": -3.0, "proxies": "batch", "scope": "all"},
    "sigmoid, lowest-loss": {"logit_bias": -3.0, "saflex": False, "upstream_filter": "lowest-loss"},
    "ce-text": {"contrastive": False},
    "ce-linear": {"contrastive": False, "head": True, "scope": "all"},
    "mixed": {"mixed": True},
    "mixed, ce-text": {"mixed": True, "contrastive": False, "scope": "all"},
    "argmax": {"saflex": False, "upstream_filter": "argmax"},
    "argmax, batch": {"saflex": False, "upstream_filter": "argmax", "proxies": "batch"},
    "argmax, resnet": {"saflex": False, "upstream_filter": "argmax", "tower": "resnet"},
    "lowest-loss": {"saflex": False, "upstream_filter": "lowest-loss"},
    "lowest-loss, linear": {"saflex": False, "upstream_filter": "lowest-loss", "contrastive": False, "head": True},
    "random": {"saflex": False, "upstream_filter": "random"},
    "random and saflex": {"upstream_filter": "random", "proxies": "batch"},
}


@pytest.mark.parametrize("name", METHODS)
def test_two_passes_equal_one(build, name):
    """Float64, with parts that divide the batch and parts that do not, and parts that split the texts, too."""
    network, step, rows = make(build, **METHODS[name])
    whole = train_on(network, step, rows)
    kept = int((whole[0].weights_A > 0).sum())
    assert 0 < kept < AUGMENTED, "there must be something to drop, and something to keep"
    assert not whole[0].selected

    network, step, rows = make(build, **METHODS[name], selecting=Selecting("always"))
    selected = train_on(network, step, rows)
    assert_same_step(selected, whole)
    assert selected[0].selected
    passes = step.forward.passes
    assert [count for count, _ in passes if count] == [TRAIN + kept]
    assert sum(bool(texts) for _, texts in passes) == 1, "texts are read once"

    for few in (1, 3):
        network, step, rows = make(build, **METHODS[name], rows_at_once=few)
        in_parts = train_on(network, step, rows)
        assert_same_step(in_parts, whole)
        assert in_parts[0].selected
        assert not in_parts[0].loss.requires_grad
        sizes = [count for count, _ in step.forward.passes]
        assert max(sizes) <= few
        assert sum(sizes) - TRAIN - kept in range(few + 1)  # the first pass may have texts only, and then has a spare row
        texts = [count for _, count in step.forward.passes]
        assert max(texts) <= gradcache.TEXTS_PER_ROW * few
        assert (sum(texts) == 0) == bool(METHODS[name].get("head"))


FROZEN = {
    "text": {"text": True},
    "image": {"image": True},
    "tokens": {"token_embedding": True},
    "all but the head": {"only_head": True},
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("few", [1, 3])
def test_frozen_towers_are_left_alone(build, name, few):
    options = {"contrastive": False, "head": True} if name == "all but the head" else {}
    found = []
    for rows_at_once in (0, few):
        network, step, rows = make(build, saflex=False, rows_at_once=rows_at_once, **options)
        network.freeze(**FROZEN[name])
        found.append(train_on(network, step, rows))
    assert_same_step(found[1], found[0])
    if name == "image":
        assert max(count for count, _ in step.forward.passes) == 1, "frozen images have no backward pass"


def test_selecting_saves_nothing_where_images_are_frozen(build):
    network, step, rows = make(build, saflex=False, upstream_filter="argmax", selecting=Selecting("always"))
    network.freeze(image=True)
    assert not train_on(network, step, rows)[0].selected


@pytest.mark.parametrize("weights", [[0.0] * 6, [1.0] * 6], ids=["none kept", "all kept"])
@pytest.mark.parametrize("options", [{"selecting": Selecting("always")}, {"rows_at_once": 2}], ids=["select", "parts"])
@pytest.mark.parametrize("num_train", [0, TRAIN])
def test_extremes(build, monkeypatch, weights, options, num_train):
    """Nothing kept, everything kept; with and without training rows. All weights zero: the loss is zero, and so are gradients."""
    found = []
    for given in ({}, options):
        network, step, rows = make(build, **given)
        rows.num_train = num_train
        solve = step.saflex.solve
        drawn = torch.tensor((weights * 2)[: len(ROWS) - num_train])
        monkeypatch.setattr(step.saflex, "solve", lambda *a, solve=solve, drawn=drawn, **k: (drawn, solve(*a, **k)[1]))
        found.append(train_on(network, step, rows))
    if num_train or weights[0]:
        assert_same_step(found[1], found[0])
    else:
        for result, gradients in found:
            assert result.loss == 0
            assert all(not value.any() for value in gradients.values())


@pytest.mark.parametrize("proxies", ["captions", "batch"])
@pytest.mark.parametrize("few", [1, 2])
def test_validation_gradient_in_parts_equals_the_whole(build, proxies, few):
    """The contrastive loss of the validation rows, all parameters; and SAFLEX sees the network as it was."""
    gradients = []
    for rows_at_once in (0, few):
        network, step, _ = make(
            build, saflex=Saflex(scope="all", validation_loss="train"), rows_at_once=rows_at_once, proxies=proxies, refresh=False
        )
        torch.manual_seed(1)
        with torch.no_grad():
            seen = network.lower(torch.randn(5, 3, 32, 32, dtype=torch.float64))
        step.refresh(Validation(seen, torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 1, 4, 0, 1])))
        gradients.append(step.saflex.state_dict()["gradient"])
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(module.training for module in network.modules())
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=0, atol=1e-12)


def test_float32_and_gradient_checkpointing(build):
    """To 1e-6 of the largest gradient: sums over the rows are taken in another order."""
    found = []
    for rows_at_once, checkpointing in ((0, False), (3, False), (3, True)):
        network, step, rows = make(build, dtype=torch.float32, scope="all", rows_at_once=rows_at_once)
        if checkpointing:
            network.recompute()
        found.append(train_on(network, step, rows))
    tolerance = 1e-6 * max(float(value.abs().max()) for value in found[0][1].values())
    assert_same_step(found[1], found[0], tolerance)
    assert_same_step(found[2], found[1], tolerance)


@pytest.mark.parametrize("options", [{"selecting": Selecting("always")}, {"rows_at_once": 3}], ids=["select", "parts"])
def test_autocast_and_a_gradient_scaler(build, options):
    """bf16 keeps 8 bits, and kernels round differently for other batch sizes: a few per cent of the largest gradient."""
    found = []
    for given in ({}, options):
        network, step, rows = make(build, dtype=torch.float32, saflex=False, upstream_filter="argmax", **given)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = step(rows)
        for surrogate in result.surrogates:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = surrogate()
            scaler.scale(value).backward()
        found.append({name: p.grad / 1024 for name, p in network.named_parameters() if p.requires_grad})
    largest = max(float(value.abs().max()) for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0.03 * largest)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("scope", ["head", "all"])
def test_compiled_towers_take_their_parts(build, scope):
    """Compiled blocks of both towers, in parts with SAFLEX. Another order of operations: float32 to 1e-5."""
    found = []
    for compiled in (False, True):
        network, step, rows = make(build, dtype=torch.float32, rows_at_once=3, scope=scope)
        if compiled:
            for block in [*network.clip.visual.transformer.resblocks, *network.clip.transformer.resblocks]:
                block.compile(backend="aot_eager")
        found.append(train_on(network, step, rows))
    assert_same_step(found[1], found[0], tolerance=1e-5)


def test_the_derivative_takes_the_texts_that_were_read(build, monkeypatch):
    network, step, rows = make(build, selecting=Selecting("always"))
    apart(step, network)  # not a wrapper of which nothing is known
    left, jvp = [], Products.jvp

    def spy(self, *arguments):
        left.append(sum(map(len, self._kept.values())))
        found = jvp(self, *arguments)
        assert not any(self._kept.values()), "and all of it was used"
        return found

    monkeypatch.setattr(Products, "jvp", spy)
    assert train_on(network, step, rows)[0].selected
    assert len(left) == 1
    assert left[0] > 0


def test_dropped_columns_stay(build, monkeypatch):
    """The caption of a dropped row, which no other row has, is a column of the loss all the same."""
    network, step, rows = make(build, selecting=Selecting("always"))
    solve, weights = step.saflex.solve, torch.tensor([1.0, 1, 1, 1, 1, 0])
    monkeypatch.setattr(step.saflex, "solve", lambda *a, **k: (weights, solve(*a, **k)[1]))
    result, _ = train_on(network, step, rows)
    assert step.forward.passes == [(0, 5), (TRAIN + 5, 0)], "five rows are kept, and all five captions are read"
    without = Rows(rows.inputs[:-1], rows.captions_N[:-1], rows.labels_N[:-1], rows.ids_N[:-1], TRAIN)
    monkeypatch.setattr(step.saflex, "solve", lambda *a, **k: (weights[:-1], solve(*a, **k)[1]))
    assert (step(without).loss - result.loss).abs() > 1e-4


def test_the_verdict_follows_the_kept_part_and_is_saved():
    selecting = Selecting("auto", decay=0.5)
    assert not selecting.on, "nothing is known yet"
    verdicts = []
    for kept in (10, 4, 4, 7, 7, 7, 7, 6, 6, 4):
        selecting.update(torch.arange(10) < kept)
        other = Selecting("auto", decay=0.5)
        other.load_state_dict(selecting.state_dict())
        assert (other.kept, other.on) == (selecting.kept, selecting.on)
        verdicts.append((round(selecting.kept, 2), selecting.on))
    # 1, .7, .55: on; .62 is above where it starts, .66 below where it stops, .68 above that; down to .63 it stays off
    assert [on for _, on in verdicts] == [False, False, True, True, True, False, False, False, False, True], verdicts
    assert ON_BELOW < verdicts[4][0] < BREAK_EVEN
    selecting.update(torch.ones(0))
    assert selecting.on, "a part without augmented rows says nothing"
    selecting.reset()
    assert (selecting.kept, selecting.on) == (None, False)


@pytest.mark.parametrize("mode", ["always", "never"])
def test_the_other_modes_look_at_nothing(mode):
    selecting = Selecting(mode)
    selecting.update(torch.zeros(4))
    assert (selecting.on, selecting.kept) == (mode == "always", None)


def test_every_process_gives_as_many_rows():
    """Two processes of four rows: one keeps three, the other one, and fills up with the first rows that it drops."""
    weights = torch.tensor([1.0, 0, 2, 1, 0, 0, 3, 0])
    first, everywhere = chosen_rows(weights, 4, rank=0)
    second, same = chosen_rows(weights, 4, rank=1)
    assert (first.tolist(), second.tolist()) == ([0, 2, 3], [0, 1, 2])
    assert everywhere.tolist() == same.tolist() == [0, 2, 3, 4, 5, 6]
    nothing, _ = chosen_rows(torch.zeros(8), 4, rank=1)
    assert nothing.tolist() == [0], "a forward pass needs a row"


@pytest.mark.parametrize("options", [{"selecting": Selecting("always")}, {"rows_at_once": 2}], ids=["select", "parts"])
def test_a_second_process_with_the_same_rows_doubles_the_batch(build, options):
    """Gathering stood in for by doubling: the twin's rows come after this process's, and their gradient is its own."""

    def doubled(features):
        return torch.cat([features + (features - features.detach()), features.detach()])

    found = []
    for given in ({}, options):
        processes = Processes(gather=lambda tensor: torch.cat([tensor, tensor]), gather_features=doubled)
        network, step, rows = make(build, processes=processes, **given)
        found.append(train_on(network, step, rows))
    assert_same_step(found[1], found[0])


class Dropping(nn.Module):
    """As timm's DropPath and open_clip's PatchDropout: a module that drops, with its rate under some name."""

    def __init__(self, **rates):
        super().__init__()
        self.__dict__ |= rates


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Dropout(0.1), "is random in training"),
        (Dropping(drop_prob=0.2), "is random in training"),
        (Dropping(prob=0.5), "is random in training"),
        (nn.MultiheadAttention(4, 1, dropout=0.1), "is random in training"),
        (nn.BatchNorm2d(3), "statistics of the whole batch: set train.freeze_batchnorm=true"),
        (nn.Dropout(0.0), ""),
        (Dropping(prob=0.0), ""),
        (nn.Identity(), ""),
    ],
)
def test_what_keeps_rows_from_being_taken_apart(build, module, reason):
    network, _, _ = make(build, saflex=False)
    assert obstacle(network, freeze_batchnorm=False) == ""
    network.clip.visual.extra = module
    found = obstacle(network, freeze_batchnorm=False)
    assert reason in found
    assert bool(reason) == bool(found)
    assert not found or found.startswith("clip.visual.extra ")
    if isinstance(module, nn.BatchNorm2d):
        assert obstacle(network, freeze_batchnorm=True) == ""
