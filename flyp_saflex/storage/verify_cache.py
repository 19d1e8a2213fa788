"""Comparison of a cache entry's images with the sha256 values in its manifest."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from flyp_saflex.config import Config
from flyp_saflex.errors import DataError
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.files import hash_stream
from flyp_saflex.storage.manifest import MANIFEST, ROWS, WRITERS, ManifestReader
from flyp_saflex.user_text import quoted

TOGETHER = 1_000
"""Rows that are read at once, for entries too large for memory."""


def verify_cache(config: Config) -> int:
    """Compare every image of the recipe's cache entry with its manifest, print one line per difference.

    Returns:
        Number of images that are as the manifest says.

    Raises:
        DataError: no such entry, an invalid row, an image that differs or cannot be read, or no `sha256` at all.
    """
    folder = AugmentCache.open(config.cache.root, config.data.name, config.cache.key).folder
    same = wrong = without = 0
    for problem in problems(folder):
        same += problem == ""
        without += problem is None
        if problem:
            wrong += 1
            print(problem)
    if wrong:
        raise DataError(
            f"augment cache {folder}: {wrong} of {same + wrong + without} images are not as {MANIFEST} says (listed above), "
            "expected equal sha256 values: copy the entry again, or remove these rows and make the edits anew"
        )
    if without and not same:
        raise DataError(
            f"augment cache {folder}: no row of {MANIFEST} has a sha256 to compare with; make the edits with generate"
        )
    print(
        f"augment cache {folder}: {same} images have the sha256 of their row" + (f", {without} rows have none" if without else "")
    )
    return same


def problems(folder: Path) -> Iterator[str | None]:
    """Yield for every row of an entry the difference between its image and its `sha256`.

    The empty string stands for an equal image, None for a row without `sha256`.

    Raises:
        DataError: an invalid row.
    """
    reader = ManifestReader(folder)
    files = (*sorted(folder.glob(f"{WRITERS}/*/{ROWS}")), folder / MANIFEST)
    rows = ((f"{path} line {number}", row) for path in files for number, row in reader.rows(path))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while part := list(islice(rows, TOGETHER)):
            yield from pool.map(lambda numbered: _problem(reader, *numbered), part)


def _problem(reader: ManifestReader, where: str, row: Mapping[str, Any]) -> str | None:
    # Labels may be class names, whose list this check needs not know.
    path = reader.edit({**row, "label": 0}, where).path
    expected = row.get("sha256")
    if expected is None:
        return None
    try:
        found = _sha256(path)
    except (OSError, ValueError) as error:
        return f"{where}: {path} cannot be read: {getattr(error, 'strerror', None) or error}"
    return "" if found == expected else f"{where}: {path} has sha256 {found}, the row says {quoted(str(expected))}"


def _sha256(path: Path) -> str:
    """Return the hash of a regular file.

    Raises:
        OSError: it cannot be read, or is a device, pipe or folder, which might never end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        return hash_stream(file, hashlib.sha256())
