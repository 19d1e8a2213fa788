"""Image captioning models and chat models of transformers.

Both decode greedily, so the same input gives the same text. Missing or incomplete weights are an error of one line; no
weight is ever initialised at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from flyp_saflex.errors import ModelError

Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CAPTION_TOKENS = 40
SCENE_TOKENS = 80
SCENE = (
    "Describe the scene of this photograph in one sentence of at most 30 words: the place and its background, the light or the "
    "time of day, the weather, and the viewpoint of the camera. Do not name or describe the subject in the foreground."
)
"""Request to chat models; captions that name classes anyway are met by the rules for domains."""
CHAT_SIDE_PX = 768
"""Longer side to which images are brought down for chat models, whose number of tokens grows with the area."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
"""Sampling options in a model's generation file; greedy decoding ignores them with a warning, so they are removed."""
BY_HAND = "write the file of edit texts by hand (prompts/README.md says how)"


class Captioner:
    """An image captioning model (BLIP, BLIP-2, GIT), or a chat model that reads images (Qwen2.5-VL, SmolVLM, LLaVA).

    A chat model is asked for the scene, never for the class.

    Args:
        name: hub id or folder.
        revision: of the hub's repository; empty: the newest.
        precision: of the weights.

    Attributes:
        asked: request to a chat model; empty for a captioning model.

    Raises:
        ModelError: it cannot be loaded, or reads no images.
    """

    def __init__(self, name: str, revision: str = "", precision: Precision = "no") -> None:
        self.name, self.device, self.dtype = name, _device(), DTYPES[precision]
        self._where = f"prompts.captioner = '{name}'"
        fix = "; or give your own captions with prompts.captions"
        with _one_line(self._where, name, fix):
            self._processor: Any = AutoProcessor.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
            is_chat = bool(getattr(self._processor, "chat_template", None))
            if is_chat and not hasattr(self._processor, "image_processor"):
                raise ModelError(
                    f"{self._where} is a chat model that reads no images: take one that does (Qwen/Qwen2.5-VL-3B-Instruct), or a "
                    f"captioning model (BLIP, BLIP-2, GIT){fix}"
                )
            self._model = _load(AutoModelForImageTextToText, self._where, name, revision, self.dtype).to(self.device)
        self.asked = SCENE if is_chat else ""
        self.revision: str = getattr(self._model.config, "_commit_hash", None) or revision

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Caption images; a caption may be empty.

        Raises:
            ModelError: the device's memory is full, or the chat template refuses images.
        """
        with _one_line(self._where, self.name, "", memory="prompts.batch_size"), torch.inference_mode():
            inputs = self._chat(images) if self.asked else self._processor(images=list(images), return_tensors="pt")
            inputs = inputs.to(self.device, self.dtype)
            tokens = self._model.generate(**inputs, max_new_tokens=SCENE_TOKENS if self.asked else CAPTION_TOKENS)
            if self.asked:
                tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _chat(self, images: Sequence[Image.Image]) -> Any:
        """Return the model's inputs: one conversation per image, padded on the left."""
        self._processor.tokenizer.padding_side = "left"
        content = [{"type": "image"}, {"type": "text", "text": SCENE}]
        text = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        smaller = []
        for image in images:
            smaller.append([image.copy()])
            smaller[-1][0].thumbnail((CHAT_SIDE_PX, CHAT_SIDE_PX))
        return self._processor(text=[text] * len(smaller), images=smaller, padding=True, return_tensors="pt")


class ChatModel:
    """An instruction-tuned language model with a chat template; its weights are loaded with the first answer.

    Args:
        name: hub id or folder.
        revision: of the hub's repository; empty: the newest.
        precision: of the weights.

    Raises:
        ModelError: it cannot be loaded, or its tokenizer has no chat template.
    """

    def __init__(self, name: str, revision: str = "", precision: Precision = "no") -> None:
        self.name, self.device = name, _device()
        self._where = f"prompts.llm = '{name}'"
        with _one_line(self._where, name, f"; or {BY_HAND}"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
            if not getattr(self._tokenizer, "chat_template", None):
                raise ModelError(
                    f"{self._where} has no chat template, expected an instruction-tuned chat model: take its instruct version, "
                    f"or {BY_HAND}"
                )
            self._config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
        self._asked, self._dtype = revision, DTYPES[precision]
        self._model: Any = None
        self.revision: str = getattr(self._config, "_commit_hash", None) or revision

    def load(self) -> None:
        """Load the weights, unless they are loaded already.

        Raises:
            ModelError: the weights are missing or incomplete, or do not fit into memory.
        """
        if self._model is None:
            with _one_line(self._where, self.name, f"; or {BY_HAND}"):
                self._model = _load(AutoModelForCausalLM, self._where, self.name, self._asked, self._dtype).to(self.device)

    def answer(self, text: str, max_new_tokens: int) -> tuple[str, bool]:
        """Answer one message with at most `max_new_tokens` tokens.

        Returns:
            The answer, and whether the model ended it itself (False: it was cut off).

        Raises:
            ModelError: the message is too long for the model, its template refuses it, the weights cannot be loaded, or the
                device's memory is full.
        """
        self.load()
        with _one_line(self._where, self.name, f"; or {BY_HAND}", memory="prompts.num_captions"), torch.inference_mode():
            inputs = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            ).to(self.device)
            length = inputs["input_ids"].shape[1]
            most = min(self._tokenizer.model_max_length, getattr(self._config, "max_position_embeddings", 2**31))
            if length + max_new_tokens > most:
                raise ModelError(
                    f"{self._where} reads and writes at most {most} tokens, but the request has {length} and the answer may have "
                    f"{max_new_tokens}: lower prompts.num_captions or prompts.max_new_tokens, or take another model"
                )
            tokens = self._model.generate(**inputs, max_new_tokens=max_new_tokens)[0, length:]
        return self._tokenizer.decode(tokens, skip_special_tokens=True), self._ended(tokens)

    def _ended(self, tokens: torch.Tensor) -> bool:
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return len(tokens) > 0 and int(tokens[-1]) in ends


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(kind: Any, where: str, name: str, revision: str, dtype: torch.dtype) -> Any:
    """Load a model for greedy decoding; refuse incomplete weights."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is told below, in one line instead of a coloured table
    try:
        model, info = kind.from_pretrained(
            name,
            revision=revision or "main",
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,  # without it transformers asks on the terminal whether to run the model's code
        )
    finally:
        logging.set_verbosity(verbosity)
    wrong = sorted(info["missing_keys"]) + sorted(str(row[0]) for row in info["mismatched_keys"])
    if wrong:
        raise ModelError(
            f"{where}: {len(wrong)} of the model's tensors are not in its file of weights or have another size there (first: "
            f"{wrong[0]}); download it again, or take another model"
        )
    for key in SAMPLING:
        setattr(model.generation_config, key, None)
    model.generation_config.do_sample = False
    model.generation_config.num_beams = 1
    return model.eval()


@contextmanager
def _one_line(where: str, name: str, fix: str, memory: str = "") -> Iterator[None]:
    """Turn exceptions of the libraries about a model into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        lower = f"lower {memory}, " if memory else ""
        raise ModelError(
            f"{where} does not fit into the GPU's memory: {lower}set prompts.precision=bf16 or take a smaller model"
        ) from None
    except TemplateError as error:
        raise ModelError(f"{where}: its chat template refuses the request ({_first_line(error)}); take another{fix}") from None
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        expected = (
            "expected a folder with the model's configuration, tokenizer or processor, and weights: copy it again"
            if Path(name).is_dir()
            else f"expected a hub id whose weights are here or can be downloaded (hf download {name}), or a model's folder"
        )
        raise ModelError(f"{where} cannot be loaded or used ({_first_line(error)}); {expected}{fix}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:;")[:200] if lines else type(error).__name__
