"""Embeddings of many images in parts on disk, so that an interrupted prediction goes on where it stopped.

    OUT.parts/plan.json            digest of the run's weights and of the images
    OUT.parts/<position>.npz       positions and embeddings of some images; positions and reasons of the unreadable ones

A part is written whole or not at all. Any process may write any part.

Shapes: N images, D embedding, P images of a part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flyp_saflex.errors import RunError
from flyp_saflex.storage.files import atomic_write, read_mapping, write_json

PLAN = "plan.json"


class Parts:
    """Folder of the parts of one prediction.

    Args:
        folder: created if missing.
        identity: what the embeddings depend on, by name, in words.

    Attributes:
        reasons: why images could not be read, by position.

    Raises:
        RunError: the folder holds parts of another prediction, or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self.reasons: dict[int, str] = {}
        self._done: dict[int, NDArray[np.float32]] = {}
        plan = dict(identity)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder} cannot be written: {error.strerror or error}; choose another --out") from None
        known = read_mapping(folder / PLAN)
        if known and known != plan:
            changed = ", ".join(name for name in plan if known.get(name) != plan[name]) or "another version"
            raise RunError(
                f"{folder} holds the beginning of another prediction (other {changed}): finish that one with its own command, "
                "choose another --out, or remove the folder"
            )
        if not known:
            write_json(folder / PLAN, plan)
        for path in sorted(folder.glob("*.npz")):
            self._read(path)

    @property
    def done(self) -> set[int]:
        """Positions of images that are embedded or known to be unreadable."""
        return self._done.keys() | self.reasons.keys()

    def write(self, positions_P: list[int], embeddings_PD: NDArray[np.float32], unreadable: Mapping[int, str]) -> None:
        """Write a part.

        Args:
            positions_P: of the images.
            embeddings_PD: of the same.
            unreadable: reasons by position.

        Raises:
            RunError: the disk is full or not writable.
        """
        first = min([*positions_P, *unreadable])
        path = self.folder / f"{first:09d}.npz"
        with atomic_write(path, "wb") as file:
            np.savez(
                file,
                positions=np.asarray(positions_P, dtype=np.int64),
                embeddings=np.asarray(embeddings_PD, dtype=np.float32),
                unreadable=np.frombuffer(json.dumps(list(unreadable.items())).encode(), dtype=np.uint8),
            )

    def gather(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Read every part, those of other processes too: positions [N] in order, embeddings [N, D]."""
        for path in sorted(self.folder.glob("*.npz")):
            self._read(path)
        positions = sorted(self._done)
        rows = [self._done[position] for position in positions]
        return np.asarray(positions, dtype=np.int64), np.stack(rows) if rows else np.empty((0, 0), dtype=np.float32)

    def remove(self) -> None:
        """Remove the folder, once the predictions are written."""
        shutil.rmtree(self.folder)

    def _read(self, path: Path) -> None:
        """Take in a part; a damaged one is left to be written again."""
        try:
            with np.load(path, allow_pickle=False) as part:
                positions, embeddings = part["positions"].tolist(), part["embeddings"]
                unreadable = json.loads(part["unreadable"].tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return
        self._done.update(zip(positions, embeddings, strict=True))
        self.reasons.update((int(position), str(reason)) for position, reason in unreadable)


def digest(parts: Iterable[str]) -> str:
    """Return a digest of texts in order."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
