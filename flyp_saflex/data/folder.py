"""Images in folders: `root/<domain>/<class>/*`, `root/<split>/<class>/*` or `root/<class>/*`.

With `data.train_domains` the folders are domains; with a folder called `train` (of folders) they are splits; otherwise they
are classes of one domain. Every file is counted as used or as left out for a reason.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.class_names import class_list
from flyp_saflex.data.class_prompts import Prompts
from flyp_saflex.data.listing import Folder
from flyp_saflex.data.splitting import (
    EVAL_NAMES,
    SELECT_NAMES,
    TEST_NAMES,
    canonical_split,
    check_domain_names,
    folded,
    hold_out,
    in_reporting_order,
    role_and_shift,
    split_notes,
)
from flyp_saflex.data.text import listed, nfc_all, shown, spelt
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Dataset, Sample, Split


def read_folder(config: DataConfig) -> Dataset:
    """Read a folder of images.

    Raises:
        DataError: the folder is missing or empty, a named domain is not there, or a class of another split has no
            training folder.
    """
    root = Folder.at(existing_root(config))
    folders = list(root.folders.values())
    names = list(root.folders)
    if config.train_domains or config.select_domains or config.test_domains:
        return _read_domains(config, root)
    train = [folder for folder in folders if canonical_split(folder.name) == "train"]
    if train and all(folder.num_nested >= len(folder.images) for folder in train):
        return _read_splits(config, root)
    if train and any(folded(name) in (*SELECT_NAMES, *TEST_NAMES, *EVAL_NAMES) for name in names):
        raise DataError(
            f"data.root = {root}: {train[0]} holds images without class folders; expected root/<split>/<class>/*.jpg, "
            'or a table (data.name = "table") that says which class an image has'
        )
    direct, nested = sum(len(folder.images) for folder in folders), sum(folder.num_nested for folder in folders)
    if direct and (direct >= nested or not _alike_inside(folders)):
        return _read_classes(config, root)
    if nested:
        strays = f" ({direct} images lie directly below them)" if direct else ""
        raise DataError(
            f"data.root = {root}: found folders of folders ({listed(names)}){strays}, but none is called 'train'; if they are "
            f'domains set data.train_domains=["{names[0]}"] and data.test_domains, if they are splits call one of them train'
        )
    raise DataError(
        f"data.root = {root}: no image found (folders: {listed(names) or 'none'}{_left_out(root)}); expected "
        "root/<domain>/<class>/*.jpg, root/<split>/<class>/*.jpg with a split called train, or root/<class>/*.jpg"
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


def _read_domains(config: DataConfig, root: Folder) -> Dataset:
    folders = root.folders
    if not config.train_domains:
        raise DataError(f"data.train_domains is empty, but select or test domains are named; choose from {listed(list(folders))}")
    lists = {"train": config.train_domains, "select": config.select_domains, "test": config.test_domains}
    roles: dict[str, str] = {}
    for role, domains in lists.items():
        for domain in nfc_all(domains):
            if domain not in folders:
                raise DataError(
                    f"data.{role}_domains: no folder '{domain}' in {root}{nearest(domain, folders)} "
                    f"(found: {listed(list(folders))})"
                )
            if domain in roles:
                raise DataError(
                    f"data.{role}_domains: '{domain}' is already in data.{roles[domain]}_domains; a domain has one role"
                )
            if role != "train":
                check_domain_names(f"data.{role}_domains", domain, fix="rename the folder")
            roles[domain] = role
    found = {name for domain, role in roles.items() if role == "train" for name in folders[domain].folders}
    keys, prompts = class_list(config, sorted(found))
    account = Account(f"files in {root}")
    pools = {domain: _samples(root, folders[domain], keys, domain, account, "domain") for domain in roles}
    train = [sample for domain, role in roles.items() if role == "train" for sample in pools[domain]]
    _check_trained(train, prompts, account)
    splits = _held_out(train, config, prompts)
    for domain, role in roles.items():
        if role != "train":
            splits.append(Split(name=domain, role=role, shift="ood", samples=tuple(pools[domain])))  # type: ignore[arg-type]
    root.leave_out(account, "images beside the domain folders", deep=False)
    notes = []
    if unused := [name for name in folders if name not in roles]:
        notes.append(f"folders in {root} that no data.*_domains names, left out: {listed(unused)}")
        for name in unused:
            folders[name].leave_out(account, "images of domains that no data.*_domains names")
    return _dataset(root, prompts, splits, notes, account)


def _read_splits(config: DataConfig, root: Folder) -> Dataset:
    account = Account(f"files in {root}")
    root.leave_out(account, "images beside the split folders", deep=False)
    train = next(folder for folder in root.folders.values() if canonical_split(folder.name) == "train")
    keys, prompts = class_list(config, list(train.folders))
    names = [name for name, folder in root.folders.items() if _is_split(folder)]
    notes = split_notes(names)
    if others := [name for name in root.folders if name not in names]:
        notes.append(f"folders in {root} without an image are taken for no split: {listed(others)}")
    splits = []
    for name, folder in root.folders.items():
        if name not in names:
            folder.leave_out(account, "images")  # it has none: only its other files are counted
            continue
        role, shift = role_and_shift(name, names)
        samples = _samples(root, folder, keys, name if shift == "ood" else "", account, "split")
        if role == "train":
            _check_trained(samples, prompts, account)
        splits.append(Split(name=canonical_split(name), role=role, shift=shift, samples=tuple(samples)))
    return _dataset(root, prompts, splits, notes, account)


def _read_classes(config: DataConfig, root: Folder) -> Dataset:
    keys, prompts = class_list(config, list(root.folders))
    account = Account(f"files in {root}")
    samples = _samples(root, root, keys, "", account, "folder")
    _check_trained(samples, prompts, account)
    return _dataset(root, prompts, _held_out(samples, config, prompts), [], account)


def _held_out(samples: list[Sample], config: DataConfig, prompts: Prompts) -> list[Split]:
    splits = hold_out(
        samples,
        select_fraction=config.select_fraction,
        select_per_class=config.select_per_class,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        name_of=prompts.class_names.__getitem__,
    )
    return list(splits.values())


def _dataset(root: Folder, prompts: Prompts, splits: list[Split], notes: list[str], account: Account) -> Dataset:
    """Return the dataset with the sum of its files."""
    below = [folder for above in root.folders.values() for folder in (above, *above.folders.values())]
    if twins := sorted({folder.name for folder in below if len(folder.paths) > 1}):
        notes.append(f"folders whose names differ in their Unicode form only are one: {listed(twins)}")
    return Dataset(
        name="folder",
        root=root.paths[0],
        class_names=prompts.class_names,
        splits=in_reporting_order(splits),
        templates=prompts.templates,
        notes=(*notes, account.note(sum(len(split) for split in splits))),
    )


def _check_trained(samples: Sequence[Sample], prompts: Prompts, account: Account) -> None:
    """Refuse a class without training images here where files that were left out may be why; the registry refuses the others.

    Raises:
        DataError: there is such a class.
    """
    trained = {sample.label for sample in samples}
    absent = [f"'{name}'" for label, name in enumerate(prompts.class_names) if label not in trained]
    if absent and account.left_out:
        raise DataError(
            f"dataset 'folder': {len(absent)} of {len(prompts.class_names)} classes have no training image "
            f"({listed(absent, 5)}); of {account.found} files were left out: {account.reasons()}; add images, or remove the class"
        )


def _samples(root: Folder, folder: Folder, keys: Sequence[str], domain: str, account: Account, what: str) -> list[Sample]:
    """Return the images of `folder/<class>/**` in the order of their paths; `what` names the folder in messages.

    Raises:
        DataError: a class without training folder, images but no class folder, or a name that is not UTF-8.
    """
    labels = {key: index for index, key in enumerate(keys)}
    start = len(str(root.paths[0]).rstrip(os.sep)) + 1
    samples: list[Sample] = []
    for name, below in folder.folders.items():
        _check_utf8(below)
        images = list(below.every_image(account))
        if name not in labels and images:
            raise DataError(
                f"{below} holds {len(images)} images of the class '{shown(name)}', which has no folder in the training "
                f"part{nearest(name, keys)}; add training images of it, rename the folder, or remove it"
            )
        for path in images:
            sample_id = spelt(str(path)[start:].replace(os.sep, "/"))
            samples.append(Sample(sample_id=sample_id, item=path, label=labels[name], domain=domain))
    if folder.images and not samples:
        raise DataError(
            f"{what} '{folder.name}' in {root} holds {len(folder.images)} images without class folders; "
            f"expected {folder.name}/<class>/*.jpg, or data.name = table and a table that says which class an image has"
        )
    folder.leave_out(account, "images beside the class folders", deep=False)
    return samples


def _check_utf8(folder: Folder) -> None:
    if spelt(folder.name) != folder.name:
        raise DataError(f"the name of the folder {folder} is not UTF-8, so it can be no class; rename it")


def _is_split(folder: Folder) -> bool:
    """Return whether a folder beside `train` is a split: it has a split's name or an image."""
    known = role_and_shift(folder.name, ())[1] == "id" or folded(folder.name).startswith("ood_")
    return known or next(folder.every_image(Account("files")), None) is not None


def _alike_inside(folders: Sequence[Folder]) -> bool:
    """Return whether folders hold folders of the same names, as domains hold the same classes; one folder does."""
    counts = Counter(name for folder in folders for name, below in folder.folders.items() if below.images)
    return len(folders) == 1 or max(counts.values(), default=0) > 1


def _left_out(root: Folder) -> str:
    account = Account("files")
    for folder in (root, *root.folders.values()):
        folder.leave_out(account, "images without a class folder", deep=False)
    return f"; left out: {account.reasons()}" if account.left_out else ""
