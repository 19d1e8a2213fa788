"""Blocks that leave out what nobody reads equal open_clip's own: 1e-12 in float64, values, gradients and tangents.

Only the order of sums differs, so what is left is rounding: about 1e-15 here, and 1e-13 in sums over many terms.
"""

from copy import deepcopy
from functools import partial

import open_clip
import pytest
import torch
from torch.func import functional_call

from flyp_saflex.clip.blocks import is_plain_block, run_block, run_block_for_first
from flyp_saflex.clip.image_tower import ImageTower
from flyp_saflex.saflex.jvp import directional_derivative

WAYS = {"whole": (run_block, slice(None)), "first": (run_block_for_first, slice(0, 1))}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 512, "width": 32, "heads": 2, "layers": 2}


def make_block(**vision):
    torch.manual_seed(0)
    block = open_clip.CLIP(embed_dim=32, vision_cfg=VIT | vision, text_cfg=TEXT).visual.transformer.resblocks[-1]
    with torch.no_grad():
        for parameter in block.parameters():  # biases start at zero, norms at one: nothing would tell them apart
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block.double()


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.3}], ids=["plain", "layer scale"])
@pytest.mark.parametrize("way", WAYS)
def test_value_and_every_gradient(way, vision):
    run, tokens = WAYS[way]
    block, hidden = make_block(**vision), torch.randn(5, 7, 64, dtype=torch.float64, requires_grad=True)
    found, expected = run(block, hidden), block(hidden)[:, tokens]
    assert found.shape == expected.shape
    close(found, expected)
    weight = torch.randn_like(expected)
    inputs = [hidden, *block.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        assert theirs.abs().max() > 1e-3
        close(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_tangent(way):
    run, tokens = WAYS[way]
    block, hidden = make_block(), torch.randn(5, 7, 64, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in block.named_parameters()}
    direction = {name: torch.randn_like(value) for name, value in parameters.items()}

    class Ours(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, hidden):
            return run(self.block, hidden)

    def ours(values):
        return functional_call(Ours(), {f"block.{name}": value for name, value in values.items()}, (hidden,))

    def theirs(values):
        return functional_call(block, values, (hidden,))[:, tokens]

    found, expected = (directional_derivative(fn, parameters, direction) for fn in (ours, theirs))
    close(found[0], expected[0])
    close(found[1], expected[1], atol=1e-11)  # sums of products of two random numbers, up to 1e3 in size
    assert expected[1].abs().max() > 1


@pytest.mark.parametrize("way", WAYS)
def test_autocast_is_as_far_from_float32_as_the_block_itself(way):
    run, tokens = WAYS[way]
    block, hidden = make_block().float(), torch.randn(5, 7, 64)
    with torch.no_grad():
        exact = block(hidden)[:, tokens]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = run(block, hidden), block(hidden)[:, tokens]
    assert found.dtype == expected.dtype
    assert not torch.equal(found.float(), exact)
    assert (found - exact).abs().mean() < 1.5 * (expected - exact).abs().mean()


def test_only_the_usual_block_is_known():
    assert is_plain_block(make_block())
    other = open_clip.CLIP(embed_dim=32, vision_cfg=VIT | {"qk_norm": True}, text_cfg=TEXT).visual.transformer.resblocks[0]
    assert type(other).__name__ == "CustomResidualAttentionBlock"
    assert not is_plain_block(other)
    assert not is_plain_block(torch.nn.Linear(2, 2))
    heard = make_block()
    heard.attn.register_forward_hook(lambda *_: None)
    assert not is_plain_block(heard), "a hook on the attention would not be called"
    dropping = make_block()
    dropping.attn.dropout = 0.1
    assert not is_plain_block(dropping)


def image_tower(**vision):
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=32, vision_cfg=VIT | vision, text_cfg=TEXT).visual.double()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "vision",
    [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True}, {"qk_norm": True}, {"patch_dropout": 0.5}],
    ids=["token", "average", "norm after pooling", "other blocks", "patch dropout"],
)
def test_gradients_of_the_whole_tower(vision, checkpointing):
    visual = image_tower(**vision).train()
    tower = ImageTower(visual)
    tower.checkpointing = checkpointing
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for run in (tower, visual):
        torch.manual_seed(1)  # of the dropped patches
        features = run(images)
        gradients.append([features, *torch.autograd.grad(features.square().sum(), list(visual.parameters()))])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_one_token_leaves_the_last_block_also_where_it_is_frozen():
    visual, images = image_tower(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    lengths = {cut: ImageTower(visual, cut).lower(images).shape[1:] for cut in (1, 2, 3)}
    assert lengths == {1: (17, 64), 2: (17, 64), 3: (1, 64)}
    assert [ImageTower(visual, cut).lower_gives_one_token for cut in (0, 2, 3)] == [False, False, True]
    average = image_tower(pool_type="avg")
    assert not ImageTower(average, 3).lower_gives_one_token
    assert ImageTower(average, 3).lower(images).shape == (3, 17, 64)


def test_compiled_tower_equals_the_tower():
    visual, images = image_tower(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tower = ImageTower(deepcopy(visual))
    # the eager backend: what is checked is that the whole tower is traced without a break, not a compiler of C++
    compiled = torch.compile(partial(ImageTower.upper, tower), backend="eager", fullgraph=True)
    close(compiled(images), tower.upper(images))
