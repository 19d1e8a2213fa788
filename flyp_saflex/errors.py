"""Errors that a user can act on (floor 0).

Every `UserError` is one line that says what is wrong, what was found, what was expected and how to mend it. The command
line prints it without a traceback and exits with code 2; a library user catches it by type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input: shown as one line, exit code 2."""


class ConfigError(UserError):
    """A recipe, an option or a combination of options is wrong."""


class DataError(UserError):
    """An image, a table or a dataset folder is wrong; names file, row and column where it can."""


class ModelError(UserError):
    """A model, its pretrained tag or its weights cannot be had."""


class RunError(UserError):
    """A run folder cannot be used, or a run had to stop; says where its state was saved."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name, or the empty string when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
