"""Models through open_clip: saved models load anywhere, mistakes are one line."""

import json

import open_clip
import pytest
import torch

from flyp_saflex.clip.model import load_clip, save_clip
from flyp_saflex.errors import ModelError


def test_a_saved_model_loads_in_open_clip_with_the_same_logits(tiny_clip_dir, tmp_path):
    clip = load_clip(f"local-dir:{tiny_clip_dir}")
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.mul_(1.01)
    save_clip(clip, tmp_path / "model")
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    tokens, images = clip.tokenizer(["a photo of a cat.", "a dog"]), torch.randn(2, 3, 32, 32)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")
    assert torch.equal(tokenizer(["a photo of a cat.", "a dog"]), tokens)
    with torch.no_grad():
        for ours, theirs in zip(clip.model(images, tokens), loaded.eval()(images, tokens), strict=True):
            assert torch.equal(ours, theirs)
    assert str(preprocess) == str(clip.preprocess)
    assert load_clip(f"local-dir:{tmp_path / 'model'}").config == clip.config


def test_random_weights_are_had_by_name_only():
    torch.manual_seed(1)
    one = load_clip("RN50", "random").model.logit_scale
    assert one.item() == pytest.approx(2.6593, abs=1e-4)
    with pytest.raises(ModelError, match=r"model\.pretrained = '': no such tag of RN50 .*'random' for untrained weights"):
        load_clip("RN50", "")


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B/16", "openai", "did you mean 'ViT-B-16'"),
        ("ViT-B-16", "opneai", "did you mean 'openai'"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "CoCa's captioning loss has no place in FLYP"),
        ("local-dir:nowhere/at/all", "", "the weights cannot be loaded"),
    ],
)
def test_models_that_cannot_be_had_are_named_in_one_line(name, pretrained, message):
    with pytest.raises(ModelError) as error:
        load_clip(name, pretrained)
    assert message in str(error.value)
    assert f"model.{'pretrained' if pretrained == 'opneai' else 'name'} = " in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_damaged_weights_are_an_error_not_random_ones(tiny_clip_dir):
    weights = tiny_clip_dir / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        load_clip(f"local-dir:{tiny_clip_dir}")
    weights.unlink()
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        load_clip(f"local-dir:{tiny_clip_dir}")


def test_quickgelu_of_openai_weights_is_kept_when_saved(tiny_clip_dir, tmp_path):
    path = tiny_clip_dir / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(config))
    clip = load_clip(f"local-dir:{tiny_clip_dir}")
    save_clip(clip, tmp_path / "model")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        again = load_clip(f"local-dir:{tmp_path / 'model'}").model.encode_image(images)
        assert torch.equal(again, clip.model.encode_image(images))
