"""Edits corrupted on purpose, as cache entries whose truth is known.

Layout below a cache root, for the key of an entry:

    <dataset>/<key>/               the entry, as any other; `oracle.jsonl` in it keeps exactly what is clean
    truth/<dataset>/<key>.json     what became of each edit by `aug_id`, where training does not look
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flyp_saflex.storage.augment_cache import DONE, AugmentCache
from flyp_saflex.storage.augment_cache_files import state_settings
from flyp_saflex.storage.files import write_json

CLEAN = "clean"
ORACLE = "oracle.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEdit:
    """An edit, not drawn yet, whose truth is known.

    Attributes:
        file_name: below the entry, and the `aug_id`: `images/...`.
        source_id: `sample_id` of the picture that it is made from.
        label: class index that it comes with: its source's.
        instruction: the text that it pretends to follow.
        domain: the setting that it is put in.
        kind: `clean`, or how it was corrupted.
        true_label: class index of what it shows; None: no class of the dataset.
        draw: makes the picture.
    """

    file_name: str
    source_id: str
    label: int
    instruction: str
    domain: str
    kind: str
    true_label: int | None
    draw: Callable[[], Image.Image]


def draw_kind(rate: float, kinds: tuple[str, str], generator: np.random.Generator) -> str:
    """Draw whether and how an edit is corrupted: either kind with probability `rate` / 2.

    The generator moves on by the same two numbers at any rate. With a generator per edit, what is corrupted at a rate is
    corrupted in the same way at every higher one, so rates can be compared pairwise.
    """
    corrupted, first = generator.random() < rate, generator.random() < 0.5
    if not corrupted:
        return CLEAN
    return kinds[0] if first else kinds[1]


def truth_path(root: Path, dataset: str, key: str) -> Path:
    """Return the file with the truth about an entry."""
    return root / "truth" / dataset / f"{key}.json"


def read_truth(root: Path, dataset: str, key: str) -> dict[str, str]:
    """Return what became of each edit by `aug_id`: `clean`, or how it was corrupted."""
    return dict(json.loads(truth_path(root, dataset, key).read_text(encoding="utf-8")))


def write_entry(root: Path, dataset: str, key: str, edits: Sequence[KnownEdit], *, made_by: str, seed: int) -> Path:
    """Write the entry `<root>/<dataset>/<key>`, or what is missing of it, and its truth; return its folder.

    Args:
        root: `cache.root`.
        dataset: name of the dataset that the edits are made from.
        key: `cache.key`.
        edits: all of them, in the manifest's order; those that are there are not drawn again.
        made_by: what the manifest says of every edit, as its `kind`: `rendered`, `image operation` ...
        seed: that they were drawn with.

    Raises:
        DataError: the folder holds other edits, or cannot be written.
    """
    folder = root / dataset / key
    plan = [(edit.file_name, edit.source_id, edit.kind) for edit in edits]
    settings = {"kind": made_by, "seed": seed, "plan": hashlib.sha256(repr(plan).encode()).hexdigest()}
    state_settings(folder, settings, write=True)
    if (folder / DONE).is_file():
        return folder
    cache = AugmentCache.create(folder, dataset)
    for edit in edits:
        if edit.file_name not in cache:
            row = {"file_name": edit.file_name, "source_id": edit.source_id, "label": edit.label, "instruction": edit.instruction}
            cache.append(edit.draw(), row | {"domain": edit.domain, "kind": made_by, "seed": seed})
    scores = ({"aug_id": e.file_name, "keep": e.kind == CLEAN, "true_label": e.true_label} for e in edits)
    cache.write_scores(scores, ORACLE)
    truth = truth_path(root, dataset, key)
    truth.parent.mkdir(parents=True, exist_ok=True)
    write_json(truth, {edit.file_name: edit.kind for edit in edits})
    cache.finish()
    return folder
