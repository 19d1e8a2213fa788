"""The zero-shot head is CLIP's recipe: mean over templates of normalised text embeddings."""

import pytest
import torch
from torch.nn.functional import normalize

from flyp_saflex.clip.model import load_clip
from flyp_saflex.clip.zero_shot import class_captions, zero_shot_head
from flyp_saflex.errors import DataError


@pytest.fixture
def clip(tiny_clip_dir):
    return load_clip(f"local-dir:{tiny_clip_dir}")


def test_head_is_clips_recipe_caption_by_caption(clip):
    names, templates = ["cat", "sea lion", "dog"], ["a photo of a {}.", "{} in the wild.", "{}"]
    rows = []
    for name in names:
        with torch.no_grad():
            each = [clip.model.encode_text(clip.tokenizer([t.format(name)]), normalize=True)[0] for t in templates]
        rows.append(normalize(torch.stack(each).mean(dim=0), dim=0))
    for batch_size in (1, 4, 256):
        torch.testing.assert_close(
            zero_shot_head(clip, names, templates, batch_size=batch_size), torch.stack(rows), rtol=1e-5, atol=1e-6
        )


def test_equal_captions_are_encoded_once_and_rows_have_length_one(clip):
    seen = []
    tokenizer = clip.tokenizer
    clip.tokenizer = lambda texts: (seen.extend(texts), tokenizer(texts))[1]
    head = zero_shot_head(clip, ["cat", "dog", "cat"], ["a {}", "a {}", "the {}"])
    assert sorted(seen) == ["a cat", "a dog", "the cat", "the dog"]
    assert torch.equal(head[0], head[2])
    torch.testing.assert_close(head.norm(dim=1), torch.ones(3))
    assert not head.requires_grad


def test_braces_in_a_class_name_are_kept():
    assert class_captions(["{x}"], ["a {}!"]) == [["a {x}!"]]


@pytest.mark.parametrize(
    ("names", "templates", "words"),
    [
        ([], ["{}"], "at least one class"),
        (["cat"], [], "at least one caption template"),
        (["cat"], ["a photo"], "'a photo' has no {}"),
    ],
)
def test_nothing_to_caption_is_an_error(names, templates, words):
    with pytest.raises(DataError, match=words):
        class_captions(names, templates)
