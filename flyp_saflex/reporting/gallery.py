"""Gallery of SAFLEX's decisions: rows of augmented.jsonl, with pictures as data URIs.

The images are drawn by a hash of their names: the choice is blind, and a second report shows the same ones. Images are read
from the paths in the run's configuration. Where they are missing (another machine, a deleted cache), decisions are shown
without pictures.
"""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from flyp_saflex.config import DataConfig
from flyp_saflex.errors import DataError, UserError
from flyp_saflex.images.decode import Place, formats, open_image
from flyp_saflex.records import Edit, Sample
from flyp_saflex.reporting.runs import Run
from flyp_saflex.storage.augment_cache import AugmentCache

Fate = Literal["kept", "relabelled", "dropped"]
FATES: dict[Fate, str] = {
    "kept": "Kept, label unchanged",
    "relabelled": "Kept, relabelled",
    "dropped": "Dropped",
}
PER_FATE = 8
SIZE_PX = 144
"""Longest side of a thumbnail; smaller images stay as they are."""


@dataclass
class Decision:
    """SAFLEX's last decision about one augmented image.

    Attributes:
        identity: aug_id, or sample_id where training images themselves are augmented.
        label: its upstream label, a class index.
        weight: learned weight; 0: dropped.
        soft_labels: (class index or None, share in 0..1), the largest share first; None: a caption that names no class.
        visits: number of training steps that decided about it.
        times_kept: number of those with a weight above 0.
        instruction: text that made the edit.
        source: thumbnail of the source as a data URI; the empty string without one.
        edit: thumbnail of the augmented image as a data URI; the empty string without one.
    """

    identity: str
    label: int
    weight: float
    soft_labels: list[tuple[int | None, float]]
    visits: int = 0
    times_kept: int = 0
    instruction: str = ""
    source: str = ""
    edit: str = ""

    @property
    def fate(self) -> Fate:
        """Group of the image; a caption that names no class is the image's own, so it counts as `kept`."""
        if self.weight <= 0:
            return "dropped"
        top = self.soft_labels[0][0] if self.soft_labels else self.label
        return "kept" if top in (self.label, None) else "relabelled"


@dataclass
class Gallery:
    """Decisions of one run, and the images to show.

    Attributes:
        run: the run.
        counts: number of images per group.
        shown: the decisions to show per group, a bounded number.
        remarks: reasons for missing pictures.
        repeated: whether random operations change the images at every step, so that no file shows exactly the images seen.
    """

    run: Run
    counts: dict[Fate, int]
    shown: dict[Fate, list[Decision]]
    remarks: list[str] = field(default_factory=list)
    repeated: bool = False


def gallery(run: Run, *, per_fate: int = PER_FATE) -> Gallery | None:
    """Return the gallery of a run; None if the run learned no weights, or did not log them."""
    if run.config is not None and not run.config.saflex.enabled:
        return None
    decisions = last_decisions(run.decisions())
    if not decisions:
        return None
    groups: dict[Fate, list[Decision]] = {fate: [] for fate in FATES}
    for decision in decisions:
        groups[decision.fate].append(decision)
    shown = {fate: sorted(group, key=_draw)[:per_fate] for fate, group in groups.items()}
    made = Gallery(run, {fate: len(group) for fate, group in groups.items()}, shown)
    if run.config is None:
        made.remarks.append("config.toml cannot be read, so it is not known where the images are.")
    else:
        upstream = run.config.augment.upstream
        made.repeated = any(name != "cache" for name in upstream)
        _add_pictures(made, run.config.data, run.seed)
    return made


def last_decisions(rows: Iterable[Mapping[str, Any]]) -> list[Decision]:
    """Return the last decision about every image, ordered by first visit; rows without a learned label are no decisions."""
    found: dict[str, Decision] = {}
    for row in rows:
        if not {"id", "label", "weight", "learned_label"} <= row.keys():
            continue
        top = row["learned_label"]
        soft = [(label, float(share)) for label, share in row.get("soft_labels", ())] or [(top, 1.0)]
        before = found.get(row["id"])
        now = Decision(str(row["id"]), int(row["label"]), float(row["weight"]), soft)
        now.visits = (before.visits if before else 0) + 1
        now.times_kept = (before.times_kept if before else 0) + (now.weight > 0)
        found[row["id"]] = now
    return list(found.values())


def thumbnail(path: Place, size_px: int = SIZE_PX) -> str:
    """Return a small WebP of an image as a data URI; the empty string if the image cannot be read."""
    try:
        with warnings.catch_warnings(), open_image(path) as file, Image.open(file, formats=formats()) as image:
            warnings.simplefilter("ignore")  # odd metadata is no reason to have no picture
            image.draft("RGB", (2 * size_px, 2 * size_px))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((size_px, size_px))
            buffer = io.BytesIO()
            small.save(buffer, format="WEBP", quality=80)
    except (DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _draw(decision: Decision) -> str:
    return hashlib.sha256(decision.identity.encode("utf-8", "surrogateescape")).hexdigest()


def _add_pictures(made: Gallery, data: DataConfig, seed: int) -> None:
    """Fill in instructions and thumbnails of the shown decisions, as far as the files exist."""
    chosen = [decision for group in made.shown.values() for decision in group]
    edits = _edits(made)
    samples = _samples(made, data, seed)
    for decision in chosen:
        edit = edits.get(decision.identity)
        source = samples.get(edit.source_id if edit else decision.identity)
        decision.instruction = edit.instruction if edit else ""
        decision.edit = thumbnail(edit.path) if edit else ""
        decision.source = thumbnail(source.image) if source and not isinstance(source.item, int) else ""
    without = sum(not (decision.source or decision.edit) for decision in chosen)
    if without and not made.remarks:
        made.remarks.append(f"{without} of {len(chosen)} images cannot be read any more; only their decisions are shown.")


def _edits(made: Gallery) -> dict[str, Edit]:
    config, path = made.run.config, made.run.path
    assert config is not None, "the caller looks"
    if "cache" not in config.augment.upstream:
        return {}
    try:
        root = resolve(config.cache.root, path)
        return {edit.aug_id: edit for edit in AugmentCache.open(root, config.data.name, config.cache.key).edits}
    except (UserError, OSError) as error:
        made.remarks.append(f"The augment cache cannot be read, so the edits are not shown: {error}")
        return {}


def _samples(made: Gallery, data: DataConfig, seed: int) -> dict[str, Sample]:
    from flyp_saflex.data.registry import load_dataset

    run = made.run.path
    there = replace(
        data, root=resolve(data.root, run), prompts=resolve(data.prompts, run), table=data.table and resolve(data.table, run)
    )
    try:
        dataset = load_dataset(there, seed=seed, check_files=False)
    except (UserError, OSError) as error:
        made.remarks.append(f"The dataset cannot be read, so the source images are not shown: {error}")
        return {}
    return {sample.sample_id: sample for split in dataset.splits.values() for sample in split.samples}


def resolve(path: str, run: Path) -> str:
    """Return a path of a run's configuration as it is read from the current folder.

    A relative path starts at the folder where training was started. If it does not exist from the current folder, the parents
    of the run's folder are tried, the nearest first.
    """
    if not path or Path(path).is_absolute() or Path(path).exists():
        return path
    return next((str(above / path) for above in run.resolve().parents if (above / path).exists()), path)
