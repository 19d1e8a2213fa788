"""Edits of a manifest as columns: an `Edit` is read on demand, checks look at whole columns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import msgspec

from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset, Edit
from flyp_saflex.storage.manifest import MANIFEST, ROWS, WRITERS, ManifestReader
from flyp_saflex.storage.manifest_index import ManifestColumns, read_columns

if TYPE_CHECKING:
    import pyarrow as pa


class Edits(Sequence[Edit]):
    """Edits of a manifest without unusual rows; equal to the tuple of the same edits.

    Args:
        reader: of the entry.
        columns: of its manifest.
        places: rows of the manifest, in the order of the edits; None: all of them.
    """

    def __init__(self, reader: ManifestReader, columns: ManifestColumns, places: pa.Array | None = None) -> None:
        self._reader, self._columns, self._places = reader, columns, places

    def __len__(self) -> int:
        return len(self._columns) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, place: int) -> Edit: ...
    @overload
    def __getitem__(self, place: slice) -> Edits: ...
    def __getitem__(self, place: int | slice) -> Edit | Edits:
        if isinstance(place, slice):
            return self.select(range(len(self))[place])
        place = range(len(self))[place]
        row = place if self._places is None else self._places[place].as_py()
        where = f"{self._reader.folder / MANIFEST} row {row + 1}"
        try:
            edit = self._reader.edit(msgspec.json.decode(self._columns.line(row), type=dict[str, Any]), where)
        except (msgspec.DecodeError, UnicodeDecodeError):
            edit = None
        if edit is None or edit.aug_id != self._columns.column("aug_id")[row].as_py():
            raise DataError(f"{where} was changed while it was in use, expected the row of the start; run the command again")
        return edit

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (tuple, Edits)):
            return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.aug_ids))

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)

    @property
    def aug_ids(self) -> list[str]:
        """Identities, in order."""
        found: list[str] = self.column("aug_id").to_pylist()
        return found

    @property
    def labels(self) -> list[int]:
        """Upstream labels, in order."""
        found: list[int] = self.column("label").to_pylist()
        return found

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of these edits (see `ManifestColumns`)."""
        whole = self._columns.column(name)
        return whole if self._places is None else whole.take(self._places)

    def select(self, places: Iterable[int] | pa.Array) -> Edits:
        """Return the edits at these places, in this order."""
        import pyarrow as pa

        chosen = places if isinstance(places, pa.Array) else pa.array(places, pa.int64())
        return Edits(self._reader, self._columns, chosen if self._places is None else self._places.take(chosen))

    def of_training_images(self, dataset: Dataset) -> Edits | None:
        """Return the edits of a dataset's training images.

        Returns:
            The edits; None if the rows need a closer look: another dataset, an unknown source, or another label than its own.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._columns.dataset not in ("", dataset.name):
            return None
        splits = [dataset.train, *(split for split in dataset.splits.values() if split is not dataset.train)]
        try:
            sources = pa.concat_arrays([pa.array(split.sample_ids, pa.string()) for split in splits])
        except UnicodeEncodeError:  # names of files that are no UTF-8
            return None
        rows = pc.index_in(self.column("source_id"), value_set=sources)
        if rows.null_count:
            return None
        own = pa.concat_arrays([pa.array(split.labels, pa.int64()) for split in splits])
        labels = self.column("label")
        regular = pc.and_(pc.equal(labels, own.take(rows.combine_chunks())), pc.less(labels, dataset.num_classes))
        if not pc.all(regular).as_py():
            return None
        trained = pc.less(rows, len(dataset.train))
        if pc.all(trained).as_py():
            return self
        return self.select(pc.indices_nonzero(trained).cast(pa.int64()))


def aug_ids_of(edits: Sequence[Edit]) -> list[str]:
    """Return the identities of edits, in order."""
    return edits.aug_ids if isinstance(edits, Edits) else [edit.aug_id for edit in edits]


def select_edits(edits: Sequence[Edit], places: Sequence[int]) -> Sequence[Edit]:
    """Return the edits at these places, in this order."""
    return edits.select(places) if isinstance(edits, Edits) else tuple(edits[place] for place in places)


def read_edits(reader: ManifestReader) -> Edits | None:
    """Return the edits of an entry as columns.

    Returns:
        The edits; None if they have to be read row by row: a writer is at work or was killed, a row is damaged or unusual, an
        aug_id is there twice, or an image is missing.
    """
    if any(reader.folder.glob(f"{WRITERS}/*/{ROWS}")):
        return None
    columns = read_columns(reader.folder / MANIFEST)
    return Edits(reader, columns) if columns is not None and _images_exist(reader.folder, columns) else None


def _images_exist(folder: Path, columns: ManifestColumns) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    names = columns.column("file_name")
    homes = pc.unique(pc.replace_substring_regex(names, r"[^/]*$", "")).to_pylist()
    try:
        found = [
            pc.binary_join_element_wise(home, pa.array(os.listdir(folder / home), pa.string()), "", null_handling="skip")
            for home in homes
        ]
    except (OSError, UnicodeEncodeError):
        return False
    return bool(pc.all(pc.is_in(names, value_set=pa.concat_arrays(found))).as_py()) if found else True


def edits_of_training_images(edits: Sequence[Edit], dataset: Dataset, folder: Path, *, partial: bool) -> Sequence[Edit]:
    """Return the edits of a dataset's training images, looked at one by one.

    Args:
        edits: of the entry.
        dataset: dataset to train on.
        folder: of the entry, for messages.
        partial: whether the dataset was reduced; edits of removed images are then skipped.

    Raises:
        DataError: a source that the dataset lacks, or another label than its own.
    """
    splits = dataset.splits.values()
    labels = {name: label for split in splits for name, label in zip(split.sample_ids, split.labels, strict=True)}
    unknown = [edit for edit in edits if edit.source_id not in labels]
    if unknown and (not partial or len(unknown) == len(edits)):
        raise DataError(
            f"augment cache {folder}: {len(unknown)} of {len(edits)} edits were made from images that "
            f"'{dataset.name}' in {dataset.root} lacks (first: '{unknown[0].source_id}'); correct data.root or cache.key"
        )
    for edit in edits:
        if edit.label != labels.get(edit.source_id, edit.label) or not 0 <= edit.label < dataset.num_classes:
            raise DataError(
                f"{folder / MANIFEST}: '{edit.aug_id}' has the label {edit.label}, but its source '{edit.source_id}' has "
                f"{labels.get(edit.source_id, 'none')}; the cache was made with another class list: make it again"
            )
    trained = set(dataset.train.sample_ids)
    return tuple(edit for edit in edits if edit.source_id in trained)
