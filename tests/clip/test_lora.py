"""LoRA on open_clip's towers: the formula, equal fast and slow paths, merged weights, towers without the layers."""

import open_clip
import pytest
import torch
from torch import nn

from flyp_saflex.clip.blocks import is_plain_block
from flyp_saflex.clip.image_tower import ImageTower
from flyp_saflex.clip.lora import LowRank, add_lora, is_adapter, plain_state
from flyp_saflex.clip.text_tower import encode_text
from flyp_saflex.errors import ModelError


@pytest.fixture
def model(tiny_clip_dir):
    return open_clip.create_model(f"local-dir:{tiny_clip_dir}").eval()


def adapt(model, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        number = add_lora({"image": model.visual, "text": model.transformer}, rank=2, alpha=4.0, **options)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.normal_(std=0.05)
    return number


def test_the_update_by_hand():
    layer = LowRank(torch.zeros(3, 2), rank=2, alpha=6.0)
    assert torch.equal(layer(torch.ones(3, 2)), torch.ones(3, 2)), "it starts at zero"
    layer.lora_B.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(layer(torch.ones(3, 2)), 1 + 3 * layer.lora_B @ layer.lora_A)
    assert LowRank(torch.zeros(3, 2), rank=8, alpha=6.0).lora_A.shape == (2, 2), "no rank above the matrix'"


def test_both_towers_equal_open_clips_own_passes_and_have_gradients_in_every_update(model):
    images, tokens = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), open_clip.tokenize(["a", "a b"], 16)
    before = model.encode_image(images)
    assert adapt(model) == 16, "four matrices in each of two layers of two towers"
    assert all(is_plain_block(block) for block in model.visual.transformer.resblocks), "the fast path is used"
    tower = ImageTower(model.visual, 1)
    found, texts = tower(tower.lower(images)), encode_text(model, tokens)
    torch.testing.assert_close(found, model.encode_image(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(texts, model.encode_text(tokens), rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3, "the update is at work"
    (found.square().sum() + texts.square().sum()).backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if is_adapter(name))


def test_the_merged_state_is_open_clips_and_gives_the_same_embeddings(model, tiny_clip_dir):
    names = list(model.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    adapt(model)
    plain = open_clip.create_model(f"local-dir:{tiny_clip_dir}").eval()
    merged = plain_state(model)
    assert set(merged) == set(names)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.encode_image(images), model.encode_image(images), rtol=1e-4, atol=1e-6)


def test_targets_choose_layers_and_frozen_ones_get_no_update(model):
    fixed = frozenset(id(parameter) for parameter in ImageTower(model.visual, 1).frozen_parameters())
    assert adapt(model, targets=("in_proj", "c_fc"), fixed=fixed) == 2 + 4
    assert {
        name.split(".parametrizations.")[0].rpartition(".")[2] for name, _ in model.named_parameters() if is_adapter(name)
    } == {
        "attn",
        "c_fc",
    }


def test_a_tower_without_such_layers_is_told_with_the_names_it_has(model):
    with pytest.raises(ModelError, match=r"the image tower .* found c_fc, c_proj, in_proj, out_proj; did you mean 'c_fc'"):
        adapt(model, targets=("c_fx",))
    with pytest.raises(ModelError, match=r"the image tower \(Conv2d\) has no such linear layer, found none at all"):
        add_lora({"image": nn.Conv2d(3, 3, 1)}, rank=2, alpha=1.0)
