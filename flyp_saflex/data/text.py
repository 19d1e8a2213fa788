"""Names and text files of datasets: one Unicode form, UTF-8 with or without a mark, short quotes in messages."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from flyp_saflex.errors import DataError
from flyp_saflex.user_text import quoted

SHOWN_CHARACTERS = 100


def nfc(name: str) -> str:
    """Return a name in Unicode's composed form: `o` with a combining mark and `ö` are then one name."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def nfc_all(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in Unicode's composed form, in their order."""
    return tuple(nfc(name) for name in names)


def shown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return a text for a message: one line, printable, at most `limit` characters."""
    return quoted(text, limit)


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the first names of a list and how many more there are."""
    return ", ".join(shown(name, 40) for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file; a byte order mark is left out.

    Raises:
        DataError: it cannot be read or is not UTF-8; the message names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(path, data[: error.start].count(b"\n") + 1, data[:2])) from None


def not_utf8(path: Path, line: int, start: bytes) -> str:
    """Return the message about a file that is not UTF-8.

    Args:
        path: the file.
        line: number of the first line that is not.
        start: the first two bytes of the file.
    """
    kind = "is UTF-16 text" if start in (b"\xff\xfe", b"\xfe\xff") else "is not UTF-8 text"
    return f"{path} {kind} (line {line}); save it as UTF-8"


def spelt(name: str) -> str:
    """Return a file name as valid text: bytes that are no UTF-8 spelt out in hexadecimal."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()
