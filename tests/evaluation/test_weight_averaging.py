"""WiSE-FT: exact ends, the line in between, buffers, and a model that stands anywhere on it."""

from pathlib import Path

import pytest
import torch

from flyp_saflex.clip.model import load_clip
from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.config import Config
from flyp_saflex.errors import ModelError
from flyp_saflex.evaluation.predict import predict
from flyp_saflex.evaluation.weight_averaging import WeightAverage, interpolate, set_weights
from flyp_saflex.records import Dataset
from flyp_saflex.tasks import clip_task
from flyp_saflex.tasks.clip_network import ClipNetwork
from flyp_saflex.tasks.clip_task import ClipTask, LinearClipTask

CLASSES, TEMPLATES = ("cat", "dog", "bird"), ("a photo of a {}.", "{}")


def states():
    pre = {"w": torch.tensor([1.0, -0.0, float("inf")]), "n": torch.tensor(3), "flag": torch.tensor([True])}
    fine = {"w": torch.tensor([3.0, 2.0, 1.0]), "n": torch.tensor(9), "flag": torch.tensor([False])}
    return pre, fine


def test_the_middle_by_hand():
    pre, fine = states()
    state = interpolate(pre, fine, 0.25)
    assert state["w"].tolist() == [1.5, 0.5, float("inf")]
    assert state["w"].dtype == torch.float32


def test_integer_and_boolean_buffers_are_the_finetuned_ones():
    state = interpolate(*states(), 0.1)
    assert (state["n"].item(), state["flag"].item()) == (9, False)


def test_ends_are_exact_to_the_last_bit_and_copies():
    pre, fine = states()
    for alpha, end in ((0, pre), (1, fine), (0.0, pre), (1.0, fine)):
        state = interpolate(pre, fine, alpha)
        for name, tensor in end.items():
            assert torch.equal(state[name], tensor)
            assert torch.signbit(state[name]).tolist() == torch.signbit(tensor).tolist()
            assert state[name].data_ptr() != tensor.data_ptr()


def test_half_precision_is_interpolated_in_float32():
    state = interpolate({"w": torch.tensor([1.0], dtype=torch.float16)}, {"w": torch.tensor([1.001], dtype=torch.float16)}, 0.5)
    assert state["w"].dtype == torch.float32
    assert state["w"].item() == pytest.approx((1.0 + float(torch.tensor(1.001).half())) / 2, abs=1e-7)


@pytest.mark.parametrize(
    ("fine", "words"),
    [
        ({"w": torch.ones(2), "extra": torch.ones(1)}, "only the finetuned one has 'extra'"),
        ({}, "only the pretrained one has 'w'"),
        ({"w": torch.ones(3)}, r"'w' is \(2,\) in the pretrained and \(3,\)"),
    ],
)
def test_different_architectures_are_an_error(fine, words):
    with pytest.raises(ModelError, match=words):
        interpolate({"w": torch.ones(2)}, fine, 0.5)


def test_alpha_outside_is_an_error():
    with pytest.raises(ModelError, match=r"alpha is 1.5"):
        interpolate({"w": torch.ones(2)}, {"w": torch.ones(2)}, 1.5)


def test_set_weights_is_interpolate_in_place():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    pre = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    fine = {name: torch.randn_like(t) if t.is_floating_point() else t + 5 for name, t in model.state_dict().items()}
    weight = model[0].weight
    set_weights(model, pre, fine, 0.3)
    expected = interpolate(pre, fine, 0.3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model[0].weight is weight
    assert model[1].num_batches_tracked.item() == 5


def dataset():
    return Dataset(name="made up", root=Path(), class_names=CLASSES, splits={}, templates=TEMPLATES)


def finetuned_clip(folder):
    """A model and a perturbed copy of it that stands for the finetuned one."""
    start = load_clip(f"local-dir:{folder}")
    clip = load_clip(f"local-dir:{folder}")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return start, clip


def start_of(clip):
    return {f"clip.{name}": tensor for name, tensor in clip.model.state_dict().items()}


def test_an_average_gives_the_logits_of_a_model_that_holds_the_weights(tiny_clip_dir):
    start, clip = finetuned_clip(tiny_clip_dir)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    pre = start.model.state_dict()
    fine = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    average = WeightAverage(ClipTask(clip, ClipNetwork(clip.model), dataset(), Config()), start_of(start))
    alphas = (0.0, 0.5, 1.0)
    _, logits = predict(
        [average.variant(alpha) for alpha in alphas], [([0, 1], images[:2]), ([2, 3, 4], images[2:])], rows_at_once=2
    )
    for alpha, found in zip(alphas, logits, strict=True):
        model = load_clip(f"local-dir:{tiny_clip_dir}")
        model.model.load_state_dict(interpolate(pre, fine, alpha))
        with torch.no_grad():
            features = model.model.encode_image(images, normalize=True)
            head = zero_shot_head(model, CLASSES, TEMPLATES)
            expected = model.model.logit_scale.exp() * features @ head.T
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2), "the ends must differ for this to test anything"


def test_the_zero_shot_head_of_an_alpha_is_made_once(tiny_clip_dir, monkeypatch):
    start, clip = finetuned_clip(tiny_clip_dir)
    made = []
    monkeypatch.setattr(clip_task, "zero_shot_head", lambda *args: (made.append(1), zero_shot_head(*args))[1])
    average = WeightAverage(ClipTask(clip, ClipNetwork(clip.model), dataset(), Config()), start_of(start))
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    batches = [([place], images[place : place + 1]) for place in range(6)]
    predict([average.variant(alpha) for alpha in (0.0, 0.5, 1.0)], batches, rows_at_once=2)
    assert len(made) == 3, "one for every alpha, whatever the number of collections"


def test_linear_head_is_interpolated_from_its_start(tiny_clip_dir):
    start, clip = finetuned_clip(tiny_clip_dir)
    generator = torch.Generator().manual_seed(3)
    head = {
        name: torch.randn(3, 32, generator=generator) if name.endswith("weight") else torch.randn(3, generator=generator)
        for name in ("weight", "bias", "initial_weight", "initial_bias")
    }
    images = torch.rand(4, 3, 32, 32, generator=generator)
    fine = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    linear = torch.nn.Linear(32, 3)
    linear.load_state_dict({name: head[name] for name in ("weight", "bias")})
    task = LinearClipTask(clip, ClipNetwork(clip.model, head=linear), dataset(), Config())
    began = {f"head.{name}": head[f"initial_{name}"] for name in ("weight", "bias")}
    average = WeightAverage(task, start_of(start) | began)
    (found,) = predict([average.variant(0.25)], [(range(4), images)])[1]
    start.model.load_state_dict(interpolate(start.model.state_dict(), fine, 0.25))
    with torch.no_grad():
        features = start.model.encode_image(images, normalize=True)
    weight = 0.75 * head["initial_weight"] + 0.25 * head["weight"]
    expected = features @ weight.T + 0.75 * head["initial_bias"] + 0.25 * head["bias"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_another_architecture_is_refused_before_any_image(tiny_clip_dir):
    start, clip = finetuned_clip(tiny_clip_dir)
    other = {name: tensor for name, tensor in start_of(start).items() if name != "clip.logit_scale"}
    with pytest.raises(ModelError, match=r"only the finetuned one has 'clip\.logit_scale'"):
        WeightAverage(ClipTask(clip, ClipNetwork(clip.model), dataset(), Config()), other)
