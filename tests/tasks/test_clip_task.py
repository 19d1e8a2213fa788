"""The trained module: text read no further than needed, what is frozen, BatchNorm, the scopes of SAFLEX."""

import open_clip
import pytest
import timm
import torch

from flyp_saflex.clip.model import load_clip
from flyp_saflex.clip.text_tower import encode_text
from flyp_saflex.saflex.jvp import forward_mode
from flyp_saflex.tasks import clip_task as module
from flyp_saflex.tasks.clip_task import Learner

TEXTS = ["a photo of a cat.", "a dog", "a rather longer caption of two horses", ""]
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.fixture
def clip(tiny_clip_dir):
    return load_clip(f"local-dir:{tiny_clip_dir}")


def test_outputs_are_those_of_open_clip(clip):
    images, tokens = torch.randn(3, 3, 32, 32), clip.tokenizer(TEXTS)
    with torch.no_grad():
        out = Learner(clip.model)(images, tokens)
        image, text, scale = clip.model(images, tokens)
        torch.testing.assert_close(out.logits(), scale * image @ text.T, rtol=0, atol=1e-5)
        again = Learner(clip.model)(out.pooled_NF, tokens, from_pooled=True)
        assert torch.equal(again.logits(), out.logits())
        chosen = out.logits(columns_C=torch.tensor([1, 1, 0]))
        torch.testing.assert_close(chosen, out.logits()[:, [1, 1, 0]], rtol=0, atol=1e-6)


def trained(learner):
    return {name for name, parameter in learner.named_parameters() if parameter.requires_grad}


def test_freezing(clip):
    learner = Learner(clip.model, num_frozen=1)
    everything = {name for name, _ in learner.named_parameters()}
    learner.freeze()
    locked = ("visual.conv1", "visual.class_emb", "visual.positional", "visual.ln_pre", "visual.transformer.resblocks.0.")
    assert everything - trained(learner) == {name for name in everything if name.startswith(tuple(f"clip.{p}" for p in locked))}
    learner.freeze(text=True)
    assert all(name.startswith("clip.visual.") or name == "clip.logit_scale" for name in trained(learner))
    learner.freeze(image=True, token_embedding=True)
    assert not any(name.startswith("clip.visual.") for name in trained(learner))
    assert "clip.token_embedding.weight" not in trained(learner)
    assert "clip.text_projection" in trained(learner)


def test_frozen_texts_are_encoded_once(clip, monkeypatch):
    images, tokens = torch.randn(3, 3, 32, 32), clip.tokenizer(TEXTS)
    learner = Learner(clip.model)
    expected = learner(images, tokens)
    calls = []
    monkeypatch.setattr(module, "encode_text", lambda *args: calls.append(1) or encode_text(*args))
    learner.freeze(text=True)
    for chosen in ([0, 1, 2, 3], [3, 1], [1, 1]):
        out = learner(images, tokens[chosen])
        torch.testing.assert_close(out.columns_CD, expected.columns_CD.detach()[chosen], rtol=0, atol=1e-6)
        assert not out.columns_CD.requires_grad
        assert out.logits().requires_grad
    assert len(calls) == 4
    learner.freeze()
    assert learner(images, tokens).columns_CD.requires_grad
    assert len(calls) == 5
    with torch.no_grad():
        clip.model.text_projection.mul_(-1)
    learner.freeze(text=True)
    torch.testing.assert_close(learner(images, tokens).columns_CD, -expected.columns_CD.detach(), rtol=0, atol=1e-6)


def test_freezing_with_a_linear_head(clip):
    learner = Learner(clip.model, head=torch.nn.Linear(32, 3))
    learner.freeze()
    assert {"head.weight", "head.bias", "clip.visual.proj"} <= trained(learner)
    assert all(name.startswith(("head.", "clip.visual.")) for name in trained(learner)), "nothing unused is trained"
    learner.freeze(only_head=True)
    assert trained(learner) == {"head.weight", "head.bias"}
    learner.freeze()  # the second phase of LP-FT
    assert "clip.visual.proj" in trained(learner)


@pytest.mark.parametrize("freeze", [True, False])
def test_batchnorm_statistics(freeze):
    torch.manual_seed(0)
    learner = Learner(open_clip.CLIP(embed_dim=32, vision_cfg=RESNET, text_cfg=TEXT), num_frozen=1)
    learner.freeze()
    learner.set_mode(training=True, freeze_batchnorm=freeze)
    before = {name: value.clone() for name, value in learner.named_buffers() if "running" in name}
    images = torch.randn(4, 3, 32, 32)
    learner.tower(learner.tower.lower(images))
    after = dict(learner.named_buffers())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    lower = ("clip.visual.bn", "clip.visual.layer1.")
    assert moved == (set() if freeze else {name for name in before if not name.startswith(lower)})
    assert learner.training
    learner.set_mode(training=False, freeze_batchnorm=freeze)
    assert not any(module.training for module in learner.modules())


def test_head_scope_is_projection_text_tower_and_scale(clip):
    learner = Learner(clip.model)
    learner.freeze(token_embedding=True)
    head = set(learner.parameters_in("head"))
    assert {"clip.visual.proj", "clip.logit_scale", "clip.text_projection", "clip.positional_embedding"} <= head
    assert {name for name in head if name.startswith("clip.visual.")} == {"clip.visual.proj"}
    assert "clip.token_embedding.weight" not in head
    assert set(learner.parameters_in("all")) == trained(learner)


def test_a_training_pass_without_dropout_and_batch_statistics_is_an_evaluation_pass(clip):
    learner = Learner(clip.model)
    learner.set_mode(training=True, freeze_batchnorm=True)
    assert learner.acts_as_evaluated()
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenizer(TEXTS)
    # With gradient: without it, attention in evaluation mode has a kernel of its own, which rounds otherwise.
    assert torch.equal(learner(images, tokens).images_ND, learner.eval()(images, tokens).images_ND)


@pytest.mark.parametrize("part", ["attention", "dropout", "drop path", "patches"])
def test_a_part_that_drops_at_random_makes_it_another_function(clip, part):
    learner = Learner(clip.model)
    block = clip.model.visual.transformer.resblocks[0]
    if part == "attention":
        block.attn.dropout = 0.1
    elif part == "patches":
        clip.model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    else:
        block.ls_1 = torch.nn.Dropout(0.1) if part == "dropout" else timm.layers.DropPath(0.1)
    assert not learner.train().acts_as_evaluated()
    assert learner.eval().acts_as_evaluated()


def test_batch_statistics_make_it_another_function():
    model = open_clip.CLIP(embed_dim=32, vision_cfg=RESNET, text_cfg=TEXT)
    learner = Learner(model)
    for frozen in (True, False):
        learner.set_mode(training=True, freeze_batchnorm=frozen)
        assert learner.acts_as_evaluated() == frozen


def test_frozen_texts_have_the_same_bits_whoever_asks_first(clip):
    """A resumed run may meet a text in another place than the run that went on: in a derivative, or without gradient."""
    found = []
    for first in ("training", "derivative", "evaluation"):
        learner = Learner(clip.model)
        learner.freeze(text=True)
        learner.train(first == "training")
        images, tokens = torch.ones(2, 3, 32, 32), clip.tokenizer(TEXTS)
        with forward_mode() if first == "derivative" else torch.set_grad_enabled(first == "training"):
            found.append(learner(images, tokens).columns_CD)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
