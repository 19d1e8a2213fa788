"""Record of the data that a run was trained on: RUN/data.json, and its comparison with other data.

    {"name", "class_names", "templates", "fingerprint", "images",
     "splits": {NAME: {"role", "images", "per_class", "fingerprint", "sizes"}}}

A split's fingerprint is a digest of its sample ids and labels, `sizes` one of the sizes of some of its files. The order of
rows and the place of the folder do not count, nor do the draws of a run: splits are recorded before `data.shots`,
`data.add_to_train` and `--limit` cut them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from flyp_saflex.errors import RunError
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.storage.files import write_json

FILE = "data.json"
NUM_SIZES = 64
"""Files of a split whose sizes are compared: images that were changed under the same names are then seen at little cost."""


class SplitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One split: use, number of images, digests."""

    role: str
    images: int
    per_class: tuple[int, ...]
    """Images of every class, by index."""
    fingerprint: str
    sizes: str


class DataRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Classes and splits of a dataset, without its images and paths."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    fingerprint: str
    """Digest of class names and splits."""
    images: str
    """Digest of sample ids and labels of all splits together, whatever the splits."""
    splits: dict[str, SplitRecord]

    def write(self, run: Path) -> None:
        """Write RUN/data.json atomically."""
        write_json(run / FILE, msgspec.to_builtins(self))


def record_of(dataset: Dataset) -> DataRecord:
    """Return the record of a dataset; reads the sizes of a few files, no image."""
    whole = dataset.whole or dataset.splits
    splits = {split.name: _split_record(split, dataset.num_classes) for split in whole.values()}
    parts = [*dataset.class_names, *(f"{name}\0{split.fingerprint}" for name, split in sorted(splits.items()))]
    return DataRecord(
        name=dataset.name,
        class_names=tuple(dataset.class_names),
        templates=tuple(dataset.templates),
        fingerprint=_digest(parts),
        images=_digest(sorted(line for split in whole.values() for line in _lines(split))),
        splits=splits,
    )


def read_record(run: Path) -> DataRecord | None:
    """Read RUN/data.json; None where a run of an older version has none.

    Raises:
        RunError: the file is damaged.
    """
    path = run / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=DataRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path} is not what train writes ({str(error)[:200]}): restore it, or delete it to go on without the check of "
            "classes and data"
        ) from None


def class_difference(old: Sequence[str], new: Sequence[str]) -> str:
    """Return the first difference of two lists of classes in words; the empty string if they are equal."""
    for label, (before, after) in enumerate(zip(old, new, strict=False)):
        if before != after:
            return f"class {label} was {_quoted(before)} and is {_quoted(after)}"
    if len(old) == len(new):
        return ""
    longer, verb = (old, "is gone") if len(old) > len(new) else (new, "is new")
    return f"{len(old)} classes became {len(new)}: {_quoted(longer[min(len(old), len(new))])} {verb}"


def difference(old: DataRecord, new: DataRecord, splits: Iterable[str] = (), *, sizes: bool = True) -> str:
    """Return the first difference of two datasets in words; the empty string if they are the same data.

    Args:
        old: before.
        new: now.
        splits: names that are compared; empty: all that either of them has.
        sizes: whether other file sizes are a difference, too.
    """
    if found := class_difference(old.class_names, new.class_names):
        return found
    for name in tuple(splits) or tuple(dict.fromkeys([*old.splits, *new.splits])):
        before, after = old.splits.get(name), new.splits.get(name)
        if before is None or after is None:
            if before is not after:
                return f"split {_quoted(name)} {'is new' if before is None else 'is gone'}"
        elif before.fingerprint != after.fingerprint:
            counts = f"{before.images} images became {after.images}"
            return f"split {_quoted(name)}: " + (counts if before.images != after.images else "other images or labels")
        elif sizes and before.sizes != after.sizes:
            return f"split {_quoted(name)}: files of the same names have other sizes"
    return ""


def other_data(own: DataRecord, found: DataRecord, evaluated: Iterable[str], *, sizes: bool) -> str:
    """Return in words why evaluated splits are not the run's own data; the empty string if they are.

    A split that the run did not know belongs to its data if the splits that both know are equal.

    Args:
        own: record of the run.
        found: record of the data to evaluate.
        evaluated: names of the splits to evaluate.
        sizes: whether other file sizes are a difference, too.
    """
    shared = [name for name in own.splits if name in found.splits]
    wanted = tuple(evaluated)
    if not shared:
        return f"it has no split of the run ({', '.join(_quoted(name) for name in list(own.splits)[:4])})"
    return difference(own, found, wanted if wanted and set(wanted) <= set(shared) else shared, sizes=sizes)


def _split_record(split: Split, num_classes: int) -> SplitRecord:
    counts = split.class_counts()
    lines = _lines(split)
    chosen = [line.rpartition("\0")[0] for line in lines[:: max(1, -(-len(lines) // NUM_SIZES))]]
    measured = sorted(split.keep(set(chosen)), key=lambda sample: sample.sample_id)
    return SplitRecord(
        role=split.role,
        images=len(lines),
        per_class=tuple(counts[label] for label in range(num_classes)),
        fingerprint=_digest(lines),
        sizes=_digest(str(_size(sample)) for sample in measured),
    )


def _size(sample: Sample) -> int:
    """Return the size of a sample's file in bytes; -1 where it has none."""
    try:
        return sample.item.stat().st_size if isinstance(sample.item, Path) else -1
    except OSError:
        return -1


def _lines(split: Split) -> list[str]:
    """Return identity and label of every row, in the order of the identities."""
    return sorted(f"{sample_id}\0{label}" for sample_id, label in zip(split.sample_ids, split.labels, strict=True))


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
