"""Location and identity of a pipeline's weights: a folder, or a repository of the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flyp_saflex.errors import ConfigError, ModelError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.storage.files import hash_stream

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HASHED = {".safetensors", ".bin", ".json", ".txt", ".model"}
INDEX = "model_index.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A pipeline's folder on this machine, with its identity.

    Attributes:
        folder: folder that holds model_index.json.
        class_name: class of the pipeline, named in model_index.json.
        has_safety_checker: whether the pipeline has a safety checker.
        identity: `model` (hub id or name of the folder, never a path) and `revision` (commit, or digest of the files).
    """

    folder: Path
    class_name: str
    has_safety_checker: bool
    identity: dict[str, str]


def locate(settings: EditorConfig, loader: Any) -> Source:
    """Find the folder of the model; fetch it from the hub if it is not on this machine.

    Args:
        settings: options `model`, `revision` and `safety_checker`; a checker that is not used is not fetched.
        loader: diffusers' `DiffusionPipeline`.

    Raises:
        ModelError: no such folder, no pipeline in it, or neither a network nor an earlier download.
        ConfigError: a revision is set, but the model is a folder.
    """
    model, folder = settings.model, Path(settings.model).expanduser()
    if folder.is_dir():
        if settings.revision:
            raise ConfigError(
                f"editor.revision = {settings.revision}, but editor.model = {model} is a folder: remove the revision"
            )
        identity = {"model": folder.resolve().name, "revision": digest(folder)}
    elif HUB_ID.fullmatch(model):
        folder, commit = _fetch(settings, loader)
        identity = {"model": model, "revision": commit}
    else:
        raise ModelError(
            f"editor.model = {model}: there is no such folder, and it is no hub id of the form owner/name; check the spelling"
        )
    index = _read_index(folder, model)
    return Source(folder, index["_class_name"], _has_checker(index), identity)


def digest(folder: Path) -> str:
    """Return `sha256:` and 16 hexadecimal digits over names and contents of the weights and settings in a folder."""
    total = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in HASHED and file.is_file()):
        with open(file, "rb") as stream:
            content = hash_stream(stream, hashlib.sha256())
        total.update(f"{file.relative_to(folder).as_posix()}\n{content}\n".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def reason(error: BaseException) -> str:
    """Return the first line of a library's error; a missing network, reported as a missing file, is named."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
            return "the hub cannot be reached, and nothing is kept here from an earlier time"
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logs and warnings of diffusers and transformers; problems that matter are raised or returned."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _fetch(settings: EditorConfig, loader: Any) -> tuple[Path, str]:
    """Fetch the files of a hub repository that the pipeline needs; return (folder, commit)."""
    revision = settings.revision or None
    try:
        index = loader.load_config(settings.model, revision=revision)
        unused = {"safety_checker": None} if _has_checker(index) and not settings.safety_checker else {}
        folder = Path(loader.download(settings.model, revision=revision, **unused))
    except Exception as error:  # the hub's client raises a dozen types
        if _is_gated(error):
            raise ModelError(
                f"editor.model = {settings.model}: its weights are gated: accept their licence on the model's page at the hub, "
                "then log in with `hf auth login`, or use another editor.preset"
            ) from error
        raise ModelError(
            f"editor.model = {settings.model}{f' at revision {revision}' if revision else ''}: neither a folder here nor to be "
            f"had from the hub ({reason(error)}); check the spelling, or without a network set editor.model to a folder that "
            "was fetched elsewhere"
        ) from error
    return folder, folder.name  # snapshots/<commit>


def _is_gated(error: BaseException) -> bool:
    """Return whether the hub refused a model because its licence was not accepted."""
    cause: BaseException | None = error
    while cause is not None and type(cause).__name__ != "GatedRepoError":
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _read_index(folder: Path, model: str) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"editor.model = {model}: the folder has no {INDEX}, so it is no diffusers pipeline; give the folder that "
            "save_pretrained wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"editor.model = {model}: {INDEX} cannot be read ({reason(error)}); fetch the model again") from None
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str):
        raise ModelError(
            f"editor.model = {model}: {INDEX} names no class of diffusers ({name!r}), and code that comes with weights is not "
            "run; use another editor.model"
        )
    return dict(index)


def _has_checker(index: dict[str, Any]) -> bool:
    return bool((index.get("safety_checker") or [None])[0])
