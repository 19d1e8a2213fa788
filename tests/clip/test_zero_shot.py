"""The zero-shot head and prediction over batches."""

import pytest
import torch
from torch.nn.functional import normalize

from flyp_saflex.clip.model import load_clip
from flyp_saflex.clip.zero_shot import class_captions, zero_shot_head
from flyp_saflex.errors import DataError
from flyp_saflex.evaluation.predict import Head, autocast, clip_predictor, logits_over, predict


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


def test_logits_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(logits_over(features, Head(weight, scale=10)), torch.tensor([[10.0, 0, 10], [6, 8, 14]]))
    biased = logits_over(features, Head(weight, torch.tensor([0.5, 0.0, -1.0])))
    torch.testing.assert_close(biased, torch.tensor([[1.5, 0, 0], [1.1, 0.8, 0.4]]))


def test_predict_reads_every_batch_once_for_all_variants_and_bounds_what_it_holds():
    images = torch.arange(10.0).reshape(10, 1, 1, 1)
    reads, entered = [], []

    def batches():
        for start in range(0, 10, 3):
            reads.append(start)
            yield range(start, min(start + 3, 10)), images[start : start + 3]

    def variant(factor):
        def enter():
            entered.append(factor)
            return lambda batch: factor * batch.reshape(-1, 1)

        return enter

    positions, logits = predict([variant(1), variant(-2)], batches(), rows_at_once=5)
    assert positions.tolist() == list(range(10))
    assert torch.equal(logits[0].flatten(), torch.arange(10.0))
    assert torch.equal(logits[1].flatten(), -2 * torch.arange(10.0))
    assert reads == [0, 3, 6, 9], "decoded once"
    assert entered == [1, -2, 1, -2], "two collections: 6 images and 4"
    entered.clear()
    predict([variant(3)], batches())
    assert entered == [3], "one model stays in place"


def test_predict_without_images():
    positions, logits = predict([lambda: lambda batch: batch], [])
    assert len(positions) == 0
    assert logits[0].shape == (0, 0)


def test_precision_of_the_image_tower(clip):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    head = Head(zero_shot_head(clip, ["cat", "dog"], ["{}"]))
    exact = clip_predictor(clip.model, head)(images)
    low = clip_predictor(clip.model, head, precision="bf16")(images)
    assert exact.dtype == low.dtype == torch.float32
    assert not torch.equal(exact, low)
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0)  # bf16 has 8 bits, cosines are below 1
    with autocast(torch.device("cpu"), "fp16"):
        assert not torch.is_autocast_enabled("cpu")
