"""Folders of a dataset as they lie on disk: images, subfolders, and everything left out with the reason.

Links are followed, but for those that lead into a folder above. Names that differ in their Unicode form only are one folder.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from flyp_saflex.data.account import Account
from flyp_saflex.data.text import nfc, shown
from flyp_saflex.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
        *(".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
HEIC_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
SIDECAR_FOLDERS = frozenset(
    (
        *("@eadir", "@tmp", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
        *("$recycle.bin", "recycler", "system volume information", "__macosx", "lost+found", "found.000", "__pycache__"),
    )
)
"""What NAS, operating systems and unpackers put beside images, in lower case."""
SIDECAR_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
THUMBNAIL_FOLDERS = frozenset(("thumbnails", "thumbnail", "thumbs", "thumb", "_thumbs", "_thumbnails"))
"""Left out where their files have the names of images in the folder above."""


@dataclass(frozen=True)
class Folder:
    """A folder, or several whose names are one in Unicode's composed form.

    Attributes:
        name: its name in composed form.
        paths: where it lies.
        above: real paths of the folders that hold it, itself included.
    """

    name: str
    paths: tuple[Path, ...]
    above: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def at(cls, path: Path) -> Folder:
        """Return the folder at a path."""
        real = Path(os.path.realpath(path))
        return cls(nfc(path.name), (path,), frozenset(map(str, (real, *real.parents))))

    def __str__(self) -> str:
        return shown(str(self.paths[0]), 300)

    @property
    def images(self) -> list[Path]:
        """Images directly inside, in the order of their names."""
        return self._listing.images

    @property
    def folders(self) -> dict[str, Folder]:
        """Subfolders by name, in the order of their names, sidecars left out."""
        return self._listing.folders

    @property
    def num_nested(self) -> int:
        """Number of images one level further down."""
        return sum(len(folder.images) for folder in self.folders.values())

    def every_image(self, account: Account) -> Iterator[Path]:
        """Yield all images below: of each folder its own, then those of its subfolders; count every file."""
        account.found += len(self.images)
        self._count_others(account)
        yield from self.images
        for folder in self.folders.values():
            yield from folder.every_image(account)

    def leave_out(self, account: Account, reason: str, *, deep: bool = True) -> None:
        """Count images as left out for a reason, and the other files for theirs.

        Args:
            account: where they are counted.
            reason: it reads behind a number: `images beside the class folders`.
            deep: those of subfolders, too.
        """
        account.leave_out(reason, len(self.images))
        self._count_others(account)
        if deep:
            for folder in self.folders.values():
                folder.leave_out(account, reason)

    def _count_others(self, account: Account) -> None:
        for reason, count in self._listing.others.items():
            account.leave_out(reason, count)

    @cached_property
    def _listing(self) -> _Listing:
        listing = _Listing()
        homes: dict[str, list[Path]] = {}
        for path in self.paths:
            try:
                with os.scandir(path) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        self._sort_in(entry, path, listing, homes)
            except OSError as error:
                raise DataError(f"folder {self} cannot be read: {error.strerror}; check its permissions") from None
        for name, paths in homes.items():
            reals = {os.path.realpath(path) for path in paths}
            listing.folders[name] = Folder(name, tuple(paths), self.above | reals)
        self._leave_thumbnails_out(listing)
        return listing

    def _sort_in(self, entry: os.DirEntry[str], path: Path, listing: _Listing, homes: dict[str, list[Path]]) -> None:
        name, lower = entry.name, entry.name.lower()
        suffix = os.path.splitext(lower)[1]
        if _is(entry.is_dir):
            if name.startswith("."):
                listing.others["files in hidden folders"] += _num_files(entry.path)
            elif lower in SIDECAR_FOLDERS:
                listing.others[f"files in {shown(name)} folders"] += _num_files(entry.path)
            elif os.path.realpath(entry.path) in self.above:
                listing.others["links to a folder above them"] += 1
            else:
                homes.setdefault(nfc(name), []).append(path / name)
        elif name.startswith("."):
            listing.others["hidden files"] += 1
        elif lower in SIDECAR_FILES:
            listing.others[f"{shown(name)} files"] += 1
        elif not _is(entry.is_file):
            listing.others["links to nothing" if entry.is_symlink() else "pipes, sockets or devices"] += 1
        elif suffix in IMAGE_SUFFIXES:
            listing.images.append(path / name)
        elif suffix in HEIC_SUFFIXES:
            listing.others["HEIC images: convert them, Pillow does not read HEIC"] += 1
        else:
            listing.others[f"{shown(suffix, 12)} files" if suffix else "files without an ending"] += 1

    @staticmethod
    def _leave_thumbnails_out(listing: _Listing) -> None:
        stems = {image.stem for image in listing.images}
        for name, folder in list(listing.folders.items()):
            if name.lower() in THUMBNAIL_FOLDERS and any(image.stem in stems for image in folder.images):
                del listing.folders[name]
                listing.others[f"files in {name} folders"] += sum(_num_files(path) for path in folder.paths)


@dataclass
class _Listing:
    """Entries of a folder."""

    images: list[Path] = field(default_factory=list)
    folders: dict[str, Folder] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)


def _is(test: Callable[[], bool]) -> bool:
    """Return what an entry says of itself; a link in a circle is nothing."""
    try:
        return test()
    except OSError:
        return False


def _num_files(folder: str | Path) -> int:
    """Return the number of files below a folder, links not followed."""
    return sum(len(files) for _, _, files in os.walk(folder))
