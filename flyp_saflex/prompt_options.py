"""Options of the command `prompts`: a recipe's `[prompts]` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flyp_saflex.ranges import Count


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Edit prompts from captions of the training images (command `prompts`; ALIA, arXiv 2305.16289)."""

    name: str = "auto"
    """Name of the prompt file: prompts/<data.name>.<name>.toml."""
    captioner: str = "Salesforce/blip-image-captioning-large"
    """Image captioning model of transformers (hub id or folder); unused if `captions` is given."""
    captioner_revision: str = ""
    """Revision of the hub's repository; empty: the newest."""
    captions: str = ""
    """CSV file of captions with the columns `path` and `caption`, or only `caption`; replaces the captioner."""
    num_captions: Count = 200
    """Training images to caption, drawn with `seed`, balanced over classes as far as possible."""
    llm: str = "Qwen/Qwen2.5-7B-Instruct"
    """Chat model of transformers (hub id or folder) that summarises the captions."""
    llm_revision: str = ""
    """Revision of the hub's repository; empty: the newest."""
    max_domains: Count = 8
    """Largest number of domain descriptions."""
    attempts: Count = 3
    """Largest number of requests: an answer with malformed lines or no lines is requested again, with the reasons."""
    max_new_tokens: Count = 512
    """Largest length of an answer of the language model, in tokens."""
    batch_size: Count = 16
    """Images per captioning batch."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of both models' weights."""
