"""Sampling: the images of every step, as a pure function of the seed and the step.

Nothing here keeps a state: the rows of a step can be asked for at any time, in any process, so a resumed run sees the same
rows, with the same random crops, as an undisturbed one. A *row* is a training image, an augmented image or a
validation image; its random operations are seeded from (seed, stream, position), never from a global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flyp_saflex.records import Edit, Sample, labels_of


def derived_seed(*parts: object) -> int:
    """Return a 63-bit seed from any printable parts; the same on every machine and Python."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Stream:
    """An endless sequence of indices into `num_rows` rows: one seeded permutation after another.

    Args:
        num_rows: rows to draw from.
        seed: of the permutations.
        labels: class of every row, to draw every class equally often; None: every row equally often.
    """

    def __init__(self, num_rows: int, seed: int, labels: Sequence[int] | None = None) -> None:
        assert num_rows > 0, "a stream needs rows"
        self.num_rows, self.seed, self.labels = num_rows, seed, labels
        self._round: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def take(self, start: int, count: int) -> list[int]:
        """Return the indices at positions start .. start + count - 1."""
        rows: list[int] = []
        for position in range(start, start + count):
            number, offset = divmod(position, self.num_rows)
            if self._round[0] != number:
                self._round = number, self._permutation(number)
            rows.append(int(self._round[1][offset]))
        return rows

    def _permutation(self, number: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed & 0xFFFFFFFF, self.seed >> 32, number])
        if self.labels is None:
            return generator.permutation(self.num_rows)
        labels = np.asarray(self.labels)
        classes = np.unique(labels)
        # Classes take turns, in a new order every turn; within a class one permutation after another.
        turns = -(-self.num_rows // len(classes))
        order = np.concatenate([generator.permutation(classes) for _ in range(turns)])[: self.num_rows]
        rows = np.empty(self.num_rows, dtype=np.int64)
        for label in classes:
            places, members = np.flatnonzero(order == label), np.flatnonzero(labels == label)
            rounds = -(-len(places) // len(members))
            rows[places] = np.concatenate([generator.permutation(members) for _ in range(rounds)] or [members])[: len(places)]
        return rows


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a step: its kind, its index, and the seed of its random operations."""

    kind: str  # "train", "augmented" or "validation"
    index: int
    seed: int


class Plan:
    """The rows of every step.

    Args:
        seed: of everything drawn here.
        train: training samples.
        edits: cached edits, the source of the augmented rows; None: the batch's own training images.
        batch_size: training rows per step.
        num_augmented: augmented rows per step.
        balanced: draw every class equally often.
    """

    def __init__(
        self,
        *,
        seed: int,
        train: Sequence[Sample],
        edits: Sequence[Edit] | None,
        batch_size: int,
        num_augmented: int,
        balanced: bool = False,
    ) -> None:
        self.seed, self.batch_size, self.num_augmented = seed, batch_size, num_augmented
        labels = labels_of(train) if balanced else None
        self._train = Stream(len(train), derived_seed(seed, "train"), labels)
        self._edits = Stream(len(edits), derived_seed(seed, "edits")) if edits else None

    def step(self, step: int) -> list[Row]:
        """Return the training rows of a step, then its augmented rows."""
        train = self._train.take(step * self.batch_size, self.batch_size)
        rows = [Row("train", index, derived_seed(self.seed, "train", step, place)) for place, index in enumerate(train)]
        if self._edits is not None:
            augmented = self._edits.take(step * self.num_augmented, self.num_augmented)
        else:
            augmented = [train[place % len(train)] for place in range(self.num_augmented)]
        return rows + [
            Row("augmented", index, derived_seed(self.seed, "augmented", step, place)) for place, index in enumerate(augmented)
        ]

    def shard(self, step: int, rank: int, num_processes: int, part: int = 0, num_parts: int = 1) -> list[Row]:
        """Return this process's rows of one accumulated part of a step: training rows first, then augmented rows."""
        rows = self.step(step)
        stride = num_processes * num_parts
        first = rank * num_parts + part  # a part holds the same rows for every number of processes
        train, augmented = rows[: self.batch_size], rows[self.batch_size :]
        return train[first::stride] + augmented[first::stride]
