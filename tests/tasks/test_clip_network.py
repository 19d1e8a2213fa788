"""CLIP as a trained module: open_clip's outputs, frozen parts, BatchNorm, the scopes of SAFLEX."""

import open_clip
import pytest
import timm
import torch

from flyp_saflex.clip.model import load_clip
from flyp_saflex.clip.text_tower import encode_text
from flyp_saflex.saflex.jvp import forward_mode
from flyp_saflex.tasks import clip_network as module
from flyp_saflex.tasks.clip_network import ClipNetwork

TEXTS = ["a photo of a cat.", "a dog", "a rather longer caption of two horses", ""]
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.fixture
def clip(tiny_clip_dir):
    return load_clip(f"local-dir:{tiny_clip_dir}")


def test_outputs_are_those_of_open_clip(clip):
    images, tokens = torch.randn(3, 3, 32, 32), clip.tokenizer(TEXTS)
    with torch.no_grad():
        out = ClipNetwork(clip.model)(images, tokens)
        image, text, scale = clip.model(images, tokens)
        torch.testing.assert_close(out.logits(), scale * image @ text.T, rtol=0, atol=1e-5)
        again = ClipNetwork(clip.model)(out.pooled_NF, tokens, from_pooled=True)
        assert torch.equal(again.logits(), out.logits())
        chosen = out.logits(columns_C=torch.tensor([1, 1, 0]))
        torch.testing.assert_close(chosen, out.logits()[:, [1, 1, 0]], rtol=0, atol=1e-6)


def trained(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_freezing(clip):
    network = ClipNetwork(clip.model, num_frozen=1)
    everything = {name for name, _ in network.named_parameters()}
    network.freeze()
    locked = ("visual.conv1", "visual.class_emb", "visual.positional", "visual.ln_pre", "visual.transformer.resblocks.0.")
    assert everything - trained(network) == {name for name in everything if name.startswith(tuple(f"clip.{p}" for p in locked))}
    network.freeze(text=True)
    assert all(name.startswith("clip.visual.") or name == "clip.logit_scale" for name in trained(network))
    network.freeze(image=True, token_embedding=True)
    assert not any(name.startswith("clip.visual.") for name in trained(network))
    assert "clip.token_embedding.weight" not in trained(network)
    assert "clip.text_projection" in trained(network)


@pytest.fixture
def biased(clip):
    """The model with SigLIP's bias."""
    clip.model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    return clip


def test_the_bias_is_in_the_logits_and_trained_only_where_the_loss_sees_it(biased):
    images, tokens = torch.randn(3, 3, 32, 32), biased.tokenizer(TEXTS)
    without, network = ClipNetwork(biased.model), ClipNetwork(biased.model, with_bias=True)
    with torch.no_grad():
        out, plain = network(images, tokens), without(images, tokens)
        image, text, scale, bias = biased.model(images, tokens)
        torch.testing.assert_close(out.logits(), scale * image @ text.T + bias, rtol=0, atol=1e-5)
    assert not plain.bias.any()
    assert torch.equal(out.scale * out.images_ND @ out.columns_CD.T, plain.logits()), "a softmax has the digits of before"
    for model, expected in ((without, False), (network, True)):
        model.freeze()
        assert ("clip.logit_bias" in trained(model)) == expected
        model.freeze(text=True)
        assert ("clip.logit_bias" in trained(model)) == expected, "it is no part of the text tower"
        assert not model.trains_texts()
        assert ("clip.logit_bias" in model.parameters_in("head")) == expected
        model.freeze(only_head=True)
        assert not trained(model)


def test_frozen_texts_are_encoded_once(clip, monkeypatch):
    images, tokens = torch.randn(3, 3, 32, 32), clip.tokenizer(TEXTS)
    network = ClipNetwork(clip.model)
    expected = network(images, tokens)
    calls = []
    monkeypatch.setattr(module, "encode_text", lambda *args: calls.append(1) or encode_text(*args))
    network.freeze(text=True)
    for chosen in ([0, 1, 2, 3], [3, 1], [1, 1]):
        out = network(images, tokens[chosen])
        torch.testing.assert_close(out.columns_CD, expected.columns_CD.detach()[chosen], rtol=0, atol=1e-6)
        assert not out.columns_CD.requires_grad
        assert out.logits().requires_grad
    assert len(calls) == 4
    network.freeze()
    assert network(images, tokens).columns_CD.requires_grad
    assert len(calls) == 5
    with torch.no_grad():
        clip.model.text_projection.mul_(-1)
    network.freeze(text=True)
    torch.testing.assert_close(network(images, tokens).columns_CD, -expected.columns_CD.detach(), rtol=0, atol=1e-6)


def test_freezing_with_a_linear_head(clip):
    network = ClipNetwork(clip.model, head=torch.nn.Linear(32, 3))
    network.freeze()
    assert {"head.weight", "head.bias", "clip.visual.proj"} <= trained(network)
    assert all(name.startswith(("head.", "clip.visual.")) for name in trained(network)), "nothing unused is trained"
    network.freeze(only_head=True)
    assert trained(network) == {"head.weight", "head.bias"}
    network.freeze()  # the second phase of LP-FT
    assert "clip.visual.proj" in trained(network)


@pytest.mark.parametrize("freeze", [True, False])
def test_batchnorm_statistics(freeze):
    torch.manual_seed(0)
    network = ClipNetwork(open_clip.CLIP(embed_dim=32, vision_cfg=RESNET, text_cfg=TEXT), num_frozen=1)
    network.freeze()
    network.set_mode(training=True, freeze_batchnorm=freeze)
    before = {name: value.clone() for name, value in network.named_buffers() if "running" in name}
    images = torch.randn(4, 3, 32, 32)
    network.tower(network.tower.lower(images))
    after = dict(network.named_buffers())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    lower = ("clip.visual.bn", "clip.visual.layer1.")
    assert moved == (set() if freeze else {name for name in before if not name.startswith(lower)})
    assert network.training
    network.set_mode(training=False, freeze_batchnorm=freeze)
    assert not any(part.training for part in network.modules())


def test_head_scope_is_projection_text_tower_and_scale(clip):
    network = ClipNetwork(clip.model)
    network.freeze(token_embedding=True)
    head = set(network.parameters_in("head"))
    assert {"clip.visual.proj", "clip.logit_scale", "clip.text_projection", "clip.positional_embedding"} <= head
    assert {name for name in head if name.startswith("clip.visual.")} == {"clip.visual.proj"}
    assert "clip.token_embedding.weight" not in head
    assert set(network.parameters_in("all")) == trained(network)


def test_a_training_pass_without_dropout_and_batch_statistics_is_an_evaluation_pass(clip):
    network = ClipNetwork(clip.model)
    network.set_mode(training=True, freeze_batchnorm=True)
    assert network.acts_as_evaluated()
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenizer(TEXTS)
    # With gradient: without it, attention in evaluation mode has a kernel of its own, which rounds otherwise.
    assert torch.equal(network(images, tokens).images_ND, network.eval()(images, tokens).images_ND)


@pytest.mark.parametrize("part", ["attention", "dropout", "drop path", "patches"])
def test_a_part_that_drops_at_random_makes_it_another_function(clip, part):
    network = ClipNetwork(clip.model)
    block = clip.model.visual.transformer.resblocks[0]
    if part == "attention":
        block.attn.dropout = 0.1
    elif part == "patches":
        clip.model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    else:
        block.ls_1 = torch.nn.Dropout(0.1) if part == "dropout" else timm.layers.DropPath(0.1)
    assert not network.train().acts_as_evaluated()
    assert network.eval().acts_as_evaluated()


def test_batch_statistics_make_it_another_function():
    model = open_clip.CLIP(embed_dim=32, vision_cfg=RESNET, text_cfg=TEXT)
    network = ClipNetwork(model)
    for frozen in (True, False):
        network.set_mode(training=True, freeze_batchnorm=frozen)
        assert network.acts_as_evaluated() == frozen


def test_frozen_texts_have_the_same_bits_whoever_asks_first(clip):
    """A resumed run may meet a text in another place than the run that went on: in a derivative, or without gradient."""
    found = []
    for first in ("training", "derivative", "evaluation"):
        network = ClipNetwork(clip.model)
        network.freeze(text=True)
        network.train(first == "training")
        images, tokens = torch.ones(2, 3, 32, 32), clip.tokenizer(TEXTS)
        with forward_mode() if first == "derivative" else torch.set_grad_enabled(first == "training"):
            found.append(network(images, tokens).columns_CD)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_frozen_texts_are_encoded_without_dropout(clip):
    """Text towers of Hugging Face have dropout: a cached draw of it would be trained against, and evaluated with."""
    tokens, images = clip.tokenizer(TEXTS), torch.zeros(1, 3, 32, 32)
    network = ClipNetwork(clip.model)
    network.freeze(text=True)
    expected = network.eval()(images, tokens).columns_CD
    for block in clip.model.transformer.resblocks:
        block.ls_1 = torch.nn.Dropout(0.5)
    network.freeze(text=True)
    found = network.train()(images, tokens).columns_CD
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert clip.model.transformer.resblocks[0].ls_1.training, "the mode is put back"
