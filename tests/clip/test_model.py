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


@pytest.fixture
def own_tokenizer_dir(tmp_path):
    """A model with a Hugging Face tokenizer of its own, as SigLIP and multilingual CLIPs have."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "<s>", "</s>", "a", "photo", "of", "cat", "dog", "."]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    folder = tmp_path / "own_tokenizer"
    folder.mkdir()
    text = {"context_length": 12, "vocab_size": len(words), "hf_tokenizer_name": "somebody/siglip", "width": 32, "heads": 2}
    text |= {"layers": 2, "no_causal_mask": True, "pool_type": "last", "tokenizer_kwargs": {"clean": "canonicalize"}}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
    config = {"embed_dim": 32, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"size": 32, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_model_has_its_own_tokenizer_with_it(own_tokenizer_dir, tmp_path):
    clip = load_clip(f"local-dir:{own_tokenizer_dir}", "random")
    save_clip(clip, tmp_path / "first")
    again = load_clip(f"local-dir:{tmp_path / 'first'}")
    save_clip(again, tmp_path / "second")  # saved models are models to start from
    texts = ["a photo of a cat.", "a dog", "A CAT, of a photo"]
    expected = clip.tokenizer(texts)
    for folder in ("first", "second"):
        assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / folder}")(texts), expected)
    assert torch.equal(again.model.encode_text(expected), clip.model.encode_text(expected))
