"""Batches of preprocessed images in a fixed order.

For passes that see every image once: evaluation, features, validation gradients. An unreadable image is skipped, counted
and listed; too many of them stop the pass. `B` batch, `S` image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from flyp_saflex.errors import DataError
from flyp_saflex.images.reader import Preprocess, Source, reader_of
from flyp_saflex.records import Edit, Sample

Row = tuple[int, Tensor | None, str]


@dataclass
class _Part:
    """A batch as it leaves a worker: one tensor, so that one copy, not one per image, takes it to another process or a GPU."""

    images: Tensor | None
    positions: list[int] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def pin_memory(self) -> _Part:
        """Move the images to memory that a GPU can read by itself; the DataLoader calls this."""
        return _Part(None if self.images is None else self.images.pin_memory(), self.positions, self.failures)


class ImageLoader:
    """Reads images in batches; the same input gives the same output with any number of workers.

    Args:
        preprocess: image to tensor `[3, S, S]`, without randomness, or a reader of images.
        batch_size: rows per batch; a batch with unreadable images is shorter.
        workers: processes that read; 0 reads in this one.
        max_unreadable: largest part of the rows that may be unreadable.
        box_crop: crop samples to their bounding box.
        progress: show a progress bar (if the output is a terminal).
        pin: give the batches in page-locked memory, from which they reach a GPU while it works.

    Attributes:
        reader: reads the images.
        unreadable: (path, reason) of the images skipped in the latest pass.
    """

    def __init__(
        self,
        preprocess: Preprocess | Source,
        *,
        batch_size: int,
        workers: int = 0,
        max_unreadable: float = 0.01,
        box_crop: bool = False,
        progress: bool = False,
        pin: bool = False,
    ) -> None:
        self.reader = reader_of(preprocess)
        self.pin = pin
        self.batch_size = batch_size
        self.workers = workers
        self.max_unreadable = max_unreadable
        self.box_crop = box_crop
        self.progress = progress
        self.unreadable: list[tuple[str, str]] = []

    def batches(self, samples: Sequence[Sample | Edit], *, num_in_all: int = 0) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (positions in `samples`, images `[B, 3, S, S]`) in order.

        Args:
            samples: of this process.
            num_in_all: samples of all processes that share the pass; 0: those of this one.

        Raises:
            DataError: more than `max_unreadable` of the rows cannot be read.
        """
        self.unreadable = []
        rows = _Rows(samples, self.reader, box_crop=self.box_crop)
        bar = tqdm(total=len(samples), unit="image", desc="reading images", disable=None if self.progress else True)
        with bar:
            for part in self._read(rows):
                for position, reason in part.failures:
                    self._skip(str(samples[position].item), reason, num_in_all or len(samples))
                bar.update(len(part.positions) + len(part.failures))
                if part.images is not None:
                    yield part.positions, part.images

    def _read(self, rows: _Rows) -> Iterator[_Part]:
        if self.workers == 0:
            for start in range(0, len(rows), self.batch_size):
                part = _collate([rows[position] for position in range(start, min(start + self.batch_size, len(rows)))])
                yield part.pin_memory() if self.pin else part
            return
        # The loader draws a seed for its workers even where nothing is random: from its own generator, not the global one.
        yield from DataLoader(
            rows,
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator(),
            pin_memory=self.pin,
        )

    def _skip(self, path: str, reason: str, total: int) -> None:
        self.unreadable.append((path, reason))
        self.check_unreadable(len(self.unreadable), total)

    def check_unreadable(self, count: int, total: int) -> None:
        """Check the number of unreadable images of a pass.

        Raises:
            DataError: they are more than `max_unreadable` of all.
        """
        if count > self.max_unreadable * total:
            first = f"; first: {self.unreadable[0][1]}" if self.unreadable else ", all read by other processes"
            raise DataError(
                f"{count} of {total} images cannot be read, more than data.max_unreadable = {self.max_unreadable} allows{first}"
            )


def _collate(rows: Sequence[Row]) -> _Part:
    images = [image for _, image, _ in rows if image is not None]
    return _Part(
        torch.stack(images) if images else None,
        [position for position, image, _ in rows if image is not None],
        [(position, reason) for position, image, reason in rows if image is None],
    )


class _Rows(TorchDataset[Row]):
    """One row per image: its position, its tensor or None, and the reason if there is none."""

    def __init__(self, samples: Sequence[Sample | Edit], reader: Source, *, box_crop: bool) -> None:
        self.samples, self.reader, self.box_crop = samples, reader, box_crop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Row:
        sample = self.samples[position]
        try:
            return position, self.reader.tensor(self.reader.read(sample, box_crop=self.box_crop)), ""
        except DataError as error:
            return position, None, str(error)
