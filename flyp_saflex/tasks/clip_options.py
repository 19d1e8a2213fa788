"""Options of `[train]` that only CLIP has: a task without its towers says that they have no effect."""

from __future__ import annotations

from flyp_saflex.config import TrainConfig

CLIP_ONLY = (
    "proxies",
    "freeze_text",
    "freeze_image",
    "freeze_image_blocks",
    "freeze_token_embedding",
    "frozen_cache",
    "gradient_checkpointing",
    "adapter",
)


def notes_without_clip(options: TrainConfig) -> list[str]:
    """Return a note on the set options that only a CLIP follows; nothing if none is set."""
    usual = TrainConfig()
    unused = [f"train.{name}" for name in CLIP_ONLY if getattr(options, name) != getattr(usual, name)]
    return [f"{', '.join(unused)} has no effect with train.method={options.method}: only CLIP has it"] if unused else []
