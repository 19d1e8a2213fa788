"""CLIP task on classes of one's own, without images: its rows are noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flyp_saflex.clip.model import Clip
from flyp_saflex.config import Config
from flyp_saflex.records import Dataset
from flyp_saflex.tasks.clip_network import ClipNetwork
from flyp_saflex.tasks.clip_task import ClipTask


def made_up_task(clip: Clip, class_names: Sequence[str], templates: Sequence[str] = ("{}",)) -> ClipTask:
    """Return the task, everything trained; the caption of class k in template m is k * len(templates) + m."""
    dataset = Dataset(name="noise", root=Path(), class_names=tuple(class_names), splits={}, templates=tuple(templates))
    task = ClipTask(clip, ClipNetwork(clip.model), dataset, Config())
    task.begin_phase(only_head=False)
    return task
