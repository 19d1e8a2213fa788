"""Types and actions of command-line arguments: alphas, shards, folders, versions."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from pathlib import Path

from flyp_saflex import __version__
from flyp_saflex.errors import UserError

VERSIONS = {"torch": "torch", "open_clip": "open_clip_torch", "diffusers": "diffusers"}
"""Libraries that `--version` tells the versions of, with the names of their packages."""


def parse_alphas(text: str) -> tuple[float, ...]:
    """Parse comma-separated alphas such as `0,0.5,1`.

    Raises:
        UserError: an entry is not a number in 0..1.
    """
    try:
        alphas = tuple(float(part) for part in text.split(","))
    except ValueError:
        alphas = (-1.0,)
    if any(not 0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"--wise-alphas {text}: expected numbers from 0 to 1 with commas between, for example 0,0.25,0.5,0.75,1")
    return alphas


def parse_shard(text: str) -> tuple[int, int]:
    """Parse a shard `i/n` into (index, count), with 0 <= i < n.

    Raises:
        UserError: the text has another form, or i is not below n.
    """
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise UserError(f"--shard {text}: expected i/n with i from 0 to n - 1, for example 0/4, 1/4, 2/4 and 3/4 for four jobs")


class Folder:
    """Type of arguments that name a folder: an empty text, as an unset shell variable gives, is refused."""

    def __init__(self, argument: str) -> None:
        self.argument = argument

    def __call__(self, text: str) -> Path:
        """Return the folder.

        Raises:
            UserError: the text is empty.
        """
        if not text.strip():
            raise UserError(f"{self.argument} '{text}': found an empty name, expected a folder: name one, for example runs/first")
        return Path(text)


class VersionAction(argparse.Action):
    """Flag that prints the versions of this package and of its main libraries, none of which it imports, and stops."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print one line and exit."""
        found = [f"{name} {_version(package)}" for name, package in VERSIONS.items()]
        print(f"flyp-saflex {__version__} (Python {platform.python_version()}, {', '.join(found)})")
        parser.exit()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
