"""Plan of all edits: source, text, seed and file name of each, made before any model is loaded.

    sample x level x text (all, or `texts_per_image` drawn by hash) x k  ->  text with the class name, seed, file name

Names, seeds and draws are SHA-256 hashes of sample, text and number: they depend on no other edit and on no machine. Levels
(of strength or image guidance) share the seed, and have names of their own.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, overload

import msgspec

from flyp_saflex.config import Config
from flyp_saflex.editing.adapters import named
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.prompting.edit_prompts import EditPrompts
from flyp_saflex.records import Dataset, Sample, labels_of, sample_ids_of
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.tables import EDITORS

LOOK = (
    "kind", "model", "revision", "steps", "guidance", "image_guidance", "strength", "negative_prompt", "scheduler", "size_px",
    "precision", "safety_checker",
)  # fmt: skip
"""Options of `editor` that decide how an edit looks, in the order of settings.json."""
LATER = ("preset", "controlnet", "strengths", "image_guidances", "lora", "quantisation", "tiling", "attention")
"""Further ones, stated only where they are set, so that entries of before keep their names."""
CHOICE = ("plan", "budget")
"""Options of the choice of edits, stated where they are set and no pilot or plan file takes their place."""
Cell = tuple[int, int, float | None]
"""Class index, number of the text, level."""


@dataclass(frozen=True, slots=True)
class Wording:
    """Domain and text (instruction or prompt) of an edit; the text has at most one `{}` for the class name."""

    domain: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEdit:
    """One edit to make.

    Attributes:
        sample: the source.
        text: instruction or prompt with the class name filled in.
        domain: target of the edit; empty if unknown.
        k: number of the edit among those of the same image and text, from 0.
        level: strength or image guidance; None: the editor's own.
        seed: seed of its noise.
        file_name: path relative to the cache entry; also its aug_id.
    """

    sample: Sample
    text: str
    domain: str
    k: int
    level: float | None = None
    seed: int
    file_name: str


class EditPlan(Sequence[PlannedEdit]):
    """All edits to make, held as columns; a `PlannedEdit` is made when it is asked for.

    Args:
        samples: the sources.
        wordings: the texts before the class name is filled in.
        seed: of the noise.

    Attributes:
        file_names: names of the edits in the cache entry, also their aug_ids.
        sources: places of their sources in `samples`.
    """

    def __init__(self, samples: Sequence[Sample], wordings: Sequence[Wording], seed: int) -> None:
        self.samples, self.wordings, self.seed = samples, wordings, seed
        self.file_names: list[str] = []
        self.sources = array("q")
        self._texts: list[str] = []
        self._numbers = array("q")
        self._ks = array("q")
        self._levels: list[float | None] = []

    def add(self, source: int, number: int, text: str, k: int, file_name: str, level: float | None = None) -> None:
        """Add edit `k` of a source at a level, with the wording of this number, whose text is given."""
        self.file_names.append(file_name)
        self.sources.append(source)
        self._texts.append(text)
        self._numbers.append(number)
        self._ks.append(k)
        self._levels.append(level)

    def __len__(self) -> int:
        return len(self.file_names)

    @overload
    def __getitem__(self, place: int) -> PlannedEdit: ...
    @overload
    def __getitem__(self, place: slice) -> list[PlannedEdit]: ...
    def __getitem__(self, place: int | slice) -> PlannedEdit | list[PlannedEdit]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        sample, text, k = self.samples[self.sources[place]], self._texts[place], self._ks[place]
        return PlannedEdit(
            sample=sample,
            text=text,
            domain=self.wordings[self._numbers[place]].domain,
            k=k,
            level=self._levels[place],
            seed=edit_seed(self.seed, sample.sample_id, text, k),
            file_name=self.file_names[place],
        )

    @property
    def num_sources(self) -> int:
        """Number of images that are edited."""
        return len(set(self.sources))

    def select(self, places: Iterable[int]) -> EditPlan:
        """Return the edits at these places, in this order."""
        chosen = EditPlan(self.samples, self.wordings, self.seed)
        for place in places:
            chosen.add(
                self.sources[place],
                self._numbers[place],
                self._texts[place],
                self._ks[place],
                self.file_names[place],
                self._levels[place],
            )
        return chosen

    def cells(self) -> list[Cell]:
        """Return class, text and level of every edit."""
        labels = labels_of(self.samples)
        rows = zip(self.sources, self._numbers, self._levels, strict=True)
        return [(labels[source], number, level) for source, number, level in rows]

    def named(self) -> list[tuple[str, str]]:
        """Return the name of every edit and the `sample_id` of its source."""
        sample_ids = sample_ids_of(self.samples)
        return [(name, sample_ids[source]) for name, source in zip(self.file_names, self.sources, strict=True)]


def edit_seed(seed: int, sample_id: str, text: str, k: int) -> int:
    """Return the seed of one edit's noise, 0 .. 2**63 - 1: a hash of the arguments."""
    return stable_hash(seed, sample_id, text, k) >> 1


def draw_wordings(wordings: Sequence[Wording], sample_id: str, *, seed: int, number: int) -> list[Wording]:
    """Draw `number` of the wordings for one image by hash, and return them in their order; 0: return all.

    A wording that is added to the file replaces another one in some draws and leaves all other draws unchanged.
    """
    if not 0 < number < len(wordings):
        return list(wordings)
    ranks = sorted((stable_hash(seed, sample_id, wording.text, -1), place) for place, wording in enumerate(wordings))
    return [wordings[place] for place in sorted(place for _, place in ranks[:number])]


def plan_edits(
    samples: Sequence[Sample],
    wordings: Sequence[Wording],
    class_names: Sequence[str],
    *,
    seed: int = 0,
    per_text: int = 1,
    texts_per_image: int = 0,
    suffix: str = ".png",
    levels: Sequence[float] = (),
) -> EditPlan:
    """Return all edits, image by image, so that each source is read once, and then level by level.

    Texts that are the same once the class name is filled in are one edit, of the first of them.

    Raises:
        DataError: a text has a `{}` but there is no name for the class.
    """
    plan = EditPlan(samples, wordings, seed)
    texts: dict[tuple[int, str], str] = {}
    number_of = {id(wording): number for number, wording in enumerate(wordings)}
    for source, (sample_id, label) in enumerate(zip(sample_ids_of(samples), labels_of(samples), strict=True)):
        drawn = draw_wordings(wordings, sample_id, seed=seed, number=texts_per_image)
        known: set[tuple[float | None, str]] = set()
        for level, wording in product(levels or (None,), drawn):
            if (label, wording.text) not in texts:
                texts[label, wording.text] = _text(wording, sample_id, label, class_names)
            text = texts[label, wording.text]
            if (level, text) in known:
                continue
            known.add((level, text))
            called = text if level is None else f"{text}\n{level:g}"
            for k in range(per_text):
                file_name = AugmentCache.file_name(sample_id, called, k, suffix)
                plan.add(source, number_of[id(wording)], text, k, file_name, level)
    return plan


def _text(wording: Wording, sample_id: str, label: int, class_names: Sequence[str]) -> str:
    if "{}" not in wording.text:
        return wording.text
    if not 0 <= label < len(class_names):
        raise DataError(
            f"the text '{wording.text}' needs the name of class {label} of '{sample_id}', but there are "
            f"{len(class_names)} class names; give class_names"
        )
    return wording.text.replace("{}", class_names[label])


def wordings_for(prompts: EditPrompts, kind: str) -> tuple[Wording, ...]:
    """Return the texts of the file for editors of the kind: its instructions or its prompts.

    Raises:
        DataError: an edit of the file lacks the text that this kind needs.
    """
    name = EDITORS[kind].text
    for number, edit in enumerate(prompts.edits, 1):
        if not getattr(edit, name):
            example = "put the {} in the snow" if name == "instruction" else "a photo of a {} in the snow"
            other = next(known for known, entry in EDITORS.items() if entry.text != name)
            raise DataError(
                f"{prompts.path} edit {number} has no {name}, which editor.kind = {kind} needs: add {name} = '{example}', or use "
                f"editor.kind = {other}"
            )
    return tuple(Wording(edit.domain, getattr(edit, name)) for edit in prompts.edits)


def batches_of(
    plan: EditPlan, batch_size: int, *, index: int = 0, count: int = 1, done: Container[str] = frozenset()
) -> list[list[PlannedEdit]]:
    """Return the batches of writer `index` of `count` that hold an edit to make.

    Batches are cut from the whole plan, done or not. So an edit always shares its batch with the same edits, after a kill and
    with any number of writers; its rounding depends on them.

    Args:
        plan: all edits.
        batch_size: edits of a batch.
        index: number of the writer, 0 .. count - 1.
        count: number of writers.
        done: names of edits that need not be made.
    """
    starts = range(0, len(plan), batch_size)
    return [
        plan[start : start + batch_size]
        for start in starts[index::count]
        if not all(name in done for name in plan.file_names[start : start + batch_size])
    ]


def check_plan(settings: EditorConfig, dataset: Dataset, *, box_crop: bool) -> None:
    """Check that the samples have what the editor's kind needs.

    Raises:
        ConfigError: a kind that needs boxes, and images without them or cropped to them.
    """
    if "box" not in EDITORS[settings.kind].needs:
        return
    if box_crop:
        raise ConfigError(
            f"editor.kind = {settings.kind} needs what is around the box, but data.box_crop cuts that off: set "
            "data.box_crop=false"
        )
    if all(sample.box is None for sample in dataset.train.samples):
        raise ConfigError(
            f"editor.kind = {settings.kind} needs the object's box, but the images of '{dataset.name}' have none (those of "
            "cub have): use instruct-pix2pix or img2img"
        )


def stated_settings(
    config: Config, settings: EditorConfig, wordings: Sequence[Wording], *, in_loop: bool = False
) -> dict[str, Any]:
    """Return the settings that decide which edits are made and how they look (settings.json of the entry).

    Edits of the loop (`in_loop`: a pilot, a plan file) are part of all edits, and share an entry with them.
    """
    stated: dict[str, Any] = {"dataset": config.data.name, **{name: getattr(settings, name) for name in LOOK}}
    stated |= {
        "seed": config.seed,
        "per_text": config.editor.per_text,
        "texts_per_image": config.editor.texts_per_image,
        "image_format": config.editor.image_format,
        "texts": [asdict(wording) for wording in wordings],
    }
    for name in (*LATER, *(() if in_loop else CHOICE)):
        if getattr(settings, name) != getattr(EditorConfig, name):
            stated[name] = getattr(settings, name)
    for name in ("model", "controlnet"):
        folder = Path(getattr(settings, name)).expanduser()
        if stated.get(name) and folder.is_dir():
            stated[name] = folder.resolve().name  # a machine's path is no property of the edits
    if settings.lora:  # nor of an adapter; its content is part of the editor's identity
        stated["lora"] = [named(text) for text in settings.lora]
    return stated | ({"box_crop": True} if config.data.box_crop else {})


def entry_key(stated: Mapping[str, Any]) -> str:
    """Return the name of the cache entry of these settings; other settings give another name."""
    return f"{stated['kind']}-{hashlib.sha256(msgspec.json.encode(stated, order='sorted')).hexdigest()[:8]}"


def stable_hash(*parts: object) -> int:
    """Return a hash of the parts' texts, 0 .. 2**64 - 1, the same on every machine."""
    text = "\n".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big")
