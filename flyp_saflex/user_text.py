"""Text that users write: TOML files of any content, names of files, quotes in messages."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flyp_saflex.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LONGEST_QUOTE = 200
"""Characters of the user's input that a message quotes."""
DEEPEST = 16
"""Levels of tables and lists in a TOML file; recipes have three."""
LONGEST_NAME = 255
"""Bytes of a file name, the limit of the usual file systems."""


def quoted(text: str, limit: int = LONGEST_QUOTE) -> str:
    """Return a text for a message: one line, printable, at most `limit` characters and three dots."""
    short = text if len(text) <= limit else f"{text[:limit]}..."
    return short if short.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


def is_file_name(name: str) -> bool:
    """Return whether a text names a file in a folder and nothing outside of it."""
    plain = name not in ("", ".", "..") and name.isprintable() and not set(name) & set('/\\:*?"<>|')
    return plain and len(name.encode("utf-8", "surrogateescape")) <= LONGEST_NAME - 50  # temporary names are longer


def read_toml(path: Path, error: type[UserError], *, any_character: bool = False) -> dict[str, Any]:
    """Read a TOML file; a byte order mark is left out.

    Args:
        path: the file.
        error: type of the errors.
        any_character: whether texts may hold NUL, which no file name and no library takes.

    Raises:
        UserError: of the given type; the file cannot be read, is not UTF-8 or no TOML, or has values that no option takes.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as reason:
        why = getattr(reason, "strerror", None) or reason
        raise error(f"{quoted(str(path))} cannot be read: {why}; check the path and its permissions") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        kind = "UTF-16 text" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8 text"
        line = data[: reason.start].count(b"\n") + 1
        raise error(f"{path} is {kind} (line {line}), expected UTF-8; save it as UTF-8") from None
    return parse_toml(text, str(path), error, any_character=any_character)


def parse_toml(text: str, source: str, error: type[UserError], *, any_character: bool = False) -> dict[str, Any]:
    """Parse TOML and check that its values can be told and written.

    Args:
        text: the TOML.
        source: its origin, named in errors.
        error: type of the errors.
        any_character: whether texts may hold NUL.

    Raises:
        UserError: of the given type; no valid TOML, nested too deeply, a number beyond 64 bits, a NUL in a text.
    """
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise error(f"{source}: nested too deeply, expected at most {DEEPEST} levels; remove the inner brackets") from None
    except ValueError as reason:  # TOMLDecodeError, and integers of thousands of digits
        raise error(f"{source} is not valid TOML: {quoted(str(reason))}; mend the line") from None
    check_values(values, source, error, any_character=any_character)
    return values


def check_values(values: Mapping[str, Any], source: str, error: type[UserError], *, any_character: bool = False) -> None:
    """Check that nested values, as TOML has them, can be told and written.

    Raises:
        UserError: of the given type; nested too deeply, a number beyond 64 bits, a NUL or bytes that are not UTF-8 in a text.
    """
    rest: list[tuple[str, int, Any]] = [("", 0, values)]
    while rest:
        where, level, value = rest.pop()
        if level > DEEPEST:
            raise error(
                f"{source}: {quoted(where)} is nested too deeply, expected at most {DEEPEST} levels; remove the inner ones"
            )
        if isinstance(value, Mapping):
            rest += [(f"{where}.{name}" if where else name, level + 1, item) for name, item in value.items()]
            bad = next((name for name in value if not _is_text(name)), None)
        elif isinstance(value, list):
            rest += [(where, level + 1, item) for item in value]
            continue
        else:
            bad = value if isinstance(value, str) and not _is_text(value) else None
        if bad is not None and not any_character:
            odd = "a NUL character" if "\0" in bad else "bytes that are not UTF-8"
            raise error(f"{source}: {quoted(where or bad)} has {odd} ('{quoted(bad)}'), expected text; remove or rename it")
        if isinstance(value, int) and value.bit_length() > 63:
            raise error(
                f"{source}: {quoted(where)} is a number of {value.bit_length()} bits, expected at most 63; write a smaller one"
            )


def _is_text(text: str) -> bool:
    """Return whether a run folder's config.toml can hold the text: no NUL, and no surrogate that stands for another byte."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
