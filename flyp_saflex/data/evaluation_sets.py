"""Datasets for evaluation only: ImageNet's shifts, and any folder of class folders.

An ImageNet folder has a subfolder per class, named by WordNet id, or by index as ImageNet-V2's are; the class subset of
ImageNet-R and ImageNet-A is that of the papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flyp_saflex.clip.imagenet import imagenet_classes
from flyp_saflex.config import DataConfig
from flyp_saflex.data.account import Account
from flyp_saflex.data.class_names import class_list
from flyp_saflex.data.class_prompts import load_prompts
from flyp_saflex.data.folder import existing_root
from flyp_saflex.data.listing import Folder
from flyp_saflex.data.text import listed, spelt
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Dataset, Sample, Shift, Split


@dataclass(frozen=True, kw_only=True)
class ImageNetSet:
    """Reader of ImageNet's validation set or one of its shifts, as unpacked from its archive.

    Attributes:
        name: value of `data.name`.
        subset: key of `clip.imagenet.LISTS`.
        shift: whether it is a shift of ImageNet.
    """

    name: str
    subset: str = "imagenet"
    shift: Shift = "ood"

    def __call__(self, config: DataConfig) -> Dataset:
        """Read the folder; every image is of the split `test`.

        Raises:
            DataError: a folder that is no class of the subset, or a class without images.
        """
        root = Folder.at(existing_root(config, f"the unpacked {self.name}: a folder per class, named by WordNet id"))
        classes = imagenet_classes(self.subset)
        by_index = {str(index): wnid for index, wnid in enumerate(imagenet_classes())}
        filled = [name for name, folder in root.folders.items() if folder.images or folder.folders]
        if filled and all(name in by_index for name in filled):
            keys = {name: by_index[name] for name in filled}
        else:
            keys = {name: name for name in filled}
        if unknown := [name for name, wnid in keys.items() if wnid not in classes]:
            raise DataError(
                f"data.root = {config.root}: the folder '{unknown[0]}' is no class of {self.name} (one of {len(unknown)}; it has "
                f"{len(classes)} classes){nearest(unknown[0], classes)}; expected folders named by "
                "WordNet id, as n01440764, or by index"
            )
        if missing := [wnid for wnid in classes if wnid not in set(keys.values())]:
            raise DataError(
                f"data.root = {config.root}: {len(missing)} of {len(classes)} classes of {self.name} have no folder "
                f"({listed(missing, 3)}); unpack the archive again, or name the folder that holds the class folders"
            )
        label_of = {wnid: label for label, wnid in enumerate(classes)}
        labels = {name: label_of[wnid] for name, wnid in keys.items()}
        templates = load_prompts("default").templates
        return _test_set(self.name, root, labels, tuple(classes.values()), templates, self.shift)


def read_class_folders(config: DataConfig) -> Dataset:
    """Read `root/<class>/*`; every image is of the split `test`, and the folders name the classes.

    Raises:
        DataError: there is no folder with images.
    """
    root = Folder.at(existing_root(config))
    names = [name for name, folder in root.folders.items() if next(folder.every_image(Account("files")), None) is not None]
    if not names:
        raise DataError(f"data.root = {config.root}: no class folder with images; expected root/<class>/*.jpg")
    keys, prompts = class_list(config, names)
    labels = {key: label for label, key in enumerate(keys)}
    return _test_set("class-folders", root, labels, prompts.class_names, prompts.templates, "ood")


def _test_set(
    name: str, root: Folder, labels: Mapping[str, int], class_names: tuple[str, ...], templates: tuple[str, ...], shift: Shift
) -> Dataset:
    account = Account(f"files in {root}")
    base = root.paths[0]
    samples = [
        Sample(sample_id=spelt(Path(path).relative_to(base).as_posix()), item=path, label=labels[key])
        for key, folder in root.folders.items()
        if key in labels
        for path in folder.every_image(account)
    ]
    root.leave_out(account, "images beside the class folders", deep=False)
    split = Split(name="test", role="test", shift=shift, samples=tuple(samples))
    return Dataset(
        name=name,
        root=base,
        class_names=class_names,
        splits={"test": split},
        templates=templates,
        notes=(account.note(len(samples)),),
    )


IMAGENET_VAL = ImageNetSet(name="imagenet-val", shift="id")
IMAGENET_V2 = ImageNetSet(name="imagenet-v2")
IMAGENET_SKETCH = ImageNetSet(name="imagenet-sketch")
IMAGENET_R = ImageNetSet(name="imagenet-r", subset="r")
IMAGENET_A = ImageNetSet(name="imagenet-a", subset="a")
