"""Errors that the user can correct: one line each, with its own type.

The message of a `UserError` names the option or file, the value found, the value expected and the fix. The command line
prints it without a traceback and exits with code 2; library code catches it by type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_NAME = 200
"""Characters of a name that is compared with known names."""


class UserError(Exception):
    """Mistake in the user's input: printed as one line, exit code 2."""


class ConfigError(UserError):
    """Invalid recipe, option or combination of options."""


class DataError(UserError):
    """Invalid image, table, dataset folder or cache; the message names file, row and column where known."""


class ModelError(UserError):
    """Model, pretrained tag or weights that cannot be loaded."""


class RunError(UserError):
    """Unusable run folder, or a run that had to stop; the message says where its state was saved."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name; the empty string if none is close."""
    if len(name) > LONGEST_NAME:  # the comparison takes time that grows with the square
        return ""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
