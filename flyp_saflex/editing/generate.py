"""The command `flyp-saflex generate`: edits of the training images into the augment cache, by one or several processes.

The plan (`plan.py`) is the same in every process; of its batches, writer i of n makes every n-th. Edits that the entry holds
are not made again: after a stop, kill -9 or a power cut the same command continues, and at most the current batch is lost.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.editing.choice import choice_table, choose_edits, read_places, spread
from flyp_saflex.editing.cost import preset_note
from flyp_saflex.editing.edit_images import EditResult, edit_batches, read_source
from flyp_saflex.editing.editor import Editor, load_editor
from flyp_saflex.editing.hard import read_hardness
from flyp_saflex.editing.one_card import offload_note
from flyp_saflex.editing.plan import (
    EditPlan,
    PlannedEdit,
    batches_of,
    check_plan,
    entry_key,
    plan_edits,
    stated_settings,
    wordings_for,
)
from flyp_saflex.editing.plan_file import check_loop, follow, read_plan_file
from flyp_saflex.editing.probe import probe
from flyp_saflex.editing.progress import Sheets, Tally
from flyp_saflex.editing.settings import levels_of, resolve
from flyp_saflex.errors import DataError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.prompting.edit_prompts import load_edit_prompts
from flyp_saflex.records import Dataset
from flyp_saflex.runtime import ProgressLines, StopSignals
from flyp_saflex.storage.augment_cache import DONE, SHEETS, AugmentCache
from flyp_saflex.storage.augment_cache_files import read_rejected, state_settings
from flyp_saflex.storage.augment_cache_writer import CacheWriter
from flyp_saflex.storage.edit_times import EditTimes
from flyp_saflex.storage.manifest import MANIFEST, WRITERS
from flyp_saflex.training.distributed import device_name

MEMORY = ("quantisation", "offload", "tiling", "attention")
"""Options of the manifest rows that are told where they are set."""


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The checked plan of one writer: recipe, dataset, cache entry and share of the batches."""

    config: Config
    dataset: Dataset
    settings: EditorConfig
    stated: dict[str, Any]
    folder: Path
    plan: EditPlan
    index: int
    count: int
    is_main: bool

    @property
    def max_unreadable(self) -> int:
        """Number of sources that may be unreadable."""
        return int(self.config.data.max_unreadable * self.plan.num_sources)

    def pending(self, made: set[str], rejected: set[str], *, whole: bool = False) -> list[list[PlannedEdit]]:
        """Return the batches of this writer (`whole`: of all writers) with an edit to make.

        Such a batch is made as a whole, so that its edits are rounded as before.
        """
        index, count = (0, 1) if whole else (self.index, self.count)
        return batches_of(self.plan, self.config.editor.batch_size, index=index, count=count, done=made | rejected)

    def say(self, text: str) -> None:
        """Print a line on the main process."""
        if self.is_main:
            tqdm.write(text)


def generate(
    config: Config,
    *,
    shard: tuple[int, int] = (0, 1),
    limit: int | None = None,
    dry_run: bool = False,
    pilot: int | None = None,
    plan_file: Path | None = None,
) -> Path:
    """Make the edits of the recipe that the cache entry does not hold.

    Args:
        config: the recipe.
        pilot: make this many edits, evenly over class x text x level, instead of those of `editor.plan`.
        plan_file: make `editor.budget` edits by the shares of this file instead.
        shard: (i, n): make part i of n; the processes of `accelerate launch` share that part.
        limit: edit at most this many images of the split.
        dry_run: check everything, time one batch, print the estimated cost, write nothing.

    Returns:
        The entry's folder.

    Raises:
        UserError: recipe, data, texts, model or disk cannot be used; written edits are kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the current batch is written.
    """
    work = _work(config, shard, limit, pilot, plan_file)
    made, rejected, unreadable = _held(work.folder)
    batches = work.pending(made, rejected, whole=dry_run)
    work.say(_plan_line(work, made, rejected))
    if note := offload_note(work.settings, PartialState().device):
        work.say(f"note: {note}")
    if dry_run:
        work.say(choice_table(work.plan, work.dataset.train.samples, work.dataset.class_names))
        todo = sum(_is_open(edit, made, rejected) for batch in batches for edit in batch)
        if note := preset_note(work.settings, todo):
            work.say(note)
        if work.is_main and batches:
            tried = load_editor(config.editor, device=PartialState().device)
            state_settings(work.folder, work.stated | {"identity": tried.identity}, write=False)
            suffix, box_crop = f".{config.editor.image_format}", config.data.box_crop
            work.say(probe(tried, batches[0], todo, folder=work.folder, box_crop=box_crop, suffix=suffix, count=work.count))
        return work.folder
    tidy = (work.folder / DONE).is_file() and not (work.folder / WRITERS).exists()
    if tidy and not _worth_another_try(batches, made, rejected, unreadable, config):
        work.say(f"nothing to do: {work.folder} is finished")
        return work.folder
    _check_writable(work.folder)
    editor = load_editor(config.editor, device=PartialState().device) if batches else None
    if editor is not None:
        state_settings(work.folder, work.stated | {"identity": editor.identity}, write=True)
    with CacheWriter(work.folder, work.dataset.name, index=work.index, count=work.count) as writer, StopSignals() as signals:
        tally = Tally()
        if editor is not None:
            _edit(work, editor, writer, signals, tally)
        done = writer.finish(work.plan.named(), work.max_unreadable)
    if counts := tally.line():
        work.say(counts)
    if done:
        work.say(f"{work.folder} is finished; look at {SHEETS}/ in it before you train on it")
    else:
        others = "" if work.count == 1 else ", or another of its processes is still at work"
        work.say(f"{work.folder} is not finished{others}: run the same command again to continue")
    if signals.requested and not done:
        raise KeyboardInterrupt
    return work.folder


def _work(
    config: Config, shard: tuple[int, int], limit: int | None, pilot: int | None = None, plan_file: Path | None = None
) -> _Work:
    """Check everything that needs no model, and plan the edits."""
    settings = resolve(config.editor)
    prompts = load_edit_prompts(config.editor.prompts, config.data.name)
    wordings = wordings_for(prompts, settings.kind)
    dataset = load_dataset(config.data, seed=config.seed, limit=limit)
    check_plan(settings, dataset, box_crop=config.data.box_crop)
    in_loop = check_loop(settings, dataset.train.samples, pilot, plan_file)
    places = read_places(settings.places, dataset.train.samples) if settings.plan == "bias" else {}
    hard = read_hardness(Path(settings.hard_run), dataset) if settings.plan == "hard" else None
    stated = stated_settings(config, settings, wordings, in_loop=in_loop) | ({"places": places} if places else {})
    stated |= {"hard_run": hard.digest} if hard else {}
    followed = read_plan_file(plan_file) if plan_file else None
    if plan_file and followed:
        followed.check(plan_file, dataset, stated)
    folder = Path(config.cache.root).expanduser() / dataset.name / (config.cache.key or entry_key(stated))
    state_settings(folder, stated, write=False)
    plan = plan_edits(
        dataset.train.samples,
        wordings,
        dataset.class_names,
        seed=config.seed,
        per_text=config.editor.per_text,
        texts_per_image=config.editor.texts_per_image,
        suffix=f".{config.editor.image_format}",
        levels=levels_of(settings)[1],
    )
    if pilot:
        plan = spread(plan, pilot, seed=config.seed)
    elif followed:
        plan = follow(plan, followed, settings.budget, seed=config.seed)
    else:
        scores = hard.scores if hard else None
        plan = choose_edits(plan, dataset.train.samples, settings, places, seed=config.seed, hardness=scores)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return _Work(
        config=config,
        dataset=dataset,
        settings=settings,
        stated=stated,
        folder=folder,
        plan=plan,
        index=shard[0] * world + rank,
        count=shard[1] * world,
        is_main=rank == 0,
    )


def _edit(work: _Work, editor: Editor, writer: CacheWriter, signals: StopSignals, tally: Tally) -> None:
    """Make this writer's edits, batch by batch, until all are made or a signal asks to stop."""
    config, done_before = work.config, writer.made | writer.rejected
    batches = work.pending(writer.made, writer.rejected)
    total = sum(edit.file_name not in done_before for batch in batches for edit in batch)
    allowed = work.max_unreadable
    sheets = Sheets(work.folder, config.editor.sheet_every, index=work.index, count=work.count, done=len(done_before))
    times = EditTimes(work.folder, device_name(PartialState().device), index=work.index, count=work.count)
    quiet = None if work.is_main else True
    lines, count = ProgressLines("editing", total=total, done=0, unit="edits", shown=work.is_main), 0
    with tqdm(total=total, unit="edit", desc="editing", disable=quiet, smoothing=0.05) as bar:
        for results in edit_batches(editor, batches, box_crop=config.data.box_crop):
            new = [result for result in results if result.planned.file_name not in done_before]
            edits = [(result.image, _row(result.planned, result.image, work, editor)) for result in new if result.image]
            rejections = [_rejection(result) for result in new if result.image is None and not result.unreadable]
            first_seen = {
                result.planned.sample.sample_id: result
                for result in reversed(new)
                if result.unreadable and result.planned.sample.sample_id not in tally.unreadable
            }
            writer.write(edits, [*rejections, *(_rejection(result) for result in first_seen.values())])
            for result in first_seen.values():
                work.say(f"skipped: {result.reason}")
            times.add([result.planned.file_name for result in new if not result.unreadable])
            tally.add(new)
            sheets.add(new)
            bar.update(len(new))
            count += len(new)
            lines.update(count, f"{tally.rejected.total()} rejected")
            if len(tally.unreadable) > allowed:
                raise DataError(
                    f"{len(tally.unreadable)} sources cannot be read, more than data.max_unreadable = "
                    f"{config.data.max_unreadable} of them; written edits are kept; first: "
                    f"{next(iter(tally.unreadable.values()))}"
                )
            if signals.requested:
                break
    sheets.write_rest()


def _row(planned: PlannedEdit, image: Image.Image, work: _Work, editor: Editor) -> dict[str, Any]:
    """Return the manifest row of an edit: its provenance, and nothing that differs between repeated runs."""
    settings = editor.settings
    numbers = {name: getattr(settings, name) for name in ("steps", "guidance", "image_guidance", "strength")}
    if planned.level is not None:
        numbers[levels_of(settings)[0]] = planned.level
    return {
        "file_name": planned.file_name,
        "aug_id": planned.file_name,
        "dataset": work.dataset.name,
        "source_id": planned.sample.sample_id,
        "label": planned.sample.label,
        "instruction": planned.text,
        "domain": planned.domain,
        "k": planned.k,
        **({"preset": settings.preset} if settings.preset else {}),
        "kind": settings.kind,
        **editor.identity,
        **{name: value for name, value in numbers.items() if value is not None},
        "scheduler": settings.scheduler,
        **{name: value for name in MEMORY if (value := getattr(settings, name)) != getattr(EditorConfig, name)},
        "seed": planned.seed,
        "size": list(image.size),
    }


def _rejection(result: EditResult) -> dict[str, Any]:
    planned = result.planned
    if result.unreadable:
        return {"aug_id": None, "source_id": planned.sample.sample_id, "reason": result.reason}
    return {
        "aug_id": planned.file_name,
        "source_id": planned.sample.sample_id,
        "reason": result.reason,
        "instruction": planned.text,
    }


def _is_open(edit: PlannedEdit, made: set[str], rejected: set[str]) -> bool:
    return edit.file_name not in made and edit.file_name not in rejected


def _held(folder: Path) -> tuple[set[str], set[str], set[str]]:
    """Return the edits, rejected edits and unreadable sources of the entry; write nothing."""
    if not (folder / MANIFEST).is_file():
        return set(), set(), set()
    rejected, unreadable = read_rejected(folder)
    return set(AugmentCache.at(folder).aug_ids), set(rejected), set(unreadable)


def _worth_another_try(
    batches: Sequence[Sequence[PlannedEdit]], made: set[str], rejected: set[str], unreadable: set[str], config: Config
) -> bool:
    """Return whether a finished entry lacks edits that can be made: new ones, or of sources that are readable now."""
    sources = {edit.sample.sample_id: edit.sample for batch in batches for edit in batch if _is_open(edit, made, rejected)}
    return any(
        name not in unreadable or isinstance(read_source(sample, box_crop=config.data.box_crop), Image.Image)
        for name, sample in sources.items()
    )


def _plan_line(work: _Work, made: set[str], rejected: set[str]) -> str:
    done = sum(name in made for name in work.plan.file_names)
    refused = sum(name in rejected and name not in made for name in work.plan.file_names)
    part = f", this is part {work.index} of {work.count}" if work.count > 1 else ""
    model = f" ({work.stated['model']})" if work.stated["model"] else ""
    editor = work.settings.preset or work.settings.kind
    return (
        f"{work.folder}: {len(work.plan)} edits of {work.plan.num_sources} images with "
        f"{len(work.stated['texts'])} texts by {editor}{model}; {done} made, {refused} rejected, "
        f"{len(work.plan) - done - refused} to do{part}"
    )


def _check_writable(folder: Path) -> None:
    home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        reason = "it may not be written to" if home.is_dir() else "it is a file"
        raise DataError(f"augment cache {folder} cannot be written: {home}: {reason}; choose another cache.root")
