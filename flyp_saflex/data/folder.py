"""Images in folders: `root/<domain>/<class>/*`, `root/<split>/<class>/*` or `root/<class>/*` (floor 2).

Which of the three it is follows from the recipe and the names: with `data.train_domains` the folders are domains; with a
folder called `train` (of folders) they are splits; otherwise they are classes of one domain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from flyp_saflex.config import DataConfig
from flyp_saflex.data.class_prompts import Prompts, load_prompts
from flyp_saflex.data.splitting import SELECT_NAMES, TEST_NAMES, hold_out, in_reporting_order, role_and_shift
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Dataset, Sample, Split

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"))


def read_folder(config: DataConfig) -> Dataset:
    """Read a folder of images.

    Raises:
        DataError: the folder is missing or empty, a named domain is not there, or a class of another split has no
            training folder.
    """
    root = existing_root(config)
    folders = _subfolders(root)
    if config.train_domains or config.select_domains or config.test_domains:
        return _read_domains(config, root, folders)
    if "train" in folders and not _has_images(root / "train", nested=False):
        return _read_splits(config, root, folders)
    if "train" in folders and any(name in (*SELECT_NAMES, *TEST_NAMES) for name in folders):
        raise DataError(
            f"data.root = {root}: {root / 'train'} holds images without class folders; expected root/<split>/<class>/*.jpg, "
            'or a table (data.name = "table") that says which class an image has'
        )
    if any(_has_images(root / name, nested=False) for name in folders):
        return _read_classes(config, root, folders)
    if any(_has_images(root / name, nested=True) for name in folders):
        raise DataError(
            f"data.root = {root}: found folders of folders ({_listed(folders)}), but none is called 'train'; if they are domains "
            f'set data.train_domains=["{folders[0]}"] and data.test_domains, if they are splits call one of them train'
        )
    raise DataError(
        f"data.root = {root}: no image found (folders: {_listed(folders) or 'none'}); expected root/<domain>/<class>/*.jpg, "
        "root/<split>/<class>/*.jpg with a split called train, or root/<class>/*.jpg"
    )


def existing_root(config: DataConfig, contents: str = "the folder of the images") -> Path:
    """Return `data.root` as an absolute path.

    Raises:
        DataError: it is empty, missing or no folder.
    """
    if not config.root:
        raise DataError(f"data.root is empty (data.name = {config.name}); --set data.root=PATH of {contents}")
    root = Path(config.root).expanduser().absolute()
    if not root.is_dir():
        found = "a file, not a folder" if root.exists() else "not there"
        raise DataError(f"data.root = {config.root} is {found}; --set data.root=PATH of {contents}")
    return root


def readable(name: str) -> str:
    """Turn a folder's name into words: `003.Sooty_Albatross` -> `Sooty Albatross`."""
    words = re.sub(r"[_\-]+", " ", re.sub(r"^\d+\.", "", name)).strip()
    return words or name


def class_list(config: DataConfig, keys: Sequence[str]) -> tuple[tuple[str, ...], Prompts]:
    """Return the class keys by index and the prompts, whose names belong to these keys.

    Without `classes.txt` the keys are those of the training data and their names are made readable. With it, the file
    decides which classes there are and in which order; a line's key (or, without a tab, its name) is matched with `keys`.

    Raises:
        DataError: a training class is missing in `classes.txt`.
    """
    prompts = load_prompts(config.prompts or "default")
    if not prompts.class_keys:
        keys = tuple(keys)
        names = tuple(readable(key) for key in keys)
        return keys, Prompts(class_names=names, class_keys=keys, templates=prompts.templates, folder=prompts.folder)
    by_words = {readable(key).casefold(): key for key in keys}
    known = tuple(key if key in keys else by_words.get(readable(key).casefold(), key) for key in prompts.class_keys)
    for key in keys:
        if key not in known:
            raise DataError(
                f"{prompts.folder / 'classes.txt'} has no line for the class '{key}'{nearest(key, prompts.class_keys)} "
                f"({len(known)} classes there); add a line '{key}<tab>its English name'"
            )
    return known, prompts


def _read_domains(config: DataConfig, root: Path, folders: list[str]) -> Dataset:
    if not config.train_domains:
        raise DataError(f"data.train_domains is empty, but select or test domains are named; choose from {_listed(folders)}")
    lists = {"train": config.train_domains, "select": config.select_domains, "test": config.test_domains}
    seen: dict[str, str] = {}
    for role, domains in lists.items():
        for domain in domains:
            if domain not in folders:
                raise DataError(
                    f"data.{role}_domains: no folder '{domain}' in {root}{nearest(domain, folders)} (found: {_listed(folders)})"
                )
            if domain in seen:
                raise DataError(
                    f"data.{role}_domains: '{domain}' is already in data.{seen[domain]}_domains; a domain has one role"
                )
            if role != "train" and domain in ("train", "id_val", "id_test"):
                raise DataError(f"data.{role}_domains: a domain called '{domain}' is taken for a split; rename the folder")
            seen[domain] = role
    found = {name for domain in config.train_domains for name in _subfolders(root / domain)}
    keys, prompts = class_list(config, sorted(found))
    notes: list[str] = []
    pools = {domain: _samples(root, root / domain, keys, domain, notes) for domain in seen}
    train = [sample for domain in config.train_domains for sample in pools[domain]]
    splits = list(
        hold_out(
            train,
            select_fraction=config.select_fraction,
            select_per_class=config.select_per_class,
            test_fraction=config.test_fraction,
            seed=config.split_seed,
            name_of=prompts.class_names.__getitem__,
        ).values()
    )
    for domain in config.select_domains:
        splits.append(Split(name=domain, role="select", shift="ood", samples=tuple(pools[domain])))
    for domain in config.test_domains:
        splits.append(Split(name=domain, role="test", shift="ood", samples=tuple(pools[domain])))
    if unused := [name for name in folders if name not in seen]:
        notes.append(f"folders in {root} that no data.*_domains names, left out: {_listed(unused)}")
    return _dataset(root, prompts, splits, notes)


def _read_splits(config: DataConfig, root: Path, folders: list[str]) -> Dataset:
    keys, prompts = class_list(config, _subfolders(root / "train"))
    notes: list[str] = []
    splits = []
    for name in folders:
        role, shift = role_and_shift(name, folders)
        samples = _samples(root, root / name, keys, name if shift == "ood" else "", notes)
        splits.append(Split(name=name, role=role, shift=shift, samples=tuple(samples)))
    return _dataset(root, prompts, splits, notes)


def _read_classes(config: DataConfig, root: Path, folders: list[str]) -> Dataset:
    keys, prompts = class_list(config, folders)
    notes: list[str] = []
    splits = hold_out(
        _samples(root, root, keys, "", notes),
        select_fraction=config.select_fraction,
        select_per_class=config.select_per_class,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        name_of=prompts.class_names.__getitem__,
    )
    return _dataset(root, prompts, list(splits.values()), notes)


def _dataset(root: Path, prompts: Prompts, splits: list[Split], notes: list[str]) -> Dataset:
    return Dataset(
        name="folder",
        root=root,
        class_names=prompts.class_names,
        splits=in_reporting_order(splits),
        templates=prompts.templates,
        notes=tuple(notes),
    )


def _samples(root: Path, folder: Path, keys: Sequence[str], domain: str, notes: list[str]) -> list[Sample]:
    """Return the images of `folder/<class>/**` in the order of their paths; other files are counted in a note."""
    labels = {key: index for index, key in enumerate(keys)}
    samples: list[Sample] = []
    others = 0
    for name in _subfolders(folder):
        paths = list(_files(folder / name))
        images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        others += len(paths) - len(images)
        if name not in labels:
            if not images:
                continue
            raise DataError(
                f"{folder / name} holds {len(images)} images of the class '{name}', which has no folder in the training "
                f"part{nearest(name, keys)}; add training images of it, rename the folder, or remove it"
            )
        for path in images:
            sample_id = path.relative_to(root).as_posix()
            samples.append(Sample(sample_id=sample_id, item=path, label=labels[name], domain=domain))
    if others:
        notes.append(f"{folder}: {others} files are no images (by their ending) and were left out")
    return samples


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}; check the path and its permissions") from None


def _files(folder: Path) -> Iterator[Path]:
    for current, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(current, name) for name in sorted(names) if not name.startswith("."))


def _has_images(folder: Path, *, nested: bool) -> bool:
    if nested:
        return any(_has_images(folder / name, nested=False) for name in _subfolders(folder))
    return any(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in os.listdir(folder))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
