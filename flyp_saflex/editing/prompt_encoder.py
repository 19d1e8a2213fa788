"""Text embeddings of a diffusion pipeline, computed once per distinct text where the pipeline allows it."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from flyp_saflex.editing.pipeline_files import quiet

EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
REMEMBERED = 512  # texts; 120 MB for Stable Diffusion in float32


class Texts:
    """Text inputs of a pipeline: cached embeddings, or plain strings.

    Every text is encoded alone, so that its embedding does not depend on the other texts of its batch.

    Args:
        pipeline: diffusers' pipeline.
        negative: the negative prompt, or empty.
        accepted: names of the arguments that the pipeline's call takes.
        one_by_one: pass strings, and leave the encoding to the pipeline.
    """

    def __init__(self, pipeline: Any, negative: str, accepted: Collection[str], *, one_by_one: bool) -> None:
        self._pipeline, self._negative = pipeline, negative
        self._names = [name for name in EMBEDDINGS if name in accepted]
        self._found: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        with quiet():
            self._encodes = not one_by_one and self._encode("") is not None

    def arguments(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of the call for a batch: embeddings [B, ...] by name, or the texts themselves."""
        if self._encodes:
            parts = zip(*(self._embeddings(text) for text in texts), strict=True)
            return {name: torch.cat(rows) for name, rows in zip(self._names, parts, strict=True)}
        return {"prompt": list(texts)} | ({"negative_prompt": [self._negative] * len(texts)} if self._negative else {})

    def too_long(self, text: str) -> str | None:
        """Return an error line if every text encoder would truncate the text; None if it fits or is unknown.

        diffusers truncates without an error.
        """
        if not self._encodes or text in self._found:
            return None
        readers = [getattr(self._pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
        with quiet():
            lengths = [(len(reader(text).input_ids), reader.model_max_length) for reader in readers if reader is not None]
        if not lengths or any(length <= limit for length, limit in lengths):
            return None
        length, limit = max(lengths, key=lambda pair: pair[1])
        return f"the text '{text}' has {length} tokens, but the model's text encoder reads {limit}: shorten it"

    def _embeddings(self, text: str) -> tuple[Tensor, ...]:
        if text not in self._found:
            with quiet():
                found = self._encode(text)
            assert found is not None, "only asked where the pipeline gives embeddings"
            self._found[text] = found
            if len(self._found) > REMEMBERED:
                self._found.popitem(last=False)
        self._found.move_to_end(text)
        return self._found[text]

    @torch.no_grad()
    def _encode(self, text: str) -> tuple[Tensor, ...] | None:
        """Encode a text and the negative prompt; None for a pipeline whose embeddings are unlike Stable Diffusion's."""
        pipeline, negative = self._pipeline, self._negative
        if self._names[:2] != list(EMBEDDINGS[:2]):
            return None
        if not hasattr(pipeline, "encode_prompt"):  # InstructPix2Pix
            found: Any = tuple(self._states(part) for part in (text, negative))
        else:
            known = inspect.signature(pipeline.encode_prompt).parameters
            values = {
                "prompt": text,
                "prompt_2": None,
                "prompt_3": None,
                "negative_prompt": negative or None,  # Stable Diffusion XL has zeros for None
                "device": pipeline._execution_device,  # with offloading, not where the weights lie
                "num_images_per_prompt": 1,
                "do_classifier_free_guidance": True,
            }
            found = pipeline.encode_prompt(**{name: value for name, value in values.items() if name in known})
        fits = isinstance(found, tuple) and len(found) == len(self._names) and all(isinstance(part, Tensor) for part in found)
        return found if fits else None

    def _states(self, text: str) -> Tensor:
        encoder, tokenizer = self._pipeline.text_encoder, self._pipeline.tokenizer
        tokens = tokenizer(
            text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).to(self._pipeline._execution_device)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        states: Tensor = encoder(tokens.input_ids, attention_mask=mask)[0]
        return states
