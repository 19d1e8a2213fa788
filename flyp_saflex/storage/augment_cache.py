"""Cache of augmented images on disk: manifest, image files, filter scores.

Layout of an entry, `<root>/<dataset>/<key>/`, readable by Hugging Face's `imagefolder`:

    metadata.jsonl    one row per image: file_name, aug_id, dataset, source_id, label, instruction, provenance
    images/**         the images
    scores.jsonl      one row per image, keyed by aug_id: scores of the filters, which delete no image
    DONE              written last

An image is written before its row, so the image of every row is complete; images without a row are ignored.
While several processes write an entry (`augment_cache_writer.py`), each keeps its newest rows in `.writers/<i>-of-<n>/`; they
are read as rows of the manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import msgspec

from flyp_saflex.errors import DataError, RunError, nearest
from flyp_saflex.records import Dataset, Edit
from flyp_saflex.storage.augment_cache_files import refuse_links
from flyp_saflex.storage.edits import Edits, edits_of_training_images, read_edits, select_edits
from flyp_saflex.storage.files import atomic_write, mend_tail
from flyp_saflex.storage.manifest import MANIFEST, ManifestReader
from flyp_saflex.user_text import quoted

SCORES = "scores.jsonl"
SHEETS = "sheets"
DONE = "DONE"
SPLIT_WORDS = re.compile(
    r"(?i)(?:^|[-._ 0-9/])(train|training|val|valid|validation|dev|test|testing|eval|evaluation)(?:$|[-._ 0-9/])"
)
"""Words in a path that Hugging Face's `imagefolder` takes for split names; it then ignores the manifest."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


class SavableImage(Protocol):
    """Protocol of a Pillow image to be written; Pillow itself is not imported."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Write the image to a path or an open file."""


class AugmentCache:
    """Cache entry: the edits of one dataset; made by `open`, `at` or `create`.

    Attributes:
        folder: folder of the entry.
        dataset: name of the dataset of the source images.
    """

    def __init__(self, folder: Path, dataset: str, class_names: Sequence[str] = ()) -> None:
        self.folder = folder
        self.dataset = dataset
        self._reader = ManifestReader(folder, tuple(class_names))
        self._writable = False

    @classmethod
    def open(cls, root: str | Path, dataset: str = "", key: str = "", class_names: Sequence[str] = ()) -> AugmentCache:
        """Open the entry `<root>/<dataset>/<key>`.

        Without a key, open the only entry of the dataset; without a dataset, the entry at `root` (see `at`).

        Raises:
            DataError: no such entry, or no key although there are several entries.
        """
        if not dataset:
            return cls.at(root, class_names=class_names)
        home = Path(root).expanduser() / dataset
        keys = sorted(entry.name for entry in home.iterdir() if (entry / MANIFEST).is_file()) if home.is_dir() else []
        if key and key not in keys:
            raise DataError(
                f"augment cache {home} has no entry '{key}'{nearest(key, keys)} (found: {', '.join(keys) or 'none'}); "
                "set cache.root and cache.key, or make edits first"
            )
        if not keys:
            raise DataError(
                f"augment cache {home} holds no entry, expected <key>/{MANIFEST} and <key>/images/; set cache.root, or make edits"
            )
        if not key and len(keys) > 1:
            raise DataError(f"augment cache {home} holds {len(keys)} entries ({', '.join(keys)}); choose one with cache.key")
        return cls.at(home / (key or keys[0]), dataset, class_names)

    @classmethod
    def at(cls, folder: str | Path, dataset: str = "", class_names: Sequence[str] = ()) -> AugmentCache:
        """Open an entry by its folder.

        Args:
            folder: folder with `metadata.jsonl` and `images/`.
            dataset: name of the dataset of the source images; empty: the name of the parent folder.
            class_names: class names by index, for manifests of other tools with class names as labels; `check_against` takes
                them from its dataset.

        Raises:
            DataError: the folder has no manifest.
        """
        folder = Path(folder).expanduser()
        if not (folder / MANIFEST).is_file():
            raise DataError(
                f"{folder} is no augment cache entry: it has no {MANIFEST}; give the folder that holds it and images/"
            )
        return cls(folder, dataset or folder.absolute().parent.name, class_names)

    @classmethod
    def create(cls, folder: str | Path, dataset: str) -> AugmentCache:
        """Create an entry, or resume an interrupted one, whose manifest lists the finished edits.

        Raises:
            DataError: the folder cannot be written, or is an entry of another dataset.
        """
        cache = cls(Path(folder).expanduser(), dataset)
        refuse_links(cache.folder)
        try:
            (cache.folder / "images").mkdir(parents=True, exist_ok=True)
            mend_tail(cache._manifest)
            cache._manifest.touch()
            cache._writable = True
        except OSError as error:
            raise DataError(f"augment cache {folder} cannot be written: {error.strerror}; choose another cache.root") from None
        if cache.edits and (found := cache._stated_dataset()) not in ("", dataset):
            raise DataError(f"augment cache {folder} belongs to the dataset '{found}', not to '{dataset}'; choose another key")
        return cache

    @staticmethod
    def file_name(source_id: str, instruction: str = "", number: int = 0, suffix: str = ".png") -> str:
        """Return the file name of an edit: a hash, equal on every run and without split words.

        Args:
            source_id: `sample_id` of the source image.
            instruction: edit prompt.
            number: index among the edits of this source and prompt.
            suffix: `.png` or `.jpg`.
        """
        digest = hashlib.sha256(f"{source_id}\n{instruction}\n{number}".encode("utf-8", "surrogateescape")).hexdigest()
        return f"images/{digest[:2]}/{digest[2:18]}{suffix}"

    def __len__(self) -> int:
        return len(self.edits)

    def __contains__(self, aug_id: object) -> bool:
        return aug_id in self._known

    @property
    def done(self) -> bool:
        """True if the entry is finished."""
        return (self.folder / DONE).is_file()

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the user about the entry: a truncated last line, an unfinished entry."""
        unfinished = () if self.done else (f"{self.folder} is unfinished (no DONE): {len(self.edits)} edits so far",)
        return (*self._reader.notes, *unfinished)

    @property
    def edits(self) -> Sequence[Edit]:
        """All edits in the order of the manifest, as a tuple or as columns.

        Raises:
            DataError: an invalid row (except a last line truncated by a kill), a repeated row, or a missing image.
        """
        return tuple(self._by_id.values()) if self._writable or self._columns is None else self._columns

    @property
    def aug_ids(self) -> list[str]:
        """Identities of all edits, in the order of the manifest.

        Raises:
            DataError: see `edits`.
        """
        return self._columns.aug_ids if not self._writable and self._columns is not None else list(self._by_id)

    def scores(self, file: str = SCORES) -> dict[str, dict[str, Any]]:
        """Return the score rows by aug_id; the last row of an edit counts.

        Raises:
            DataError: no such file, an invalid row, or a row of an edit that is not in the manifest.
        """
        path = self.folder / file
        if not path.is_file():
            raise DataError(f"{path}: there is no such file; score the edits first, or set cache.scores to a file of this folder")
        rows = {}
        for number, row in self._reader.rows(path):
            aug_id = row.get("aug_id")
            if not isinstance(aug_id, str) or aug_id not in self._known:
                found = f"aug_id is {quoted(repr(aug_id))}, not in {MANIFEST}"
                raise DataError(f"{path} line {number}: {found}; these scores belong to another cache")
            rows[aug_id] = row
        return rows

    def kept(self, file: str = SCORES) -> Sequence[Edit]:
        """Return the edits with `"keep": true` in their score row.

        Raises:
            DataError: an edit without a row, or a `keep` that is neither true nor false.
        """
        scores = self.scores(file)
        kept = []
        for place, aug_id in enumerate(self.aug_ids):
            keep = scores.get(aug_id, {}).get("keep")
            if not isinstance(keep, bool):
                found = f"'keep' is {quoted(repr(keep))}" if aug_id in scores else "there is no row"
                raise DataError(f"{self.folder / file}: {found} for '{aug_id}', expected keep = true or false; score every edit")
            if keep:
                kept.append(place)
        return select_edits(self.edits, kept)

    def check_against(self, dataset: Dataset, *, partial: bool = False) -> Sequence[Edit]:
        """Check the entry against a dataset and return the edits of its training images.

        Args:
            dataset: dataset to train on.
            partial: whether the dataset was reduced (`data.shots`, `--limit`); edits of removed images are then skipped.

        Raises:
            DataError: the entry belongs to another dataset, by name, source ids or labels.
        """
        self._reader.class_names = self._reader.class_names or dataset.class_names
        if isinstance(self.edits, Edits) and (usable := self.edits.of_training_images(dataset)) is not None:
            return usable
        stated = self._stated_dataset() or self.dataset
        if stated != dataset.name:
            raise DataError(
                f"augment cache {self.folder} was made from the dataset '{stated}', but data.name is '{dataset.name}'; "
                "correct cache.root and cache.key"
            )
        return edits_of_training_images(self.edits, dataset, self.folder, partial=partial)

    def append(self, image: SavableImage, row: Mapping[str, object]) -> Edit:
        """Write an image, then its manifest row.

        Args:
            image: a Pillow image.
            row: `file_name` (below `images/`, see `AugmentCache.file_name`), `source_id`, `label`, and any provenance.

        Raises:
            DataError: an incomplete row, a path outside of the entry, a repeated row, or a full disk.
        """
        assert self._writable, "open the entry with AugmentCache.create to write to it"
        fields = {"aug_id": row.get("file_name"), "dataset": self.dataset, "instruction": "", **row}
        first = ("file_name", "aug_id", "dataset", "source_id", "label", "instruction")
        full = {name: fields.get(name) for name in first} | {k: v for k, v in fields.items() if k not in first}
        edit = self._reader.edit(full, "the new row")
        _check_file_name(str(full["file_name"]))
        if edit.aug_id in self._by_id:
            raise DataError(
                f"augment cache {self.folder} already holds '{edit.aug_id}'; every edit needs its own file_name and aug_id"
            )
        refuse_links(self.folder, edit.path)
        try:
            edit.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(edit.path, "wb") as file:
                image.save(file, format=FORMATS[edit.path.suffix.lower()])
            with open(self._manifest, "ab") as manifest:
                manifest.write(msgspec.json.encode(full) + b"\n")
                manifest.flush()
                os.fsync(manifest.fileno())
        except (OSError, RunError) as error:
            reason = error.__cause__ or error
            raise DataError(
                f"augment cache {self.folder} cannot be written: {reason}; free disk space or change cache.root"
            ) from None
        self._by_id[edit.aug_id] = edit
        return edit

    def write_scores(self, rows: Iterable[Mapping[str, object]], file: str = SCORES) -> None:
        """Replace the score file atomically by rows with an `aug_id` each."""
        with atomic_write(self.folder / file, "wb") as out:
            out.writelines(msgspec.json.encode(row) + b"\n" for row in rows)

    def finish(self) -> None:
        """Mark the entry as finished: write DONE."""
        with atomic_write(self.folder / DONE) as file:
            file.write(f"{len(self.edits)} edits\n")

    @property
    def _manifest(self) -> Path:
        return self.folder / MANIFEST

    @cached_property
    def _columns(self) -> Edits | None:
        return read_edits(self._reader)

    @cached_property
    def _known_columns(self) -> frozenset[str]:
        return frozenset(self._columns.aug_ids if self._columns is not None else ())

    @property
    def _known(self) -> Collection[str]:
        """Identities of the edits, for looking them up."""
        return self._by_id if self._writable or self._columns is None else self._known_columns

    @cached_property
    def _by_id(self) -> dict[str, Edit]:
        return {edit.aug_id: edit for edit in self.checked()}

    def checked(self) -> Iterator[Edit]:
        """Yield the edits one by one, for entries too large for memory.

        Raises:
            DataError: see `edits`.
        """
        return self._reader.checked()

    def _stated_dataset(self) -> str:
        """Return the dataset name in the rows, or the empty string."""
        return next((str(edit.provenance["dataset"]) for edit in self.edits if edit.provenance.get("dataset")), "")


def _check_file_name(name: str) -> None:
    """Check the file name of a new edit.

    Raises:
        DataError: it has a split word, is not below `images/`, or has the ending of no format.
    """
    if found := SPLIT_WORDS.search(name):
        raise DataError(
            f"augment cache: file_name '{name}' has the word '{found[1]}', which Hugging Face's "
            "imagefolder takes for a split; use AugmentCache.file_name"
        )
    if Path(name).suffix.lower() not in FORMATS or not name.startswith("images/"):
        raise DataError(f"augment cache: file_name is '{name}', expected a .png or .jpg below images/")
