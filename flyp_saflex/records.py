"""The rows that travel between readers, cache and trainer (floor 0: text only, no tensors, no models).

A `Sample` names an image; its identity is `sample_id`, the path relative to the dataset's root, never a row number
(adding one image must not rename the others). A `Split` says what its images may be used for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flyp_saflex.errors import DataError

Role = Literal["train", "select", "test"]
Shift = Literal["id", "ood"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One labelled image.

    Attributes:
        sample_id: path relative to the dataset's root, with forward slashes; unique within a dataset.
        item: the file, or a row of the dataset's `rows`.
        label: class index, 0 .. num_classes - 1.
        domain: where the image comes from (folder, camera location, style); the empty string when unknown. It is also
            the group of worst-group accuracy.
        caption: the image's own caption, if the table has one; otherwise the class caption is used.
        box: (left, top, width, height) of the object in pixels of the stored image, if known (CUB).
    """

    sample_id: str
    item: Path | int
    label: int
    domain: str = ""
    caption: str | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def path(self) -> Path:
        """The file.

        Raises:
            DataError: the sample is a row of an array.
        """
        if isinstance(self.item, int):
            raise DataError(f"sample '{self.sample_id}' is row {self.item} of an array, but this command reads image files")
        return self.item


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One augmented image of the cache: the file, the label it came with (its source's) and its provenance.

    Attributes:
        aug_id: identity of the edit: its file name relative to the cache entry's folder.
        path: where the file is.
        source_id: `sample_id` of the image it was made from.
        label: class index that it came with ("upstream" label).
        instruction: text that made it, empty if unknown.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A named part of a dataset and what it may be used for.

    Attributes:
        name: the field's name for it (`train`, `id_val`, `test`, a domain's name ...).
        role: `train` rows are fitted, `select` rows choose models and give SAFLEX's validation gradient, `test` rows do
            neither.
        shift: `id` if it shares the training split's domains, else `ood`.
        samples: its rows, in the order of the source file.
    """

    name: str
    role: Role
    shift: Shift
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def class_counts(self) -> Counter[int]:
        """Number of images per class index; classes without images are absent."""
        return Counter(sample.label for sample in self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset as its reader found it.

    Attributes:
        name: `data.name` of the recipe.
        root: the folder that `sample_id`s are relative to.
        class_names: English class names by class index, as they go into captions.
        splits: by name, in reporting order. Exactly one of them is called `train`.
        templates: caption templates, each with one `{}`.
        notes: what the reader wants a person to know (rows skipped, classes without images ...).
        rows: images or features of samples that are no files, by row; array-like.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    templates: tuple[str, ...]
    notes: tuple[str, ...] = ()
    rows: Sequence[Any] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, those without images included."""
        return len(self.class_names)

    @property
    def train(self) -> Split:
        """The training split."""
        return self.splits["train"]
