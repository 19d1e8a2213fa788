"""Checks that a model's configuration, which may come from strangers, starts no code of its folder or repository."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flyp_saflex.errors import ModelError
from flyp_saflex.extras import is_installed

TOKENIZER_OPTIONS: dict[str, tuple[type, ...]] = {
    "clean": (str,),
    "strip_sep_token": (bool,),
    "language": (str, type(None)),
    "additional_special_tokens": (list, type(None)),
    "reduction_mask": (str,),
    "use_fast": (bool,),
    "padding_side": (str,),
    "truncation_side": (str,),
    "add_bos_token": (bool,),
    "add_eos_token": (bool,),
}
"""Arguments of tokenisers that a configuration may set, with their types: they choose among ways to cut texts, and name no
file and no code."""


def check_config(config: Any, source: str) -> dict[str, Any]:
    """Return the `model_cfg` of an open_clip configuration that can start no code.

    Args:
        config: content of `open_clip_config.json`.
        source: its path or repository, named in errors.

    Raises:
        ModelError: not a configuration, or `text_cfg.tokenizer_kwargs` has an argument outside of `TOKENIZER_OPTIONS`.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("model_cfg"), Mapping):
        raise ModelError(
            f"{source}: there is no section model_cfg, expected open_clip's configuration of a model; replace the file"
        )
    model_cfg = dict(config["model_cfg"])
    for section in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg.get(section), Mapping):
            raise ModelError(
                f"{source}: model_cfg.{section} is {_quoted(model_cfg.get(section))}, expected a section; replace the file"
            )
    options = model_cfg["text_cfg"].get("tokenizer_kwargs")
    if options is None:
        return model_cfg
    where = f"{source}: model_cfg.text_cfg.tokenizer_kwargs"
    if not isinstance(options, Mapping):
        raise ModelError(f"{where} is {_quoted(options)}, expected a section; remove it")
    for name, value in options.items():
        if name not in TOKENIZER_OPTIONS:
            raise ModelError(
                f"{where}.{_quoted(name)[1:-1]} = {_quoted(value)}: refused, because it could run code or read files; expected "
                f"only {', '.join(TOKENIZER_OPTIONS)}: remove it if you trust the rest of the model"
            )
        if not isinstance(value, TOKENIZER_OPTIONS[name]) or not all(isinstance(item, str) for item in _items(value)):
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in TOKENIZER_OPTIONS[name])
            raise ModelError(f"{where}.{name} = {_quoted(value)}: expected {kinds}; correct or remove it")
    return model_cfg


@contextmanager
def no_remote_code() -> Iterator[None]:
    """Let transformers refuse a model that brings code, at once, instead of asking on the terminal whether to run it."""
    if not is_installed("transformers"):  # then there is none that could
        yield
        return
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _quoted(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
