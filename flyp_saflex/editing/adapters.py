"""LoRA adapters of an editor: their files on this machine, identity and loading into a pipeline."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flyp_saflex.editing.pipeline_files import HUB_ID, quiet, reason
from flyp_saflex.errors import ConfigError, ModelError
from flyp_saflex.extras import require
from flyp_saflex.storage.files import hash_stream

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An entry of `editor.lora`.

    Attributes:
        where: file, folder or hub id, as given.
        scale: factor of its updates.
    """

    where: str
    scale: float

    @classmethod
    def of(cls, text: str) -> Adapter:
        """Return the adapter of a text `WHERE` or `WHERE:SCALE`.

        Raises:
            ConfigError: the scale is no number, or 0.
        """
        where, colon, tail = text.rpartition(":")
        if not colon or Path(text).expanduser().exists():
            return cls(text, 1.0)
        try:
            scale = float(tail)
        except ValueError:
            scale = math.nan
        if not where or not math.isfinite(scale) or not scale:
            raise ConfigError(
                f"editor.lora: '{text}' has the scale '{tail}', expected a number other than 0, as in turbo.safetensors:0.8"
            )
        return cls(where, scale)


def named(text: str) -> str:
    """Return an entry of `editor.lora` without the path of this machine."""
    adapter = Adapter.of(text)
    path = Path(adapter.where).expanduser()
    return f"{path.resolve().name if path.exists() else adapter.where}:{adapter.scale:g}"


def add_adapters(pipeline: Any, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Load adapters into a pipeline and switch them on.

    Args:
        pipeline: diffusers' pipeline.
        texts: entries of `editor.lora`.

    Returns:
        Per adapter `name` (of file or hub id, never a path), `scale` and `sha256` of the file.

    Raises:
        ConfigError: a scale is no number, or peft is not installed.
        ModelError: a file cannot be found or read, or does not fit the pipeline.
    """
    adapters, identity = [Adapter.of(text) for text in texts], []
    if not adapters:
        return []
    require("editor.lora", "peft")
    kind = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(f"editor.lora: {kind} takes no LoRA adapters: remove the option, or use another editor.model")
    for number, adapter in enumerate(adapters):
        file, name = _locate(adapter.where)
        unfit = f"editor.lora: {adapter.where} does not fit {kind}"
        try:
            with quiet():
                pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"lora{number}")
        except Exception as error:  # diffusers, peft and safetensors raise a dozen types here
            raise ModelError(f"{unfit} ({reason(error)[:200]}): take an adapter that was made for this model") from error
        if not any(f"lora{number}" in found for found in pipeline.get_list_adapters().values()):
            raise ModelError(f"{unfit} (no weight of it belongs to a part): take an adapter that was made for this model")
        with open(file, "rb") as stream:
            identity.append({"name": name, "scale": adapter.scale, "sha256": hash_stream(stream, hashlib.sha256())})
    with quiet():
        pipeline.set_adapters([f"lora{number}" for number in range(len(adapters))], [adapter.scale for adapter in adapters])
    return identity


def _locate(where: str) -> tuple[Path, str]:
    """Return the file of an adapter, fetched if need be, and its name."""
    path = Path(where).expanduser()
    if path.is_file():
        if path.suffix != SUFFIX:
            raise ModelError(f"editor.lora: {where} is no {SUFFIX} file, the only format that is read: convert it")
        return path, path.name
    if path.is_dir():
        file = _only([file.name for file in path.glob(f"*{SUFFIX}")], where)
        return path / file, f"{path.resolve().name}/{file}"
    parts = where.split("/")
    if not HUB_ID.fullmatch("/".join(parts[:2])):
        raise ModelError(f"editor.lora: {where}: there is no such file or folder, and it is no hub id; check the spelling")
    return _fetch("/".join(parts[:2]), "/".join(parts[2:]), where)


def _fetch(repository: str, file: str, where: str) -> tuple[Path, str]:
    """Fetch one file of a repository of the hub."""
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        file = file or _only([name for name in list_repo_files(repository) if name.endswith(SUFFIX)], where)
        return Path(hf_hub_download(repository, file)), f"{repository}/{file}"
    except ModelError:
        raise
    except Exception as error:  # the hub's client raises a dozen types
        raise ModelError(
            f"editor.lora: {where} is neither a file or folder here nor to be had from the hub ({reason(error)}); check the "
            "spelling, or without a network give a file that was fetched elsewhere"
        ) from error


def _only(files: list[str], where: str) -> str:
    if len(files) == 1:
        return files[0]
    found = f"{len(files)}: {', '.join(sorted(files)[:3])}{' ...' if len(files) > 3 else ''}" if files else "none"
    raise ModelError(f"editor.lora: {where} should hold one {SUFFIX} file, found {found}; name the file itself")
