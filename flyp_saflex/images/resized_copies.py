"""Copies of a dataset's images at a small size, in a few large files.

    settings.json     dataset, shorter side, JPEG quality
    shard-00000.bin   the copies' bytes, one behind the other; a new file after 64 MiB
    index.jsonl       one row per copy, appended after its bytes were flushed: source (id, box, bytes, time, sha256), place, crc32

`resized_writer.py` makes them. An image with a shorter side above `shorter_side_px` is stored upright at that size as a JPEG,
any other as the bytes of its file: nothing is enlarged, and no small image changes. What is cut to a box is a JPEG, too. Of two
rows for one image the later counts. A copy is used only while its source has the size and time of change in the index.
"""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import Box, decode_picture
from flyp_saflex.images.picture import Picture
from flyp_saflex.records import Sample

SETTINGS, INDEX = "settings.json", "index.jsonl"
READING_THREADS = 8


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings that decide how the copies look."""

    dataset: str
    shorter_side_px: int
    jpeg_quality: int
    version: int = 1


class Stored(msgspec.Struct, frozen=True):
    """A row of the index.

    Attributes:
        id: the sample's `sample_id`.
        box: what the copy was cut to, if anything.
        source_bytes, mtime_ns, sha256: of the source file.
        shard, offset, length, crc32: where the copy lies, and its checksum.
        full_size: upright width and height of the source, after the cut; None: the copy is the source's own bytes.
    """

    id: str
    box: Box | None
    source_bytes: int
    mtime_ns: int
    sha256: str
    shard: int
    offset: int
    length: int
    crc32: int
    full_size: tuple[int, int] | None

    @property
    def key(self) -> tuple[str, Box | None]:
        """Key by which a later row replaces an earlier one."""
        return self.id, self.box

    @property
    def stamp(self) -> tuple[int, int]:
        """Size and time of change of the source."""
        return self.source_bytes, self.mtime_ns


class ResizedImages:
    """The copies that stand for a dataset's images, ready to be read; use `open`.

    Attributes:
        missing: number of samples without a copy.
        changed: number of samples whose file is not the one that was copied.
    """

    def __init__(self, folder: Path, settings: Settings | None, rows: dict[Path, Stored], counts: Counter[str]) -> None:
        self.folder, self.settings, self._rows = folder, settings, rows
        self.found, self.missing, self.changed = counts["found"], counts["missing"], counts["changed"]

    @classmethod
    def open(cls, folder: Path, samples: Sequence[Sample], *, box_crop: bool, image_size_px: int) -> ResizedImages:
        """Look up the copies of some samples.

        Args:
            folder: where they are.
            samples: their images; each file is asked for its size and time.
            box_crop: the samples are cut to their boxes.
            image_size_px: side of the square that the model takes.

        Raises:
            DataError: the copies are too small for the model, or are not ours.
        """
        settings = read_settings(folder)
        if settings is not None and settings.shorter_side_px < image_size_px:
            raise DataError(
                f"data.materialised = {folder} holds images with a shorter side of {settings.shorter_side_px} px, the model "
                f"takes {image_size_px} px: choose another folder, set data.materialised_px={-(-image_size_px * 8 // 7)} and "
                "run `flyp-saflex data RECIPE --materialise`"
            )
        known = {row.key: row for row in read_index(folder)} if settings is not None else {}
        rows, counts = {}, Counter[str]()
        for sample, found in zip(samples, stamps(sample.path for sample in samples), strict=True):
            row = known.get(key_of(sample, box_crop=box_crop))
            state = "missing" if row is None else "found" if row.stamp == found else "changed"
            counts[state] += 1
            if row is not None and state == "found":
                rows[sample.path] = row
        return cls(folder, settings, rows, counts)

    def note(self) -> str:
        """Return one line on how much of the dataset is read from here."""
        total = self.found + self.missing + self.changed
        size = f" (shorter side {self.settings.shorter_side_px} px)" if self.settings is not None else ""
        line = f"{self.found} of {total} images are read from {self.folder}{size}"
        if self.found == total:
            return line
        return (
            f"{line}; of the others {self.missing} have no copy and {self.changed} changed since: their files are read, "
            "`flyp-saflex data RECIPE --materialise` adds them"
        )

    def picture(self, path: Path, box: Box | None) -> Picture | None:
        """Return the copy of an image, in the coordinates of its source; None if there is none.

        Raises:
            DataError: the copy is damaged.
        """
        row = self._rows.get(path)
        if row is None or row.box != box:
            return None
        data = self._read(row, path)
        if row.full_size is None:
            return decode_picture(io.BytesIO(data), path)
        pixels = decode_picture(io.BytesIO(data), path).pixels
        return Picture(pixels, row.full_size, (0, 0, *pixels.size))

    def key(self, path: Path) -> str:
        """Return a hash of the source and of how its copy was made; empty if there is none."""
        row = self._rows.get(path)
        if row is None or self.settings is None:
            return ""
        made = "" if row.full_size is None else f"-{self.settings.shorter_side_px}px-q{self.settings.jpeg_quality}"
        return row.sha256 + made

    def _read(self, row: Stored, path: Path) -> bytes:
        shard = self.folder / shard_name(row.shard)
        try:
            with open(shard, "rb", buffering=0) as file:  # opened anew: a shared position would be shared with forks
                file.seek(row.offset)
                data = file.read(row.length)
        except OSError as error:
            raise DataError(f"{shard} cannot be read: {error.strerror}; the copy of {path} is in it") from None
        if zlib.crc32(data) != row.crc32:
            raise DataError(
                f"{shard}: the copy of {path} is damaged (bytes {row.offset} to {row.offset + row.length}); remove the folder "
                "and run `flyp-saflex data RECIPE --materialise` again"
            )
        return data


def key_of(sample: Sample, *, box_crop: bool) -> tuple[str, Box | None]:
    """Return the key of a sample's copy; a file name that is no UTF-8 is spelt out."""
    name = sample.sample_id.encode("utf-8", "backslashreplace").decode()
    return name, sample.box if box_crop else None


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05}.bin"


def stamps(paths: Iterable[Path]) -> Iterator[tuple[int, int] | None]:
    """Yield size and time of change of each file, None for missing ones; in parallel, for network drives."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        paths = list(paths)
        parts = (paths[start : start + 1000] for start in range(0, len(paths), 1000))
        for found in pool.map(lambda part: [_stamp(path) for path in part], parts):
            yield from found


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def read_settings(folder: Path) -> Settings | None:
    """Return how the copies in a folder were made, None if there are none.

    Raises:
        DataError: the file is not one of ours.
    """
    path = folder / SETTINGS
    try:
        return msgspec.json.decode(path.read_bytes(), type=Settings)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path} cannot be used ({error}): remove the folder or set another data.materialised") from None


def read_index(folder: Path) -> list[Stored]:
    """Return the whole rows of the index; a kill may have cut off the last one.

    Raises:
        DataError: a row that is no row of ours.
    """
    path, rows = folder / INDEX, []
    decoder = msgspec.json.Decoder(Stored)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise DataError(f"{path} line {number}: {error}; remove the folder and materialise again") from None
    return rows
