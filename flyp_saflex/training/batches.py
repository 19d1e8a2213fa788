"""Batches of a step as a process reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_all_start_methods
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from flyp_saflex.errors import DataError
from flyp_saflex.images.copy_paste import CopyPaste
from flyp_saflex.images.decode import read_image
from flyp_saflex.images.reader import Preprocess, Source, reader_of
from flyp_saflex.records import Edit, Sample
from flyp_saflex.tasks.feature_cache import FeatureCache
from flyp_saflex.training.sampling import Plan, Row, derived_seed
from flyp_saflex.training.setup import Setup
from flyp_saflex.training.upstreams import ItemOperation


@dataclass
class Batch:
    """One part of a step on one process: T training rows, then A augmented rows (A may be 0).

    Attributes:
        inputs: preprocessed images [T + A, 3, S, S], or stored activations behind the frozen blocks.
        rows: what they are.
        indices: [T + A] long, index of the sample or edit that was read in the end.
        num_train: T.
        unreadable: files that could not be read and were replaced by the next readable one: (path, reason).
    """

    inputs: Tensor
    rows: list[Row]
    indices: Tensor
    num_train: int
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """Move the inputs to memory that a GPU can read by itself; the DataLoader calls this."""
        return replace(self, inputs=self.inputs.pin_memory())


class BatchReader(TorchDataset[Batch]):
    """Reads whole batches: item i is the i-th entry of `schedule`.

    Args:
        schedule: rows of every batch, in order.
        samples: training samples.
        edits: cached edits, or None.
        preprocess: image -> tensor [3, S, S], or a reader of images.
        on_train: random operations on training rows.
        on_augmented: random operations on augmented rows.
        box_crop: crop samples to their box first.
        paste: reads augmented rows, instead of the plain reader.
        stored: reads stored activations of an item instead of the item.
    """

    def __init__(
        self,
        schedule: Callable[[int], list[Row]],
        num_batches: int,
        samples: Sequence[Sample],
        edits: Sequence[Edit] | None,
        preprocess: Preprocess | Source,
        *,
        on_train: Sequence[ItemOperation] = (),
        on_augmented: Sequence[ItemOperation] = (),
        box_crop: bool = False,
        paste: CopyPaste | None = None,
        stored: Callable[[Sample | Edit], Tensor] | None = None,
    ) -> None:
        self.schedule, self.num_batches = schedule, num_batches
        self.samples, self.edits, self.reader = samples, edits, reader_of(preprocess)
        self.on_train, self.on_augmented, self.box_crop, self.stored = on_train, on_augmented, box_crop, stored
        self.paste = paste

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> Batch:
        rows = self.schedule(number)
        tensors, indices, unreadable = [], [], []
        for row in rows:
            tensor, index, failures = self._read_or_next(row)
            tensors.append(tensor)
            indices.append(index)
            unreadable += failures
        num_train = sum(row.kind == "train" for row in rows)
        return Batch(torch.stack(tensors), rows, torch.tensor(indices), num_train, unreadable)

    def source(self, kind: str) -> Sequence[Sample | Edit]:
        """Return the list that a row's index points into."""
        return self.edits if kind == "augmented" and self.edits is not None else self.samples

    def _read_or_next(self, row: Row) -> tuple[Tensor, int, list[tuple[str, str]]]:
        source = self.source(row.kind)
        failures: list[tuple[str, str]] = []
        for offset in range(min(len(source), 100)):
            index = (row.index + offset) % len(source)
            try:
                return self._read(row, source[index]), index, failures
            except DataError as error:
                failures.append((str(source[index].item), str(error)))
        raise DataError(f"{failures[0][1]}; the {len(failures) - 1} images after it cannot be read either: check data.root")

    def _read(self, row: Row, item: Sample | Edit) -> Tensor:
        if self.stored is not None:
            return self.stored(item)
        operations = self.on_augmented if row.kind == "augmented" else self.on_train
        if row.kind == "augmented" and self.paste is not None and isinstance(item, Sample):
            picture = self.paste.read(item, derived_seed(row.seed, "paste"))
        else:
            picture = self.reader.read(item, box_crop=self.box_crop)
        for number, operation in enumerate(operations):
            picture = operation.on(picture, derived_seed(row.seed, number))
        return self.reader.tensor(picture)


def read_steps(
    setup: Setup, cache: FeatureCache | None, first: int, end: int, rank: int = 0, num_processes: int = 1
) -> Iterator[list[Batch]]:
    """Yield the accumulated parts of each step from `first` to before `end`, as this process reads them."""
    parts = setup.config.train.accumulation
    reader = BatchReader(
        partial(_rows_of, setup.plan, first, parts, rank, num_processes),
        (end - first) * parts,
        setup.dataset.train.samples,
        setup.edits,
        setup.source,
        on_train=setup.on_train,
        on_augmented=setup.on_augmented,
        box_crop=setup.config.data.box_crop,
        paste=setup.paste,
        stored=cache.read if cache is not None else None,
    )
    workers = setup.config.data.workers if cache is None else 0
    # A forked worker has samples and index at once; any other is sent them.
    method = "fork" if workers and "fork" in get_all_start_methods() else None
    loader = DataLoader(
        reader,
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
        multiprocessing_context=method,
        pin_memory=next(setup.task.network.parameters()).is_cuda,
    )
    collected: list[Batch] = []
    for batch in loader:
        collected.append(batch)
        if len(collected) == parts:
            yield collected
            collected = []


def _rows_of(plan: Plan, first: int, parts: int, rank: int, num_processes: int, number: int) -> list[Row]:
    """Return the rows of the `number`-th batch of a process that starts at step `first`."""
    step, part = divmod(number, parts)
    return plan.shard(first + step, rank, num_processes, part, parts)


class UnreadableFiles:
    """Files of a run that could not be read and were replaced, over all processes.

    Attributes:
        reasons: reason by path, agreed on by all processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.reasons: dict[str, str] = {}
        self._new: dict[str, str] = {}

    def note(self, batches: Sequence[Batch]) -> None:
        """Take in what a step's batches could not read; tell every file once."""
        for batch in batches:
            for path, reason in batch.unreadable:
                if path not in self.reasons and path not in self._new:
                    self._new[path] = reason
                    tqdm.write(f"skipped: {reason}")

    def agree(self, stopping: bool) -> bool:
        """Share new files among processes; return whether one of the processes was told to stop."""
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([[stopping, bool(self._new)]], dtype=torch.long, device=self.accelerator.device)
            stopping, any_new = (bool(flag) for flag in self.accelerator.gather(flags).any(dim=0))
            for news in gather_object([self._new]) if any_new else ():
                self.reasons |= news
        self.reasons |= self._new
        self._new = {}
        return stopping

    def restore(self, reasons: Mapping[str, str]) -> None:
        """Take over a checkpoint's files, without those that can be read by now."""
        self.reasons = {path: reason for path, reason in reasons.items() if not _readable(path)}


def _readable(path: str) -> bool:
    try:
        read_image(Path(path))
    except DataError:
        return False
    return True
