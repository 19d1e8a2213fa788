"""Cut and whole image towers agree, whatever their architecture; a cut that is not there is refused."""

from copy import deepcopy

import open_clip
import pytest
import torch

from flyp_saflex.clip.image_tower import ImageTower, num_blocks
from flyp_saflex.clip.model import load_clip
from flyp_saflex.errors import ModelError

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TOWERS = {
    "ViT": ({"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}, 3),
    "ViT, average pooling": (
        {
            "image_size": 32,
            "patch_size": 8,
            "width": 64,
            "layers": 2,
            "head_width": 32,
            "pool_type": "avg",
            "final_ln_after_pool": True,
        },
        2,
    ),
    "ModifiedResNet": ({"image_size": 64, "layers": [1, 1, 2, 1], "width": 8, "head_width": 32}, 4),
    "EfficientNet": ({"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}, 5),
    "EfficientNet, classifier": (
        {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "", "image_size": 64},
        5,
    ),
    "ConvNeXt": ({"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64}, 4),
    "ConvNeXt, mlp": ({"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp", "image_size": 64}, 4),
    "timm ViT": ({"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}, 6),
}


@pytest.fixture(scope="module")
def towers():
    """Visual towers by name, built when asked for; BatchNorm has seen something, so that its statistics matter."""
    built = {}

    def get(name):
        if name not in built:
            torch.manual_seed(0)
            visual = open_clip.CLIP(embed_dim=32, vision_cfg=TOWERS[name][0], text_cfg=TEXT).visual
            visual.train()
            visual(torch.randn(4, 3, size_of(name), size_of(name)))
            built[name] = visual.eval()
        return built[name]

    return get


def size_of(name):
    return TOWERS[name][0]["image_size"]


@pytest.mark.parametrize("name", TOWERS)
def test_the_parts_are_the_tower(towers, name):
    """To the last bit where its own modules run, to 1e-12 in float64 where `clip/blocks.py` runs its blocks."""
    visual, blocks = deepcopy(towers(name)).double(), TOWERS[name][1]
    images = torch.randn(3, 3, size_of(name), size_of(name), dtype=torch.float64)
    assert num_blocks(visual) >= 2
    assert blocks == num_blocks(visual)
    atol = 1e-12 if name in ("ViT", "ViT, average pooling") else 0
    with torch.no_grad():
        expected = visual(images)
        for cut in range(blocks + 1):
            tower = ImageTower(visual, cut)
            hidden = tower.lower(images)
            torch.testing.assert_close(tower.project(tower.upper(hidden)), expected, rtol=0, atol=atol)
            torch.testing.assert_close(tower(hidden), expected, rtol=0, atol=atol)
            assert (hidden is images) == (cut == 0)


@pytest.mark.parametrize("name", TOWERS)
def test_frozen_parameters_are_those_of_the_lower_part(towers, name):
    """Exactly the frozen parameters have no say in the upper part, and the projection only in `project`."""
    visual, blocks = towers(name), TOWERS[name][1]
    for cut in (1, blocks):
        tower = ImageTower(visual, cut)
        hidden = tower.lower(torch.randn(2, 3, size_of(name), size_of(name))).detach()
        named = dict(visual.named_parameters())
        gradients = torch.autograd.grad(tower(hidden).sum(), list(named.values()), allow_unused=True)
        unused = {key for key, gradient in zip(named, gradients, strict=True) if gradient is None}
        frozen = {id(parameter) for parameter in tower.frozen_parameters()}
        assert unused == {key for key, parameter in named.items() if id(parameter) in frozen}
        pooled = tower.upper(hidden).detach()
        last = (
            torch.autograd.grad(tower.project(pooled).sum(), list(named.values()), allow_unused=True) if has_head(tower) else ()
        )
        used = {key for key, gradient in zip(named, last, strict=False) if gradient is not None}
        assert used == {
            key for key, parameter in named.items() if id(parameter) in {id(p) for p in tower.projection_parameters()}
        }


def has_head(tower):
    return bool(tower.projection_parameters())


def test_the_shared_efficientnet_is_cut_anywhere(shared_dir):
    if not (shared_dir / "models" / "mini_clip").is_dir():
        pytest.skip("mini_clip is not beside this checkout")
    clip = load_clip(f"local-dir:{shared_dir / 'models' / 'mini_clip'}")
    images = torch.randn(2, 3, clip.image_size_px, clip.image_size_px)
    with torch.no_grad():
        expected = clip.model.encode_image(images)
        for cut in range(num_blocks(clip.model.visual) + 1):
            tower = ImageTower(clip.model.visual, cut)
            assert torch.equal(tower(tower.lower(images)), expected)


def test_checkpointed_blocks_give_the_same_gradient(towers):
    tower = ImageTower(towers("ViT"))
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for tower.checkpointing in (False, True):
        gradients.append(torch.autograd.grad(tower(images).square().sum(), list(tower.visual.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_cut_that_is_not_there_is_refused(towers):
    with pytest.raises(ModelError, match=r"train\.freeze_image_blocks = 4: it has 3 blocks \(VisionTransformer\); use a smaller"):
        ImageTower(towers("ViT"), 4)


def test_an_unknown_tower_works_whole():
    visual = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    images = torch.randn(2, 3, 2, 2)
    tower = ImageTower(visual)
    assert torch.equal(tower(tower.lower(images)), visual(images))
    assert (tower.has_projection, num_blocks(visual), tower.projection_parameters()) == (False, 0, [])
    with pytest.raises(ModelError, match="this tower's structure is not known"):
        ImageTower(visual, 1)
