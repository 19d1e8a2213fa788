"""Extras: packages that a part of the commands needs, and the line that says how to install them."""

from __future__ import annotations

from importlib.util import find_spec

from flyp_saflex.errors import ConfigError

EXTRA_OF = {
    "diffusers": "edits",
    "transformers": "edits",
    "peft": "edits",
    "imagehash": "edits",
    "bitsandbytes": "quantisation",
    "wilds": "wilds",
    "matplotlib": "report",
    "datasets": "hf",
    "tensorboard": "tracking",
    "cleanlab": "issues",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}
"""Package -> extra of this project that installs it."""


def require(purpose: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        purpose: what needs them, as the user knows it: a command, or an option with its value.
        packages: names in `EXTRA_OF`.

    Raises:
        ConfigError: names the missing ones and the extras that install them.
    """
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        raise ConfigError(_told(purpose, missing))


def explained(error: ModuleNotFoundError, purpose: str) -> ConfigError | None:
    """Return the line about a package of an extra that could not be imported; None for any other module.

    Args:
        error: of the import.
        purpose: what was done.
    """
    package = (error.name or "").partition(".")[0]
    return ConfigError(_told(purpose, [package])) if package in EXTRA_OF else None


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a module without a specification, or None in its place
        return False


def _told(purpose: str, missing: list[str]) -> str:
    extras = ",".join(sorted({EXTRA_OF[package] for package in missing}))
    verb = "is" if len(missing) == 1 else "are"
    return f"{purpose} needs {' and '.join(missing)}, which {verb} not installed; pip install 'flyp-saflex[{extras}]'"
