"""Gallery of SAFLEX's decisions: rows of augmented.jsonl, with pictures as data URIs.

The images are drawn by a hash of their names: the choice is blind, and a second report shows the same ones. Images are read
from the paths in the run's configuration. Where they are missing (another machine, a deleted cache), decisions are shown
without pictures.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flyp_saflex.errors import UserError
from flyp_saflex.records import Edit
from flyp_saflex.reporting.pictures import NO_CONFIG, resolve, sample_thumbnail, samples_of, thumbnail
from flyp_saflex.reporting.runs import Run
from flyp_saflex.storage.augment_cache import AugmentCache

Fate = Literal["kept", "relabelled", "dropped"]
FATES: dict[Fate, str] = {
    "kept": "Kept, label unchanged",
    "relabelled": "Kept, relabelled",
    "dropped": "Dropped",
}
PER_FATE = 8


@dataclass
class Decision:
    """SAFLEX's last decision about one augmented image.

    Attributes:
        identity: aug_id, or sample_id where training images themselves are augmented.
        label: its upstream label, a class index.
        weight: learned weight; 0: dropped.
        soft_labels: (class index or None, share in 0..1), the largest share first; None: a caption that names no class.
        gain: gain of its upstream label at the last visit; None where the run takes no gains, NaN where it was not finite.
        gains: finite gains of all visits.
        own_posterior: probability, from evidence before training, that it shows its upstream label; None without evidence.
        none_posterior: probability that it shows none of the classes.
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
    gain: float | None = None
    gains: list[float] = field(default_factory=list)
    own_posterior: float | None = None
    none_posterior: float | None = None
    visits: int = 0
    times_kept: int = 0
    instruction: str = ""
    source: str = ""
    edit: str = ""

    @property
    def mean_gain(self) -> float | None:
        """Mean gain of its upstream label over its visits; None without a finite one."""
        return sum(self.gains) / len(self.gains) if self.gains else None

    @property
    def fate(self) -> Fate:
        """Group of the image; a caption that names no class is the image's own, so it counts as `kept`."""
        if self.weight <= 0:
            return "dropped"
        top = self.soft_labels[0][0] if self.soft_labels else self.label
        return "kept" if top in (self.label, None) else "relabelled"


@dataclass(frozen=True)
class Share:
    """Fate of the edits of one instruction, or of one class.

    Attributes:
        name: the instruction, or the class index.
        n: number of edits.
        kept: share of them with a weight above 0 at their last visit.
        relabelled: share of them that another class has, and that are kept.
        mean_gain: mean over edits of the mean gain of their upstream label; None without gains.
    """

    name: str | int
    n: int
    kept: float
    relabelled: float
    mean_gain: float | None


@dataclass
class Gallery:
    """Decisions of one run, and the images to show.

    Attributes:
        run: the run.
        counts: number of images per group.
        shown: the decisions to show per group, a bounded number.
        by_class: shares of all decisions by upstream label.
        by_instruction: the same by instruction; empty where the augment cache cannot be read.
        remarks: reasons for missing pictures.
        repeated: whether random operations change the images at every step, so that no file shows exactly the images seen.
    """

    run: Run
    counts: dict[Fate, int]
    shown: dict[Fate, list[Decision]]
    by_class: list[Share]
    by_instruction: list[Share] = field(default_factory=list)
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
    counts = {fate: len(group) for fate, group in groups.items()}
    made = Gallery(run, counts, shown, shares(decisions, lambda decision: decision.label))
    if run.config is None:
        made.remarks.append(NO_CONFIG)
    else:
        made.repeated = any(name != "cache" for name in run.config.augment.upstream)
        edits = _edits(made)
        for decision in decisions:
            edit = edits.get(decision.identity)
            decision.instruction = edit.instruction if edit else ""
        made.by_instruction = shares([one for one in decisions if one.instruction], lambda decision: decision.instruction)
        _add_pictures(made, edits)
    return made


def shares(decisions: Sequence[Decision], key: Callable[[Decision], str | int]) -> list[Share]:
    """Return what became of the decisions, by a key of theirs; the key with the most decisions first."""
    groups: dict[str | int, list[Decision]] = {}
    for decision in decisions:
        groups.setdefault(key(decision), []).append(decision)
    made = []
    for name, group in sorted(groups.items(), key=lambda item: (-len(item[1]), str(item[0]))):
        fates = [decision.fate for decision in group]
        gains = [gain for decision in group if (gain := decision.mean_gain) is not None]
        kept, moved = ((len(fates) - fates.count("dropped")), fates.count("relabelled"))
        mean = sum(gains) / len(gains) if gains else None
        made.append(Share(name, len(group), kept / len(group), moved / len(group), mean))
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
        now.gains = before.gains if before else []
        if "gain" in row:
            now.gain = _number(row["gain"])
            now.gains += [now.gain] if math.isfinite(now.gain) else []
        if "posterior" in row:
            now.own_posterior, now.none_posterior = (_number(part) for part in row["posterior"])
        now.visits = (before.visits if before else 0) + 1
        now.times_kept = (before.times_kept if before else 0) + (now.weight > 0)
        found[row["id"]] = now
    return list(found.values())


def _draw(decision: Decision) -> str:
    return hashlib.sha256(decision.identity.encode("utf-8", "surrogateescape")).hexdigest()


def _number(value: Any) -> float:
    """Return a logged number; NaN for the null that stands for a number that was not finite."""
    return float("nan") if value is None else float(value)


def _add_pictures(made: Gallery, edits: Mapping[str, Edit]) -> None:
    """Fill in thumbnails of the shown decisions, as far as the files exist."""
    chosen = [decision for group in made.shown.values() for decision in group]
    samples, remark = samples_of(made.run)
    if remark:
        made.remarks.append(remark)
    for decision in chosen:
        edit = edits.get(decision.identity)
        decision.edit = thumbnail(edit.path) if edit else ""
        decision.source = sample_thumbnail(samples.get(edit.source_id if edit else decision.identity))
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
