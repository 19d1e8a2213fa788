"""ImageNet's classes and subsets, from the lists that timm and open_clip ship."""

from __future__ import annotations

import pkgutil

LISTS = {"imagenet": "imagenet_synsets.txt", "r": "imagenet_r_synsets.txt", "a": "imagenet_a_synsets.txt"}
"""Files of timm with the WordNet ids of ImageNet-1k and of the classes of ImageNet-R and ImageNet-A."""


def imagenet_classes(subset: str = "imagenet") -> dict[str, str]:
    """Return CLIP's English class names by WordNet id, in ImageNet's order.

    Args:
        subset: key of `LISTS`.
    """
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    names = dict(zip(_ids("imagenet"), IMAGENET_CLASSNAMES, strict=True))
    chosen = set(_ids(subset))
    assert chosen <= set(names), f"{subset} has classes that ImageNet-1k has not"
    return {wnid: name for wnid, name in names.items() if wnid in chosen}


def _ids(subset: str) -> list[str]:
    data = pkgutil.get_data("timm.data", f"_info/{LISTS[subset]}")
    assert data is not None, f"timm has no {LISTS[subset]}"
    return data.decode().split()
