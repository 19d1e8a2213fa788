"""Records shared by dataset readers, augment cache and trainer: samples, edits, splits, datasets.

They hold paths and text, no pixels. A `Sample` is identified by `sample_id`, its path relative to the dataset's root, and
never by a row number: adding one image must not rename the others. The role of a `Split` says how its images may be used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, overload

from flyp_saflex.errors import DataError

Role = Literal["train", "select", "test"]
Shift = Literal["id", "ood"]
Evaluator = Callable[[Sequence["Sample"], Sequence[int]], dict[str, float]]
"""Official evaluator: samples and predicted classes to numbers by name."""


class ImageRows(Protocol):
    """Source of encoded images by row."""

    def image_bytes(self, row: int) -> bytes:
        """Return the bytes of a row's image, as a file would hold them.

        Raises:
            DataError: they cannot be read.
        """


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Encoded image inside of a dataset's own files (Parquet, Arrow, tar).

    Attributes:
        name: dataset and row, for messages; unique.
        rows: where the bytes are.
        row: its row there.
    """

    name: str
    rows: ImageRows = field(compare=False, repr=False)
    row: int

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Return the encoded image."""
        return self.rows.image_bytes(self.row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Labelled image of a dataset.

    Attributes:
        sample_id: path relative to the dataset's root, with forward slashes; unique within a dataset.
        item: the file, an image inside of a dataset's files, or a row of the dataset's `rows`.
        label: class index, 0 .. num_classes - 1.
        domain: origin of the image (folder, camera location, style); the empty string if unknown.
        group: values of `data.group_columns`; the empty string without these. Worst-group accuracy is over groups, or domains.
        caption: the image's own caption, if the table has one; None: the class caption is used.
        box: bounding box (left, top, width, height) of the object in pixels of the stored image; None if unknown.
        sequence: burst of a camera trap that the image belongs to; the empty string if unknown.
    """

    sample_id: str
    item: Path | StoredImage | int
    label: int
    domain: str = ""
    group: str = ""
    caption: str | None = None
    box: tuple[float, float, float, float] | None = None
    sequence: str = ""

    @property
    def path(self) -> Path:
        """The file.

        Raises:
            DataError: the sample is a row of an array, or an image inside of a dataset's files.
        """
        if isinstance(self.image, StoredImage):
            raise DataError(f"image '{self.image}' is no file of its own, but this command needs files; use a reader of files")
        return self.image

    @property
    def image(self) -> Path | StoredImage:
        """Place of the encoded image.

        Raises:
            DataError: the sample is a row of an array.
        """
        if isinstance(self.item, int):
            raise DataError(f"sample '{self.sample_id}' is row {self.item} of an array, but this command reads image files")
        return self.item


class Samples(Sequence[Sample]):
    """Image files held as columns, for splits of a million rows; a `Sample` is made when it is asked for.

    Args:
        root: folder that the ids are relative to.
        sample_ids: identities of the rows.
        labels: class indices of the rows.
        domains, groups, captions, sequences, boxes: further fields of the rows, in columns as long; None: those of a `Sample`
            without.
    """

    __slots__ = ("boxes", "captions", "domains", "groups", "labels", "root", "sample_ids", "sequences")

    def __init__(
        self,
        root: Path,
        *,
        sample_ids: Sequence[str],
        labels: Sequence[int],
        domains: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        captions: Sequence[str | None] | None = None,
        sequences: Sequence[str] | None = None,
        boxes: Sequence[tuple[float, float, float, float] | None] | None = None,
    ) -> None:
        self.root, self.sample_ids, self.labels = root, sample_ids, labels
        self.domains, self.groups, self.captions, self.sequences = domains, groups, captions, sequences
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.sample_ids)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Samples: ...
    def __getitem__(self, place: int | slice) -> Sample | Samples:
        if isinstance(place, slice):
            return self.select(range(len(self))[place])
        sample_id = self.sample_ids[place]
        return Sample(
            sample_id=sample_id,
            item=self.root / sample_id,
            label=self.labels[place],
            domain="" if self.domains is None else self.domains[place],
            group="" if self.groups is None else self.groups[place],
            caption=None if self.captions is None else self.captions[place],
            sequence="" if self.sequences is None else self.sequences[place],
            box=None if self.boxes is None else self.boxes[place],
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (tuple, Samples)):
            return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def select(self, places: Iterable[int]) -> Samples:
        """Return the rows at these places, in this order."""
        places = list(places)
        columns = {name: getattr(self, name) for name in self.__slots__ if name != "root"}
        chosen: dict[str, Any] = {
            name: None if cells is None else [cells[place] for place in places] for name, cells in columns.items()
        }
        return Samples(self.root, **chosen)


def rows_at(samples: Sequence[Sample], places: Iterable[int]) -> Sequence[Sample]:
    """Return the rows at these places, in this order: columns of columns, else a tuple."""
    return samples.select(places) if isinstance(samples, Samples) else tuple(samples[place] for place in places)


def sample_ids_of(samples: Sequence[Sample]) -> Sequence[str]:
    """Return the identities of rows."""
    return samples.sample_ids if isinstance(samples, Samples) else [sample.sample_id for sample in samples]


def labels_of(samples: Sequence[Sample]) -> Sequence[int]:
    """Return the class indices of rows."""
    return samples.labels if isinstance(samples, Samples) else [sample.label for sample in samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Augmented image of the cache: its file, its upstream label and its provenance.

    Attributes:
        aug_id: identity of the edit: its file name relative to the cache entry's folder.
        path: the image file.
        source_id: `sample_id` of the source image.
        label: upstream label: the class index of the source image.
        instruction: edit prompt; empty if unknown.
        provenance: every other manifest field (model id, seed, guidance, steps, sha256 ...), unchanged.
    """

    aug_id: str
    path: Path
    source_id: str
    label: int
    instruction: str = ""
    provenance: Mapping[str, object] = field(default_factory=dict)

    @property
    def item(self) -> Path:
        """The file, as of a `Sample`."""
        return self.path

    @property
    def image(self) -> Path:
        """The file, as of a `Sample`."""
        return self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Named part of a dataset with its permitted use.

    Attributes:
        name: usual name of the split (`train`, `id_val`, `test`, a domain's name ...).
        role: `train`: the model is fitted to its rows; `select`: model selection and SAFLEX's validation gradient; `test`:
            evaluation only.
        shift: `id` if the split shares the domains of the training split, else `ood`.
        samples: rows in the order of the source file: a tuple, or columns of many.
        own_classes: classes that predictions are taken from (`data.own_classes`); empty: all.
        merged: classes that count as one, by the highest score: labels and predictions are the first of each; empty: none.
    """

    name: str
    role: Role
    shift: Shift
    samples: Sequence[Sample]
    own_classes: tuple[int, ...] = ()
    merged: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sample_ids(self) -> Sequence[str]:
        """Identities of the rows."""
        return sample_ids_of(self.samples)

    @property
    def labels(self) -> Sequence[int]:
        """Class indices of the rows."""
        return labels_of(self.samples)

    def files(self) -> Iterator[str]:
        """Yield the paths of the rows as text with forward slashes; empty for rows without a file."""
        rows = self.samples
        if isinstance(rows, Samples):
            root = rows.root.as_posix()
            prefix = "" if root == "." else root.rstrip("/") + "/"
            return (prefix + sample_id for sample_id in rows.sample_ids)
        return (sample.item.as_posix() if isinstance(sample.item, Path) else "" for sample in rows)

    def class_counts(self) -> Counter[int]:
        """Return the number of images per class index; classes without images are absent."""
        return Counter(self.labels)

    def keep(self, sample_ids: Collection[str]) -> Sequence[Sample]:
        """Return the rows with these identities, in their order."""
        return rows_at(self.samples, (place for place, name in enumerate(self.sample_ids) if name in sample_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Dataset with its splits, class names and caption templates.

    Attributes:
        name: `data.name` of the recipe.
        root: the folder that `sample_id`s are relative to.
        class_names: English class names by class index, as they go into captions.
        splits: by name, in reporting order. Exactly one of them is called `train`.
        templates: caption templates, each with one `{}`.
        notes: what the reader wants a person to know (rows skipped, classes without images ...).
        rows: images or features of samples that are no files, by row; array-like.
        evaluator: the dataset's official evaluator: samples and predictions to numbers by name; None: there is none.
        fields: field of the table that each column of `rows` comes from (one-hot columns share one); empty: no table.
        whole: the splits before `data.shots`, `data.add_to_train` and `--limit` cut them; None: nothing was cut.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    templates: tuple[str, ...]
    notes: tuple[str, ...] = ()
    rows: Any = None
    evaluator: Evaluator | None = None
    fields: tuple[str, ...] = ()
    whole: Mapping[str, Split] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, including classes without images."""
        return len(self.class_names)

    @property
    def train(self) -> Split:
        """The training split."""
        return self.splits["train"]
