"""Records shared by dataset readers, augment cache and trainer: samples, edits, splits, datasets.

They hold paths and text, no pixels. A `Sample` is identified by `sample_id`, its path relative to the dataset's root, and
never by a row number: adding one image must not rename the others. The role of a `Split` says how its images may be used.
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
    """Labelled image of a dataset.

    Attributes:
        sample_id: path relative to the dataset's root, with forward slashes; unique within a dataset.
        item: the file, or a row of the dataset's `rows`.
        label: class index, 0 .. num_classes - 1.
        domain: origin of the image (folder, camera location, style); the empty string if unknown. Worst-group accuracy uses
            it as the group.
        caption: the image's own caption, if the table has one; None: the class caption is used.
        box: bounding box (left, top, width, height) of the object in pixels of the stored image; None if unknown.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Named part of a dataset with its permitted use.

    Attributes:
        name: usual name of the split (`train`, `id_val`, `test`, a domain's name ...).
        role: `train`: the model is fitted to its rows; `select`: model selection and SAFLEX's validation gradient; `test`:
            evaluation only.
        shift: `id` if the split shares the domains of the training split, else `ood`.
        samples: rows in the order of the source file.
    """

    name: str
    role: Role
    shift: Shift
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def class_counts(self) -> Counter[int]:
        """Return the number of images per class index; classes without images are absent."""
        return Counter(sample.label for sample in self.samples)


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
        fields: field of the table that each column of `rows` comes from (one-hot columns share one); empty: no table.
        whole: the splits before `data.shots`, `data.add_to_train` and `--limit` cut them; None: nothing was cut.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    templates: tuple[str, ...]
    notes: tuple[str, ...] = ()
    rows: Sequence[Any] | None = None
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
