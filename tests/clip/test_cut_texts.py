"""Captions that the context length cuts are told, no others."""

from __future__ import annotations

import open_clip
import pytest
import torch

from flyp_saflex.clip.cut_texts import cut_texts, note_on_cut_texts

HEAD = "a photograph taken in the late afternoon by a camera fixed to a tree beside a narrow path "


def simple(length: int):
    return open_clip.SimpleTokenizer(context_length=length)


class Padded:
    """A tokenizer as of Hugging Face: one token per letter, an end token if asked, padding with 0 or with the end token."""

    def __init__(self, length: int, *, end: bool, padding: int) -> None:
        self.length, self.end, self.padding = length, end, padding

    def __call__(self, texts: list[str], context_length: int | None = None) -> torch.Tensor:
        length = context_length or self.length
        rows = []
        for text in texts:
            tokens = [ord(letter) for letter in text][: length - self.end] + [1] * self.end
            rows.append(tokens + [self.padding] * (length - len(tokens)))
        return torch.tensor(rows)


def test_clip_captions_longer_than_the_context_are_found():
    tokenizer = simple(16)
    texts = ["a photo of a cat.", HEAD + "cat", HEAD + "dog", " ".join(["cat"] * 14), " ".join(["cat"] * 15)]
    tokens = tokenizer(texts)
    assert cut_texts(tokenizer, texts, tokens) == [1, 2, 4], "14 words, start and end fit into 16"
    note = note_on_cut_texts(tokenizer, texts, tokens)
    assert note.startswith("3 of 5 captions are longer than the model's 16 tokens")
    assert "1 of them begin like another one and are the same to the model" in note
    assert note_on_cut_texts(tokenizer, texts[:1], tokens[:1]) == ""
    assert cut_texts(tokenizer, [], tokens[:0]) == []


@pytest.mark.parametrize(("end", "padding"), [(True, 0), (False, 0), (True, 1)])
def test_other_tokenizers_are_asked_the_same_way(end: bool, padding: int):
    tokenizer = Padded(8, end=end, padding=padding)
    texts = ["abcdefghijk"[:length] for length in range(1, 12)] + ["aaaaaaaaaaaa", "aaaaaaaa"]
    fits = 8 - end
    expected = [position for position, text in enumerate(texts) if len(text) > fits]
    assert cut_texts(tokenizer, texts, tokenizer(texts)) == expected
