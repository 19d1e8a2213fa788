"""Edits of samples: sources read once, batches through the editor, every outcome checked.

`edit_dataset` is the function for users of the library; it writes no file. `generate` runs the same loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from flyp_saflex.editing.editor import Editor, Request
from flyp_saflex.editing.plan import PlannedEdit, Wording, batches_of, plan_edits
from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import read_image
from flyp_saflex.prompting.edit_prompts import EditText
from flyp_saflex.records import Sample
from flyp_saflex.tables import EDITORS

ONE_COLOUR_STD = 2.0
"""Largest standard deviation per channel (of 255) of an edit that counts as one colour; dark photographs have 10 and more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditResult:
    """Outcome of a planned edit.

    Attributes:
        planned: the planned edit.
        source: the source as the editor saw it; None if it cannot be read, or the kind needs none.
        image: the edit; None if there is no usable one.
        reason: why there is no image; the empty string otherwise.
        unreadable: whether the source cannot be read.
    """

    planned: PlannedEdit
    source: Image.Image | None
    image: Image.Image | None
    reason: str = ""
    unreadable: bool = False


def edit_dataset(
    editor: Editor,
    samples: Iterable[Sample],
    texts: Sequence[EditText | str],
    *,
    class_names: Sequence[str] = (),
    seed: int = 0,
    per_text: int = 1,
    texts_per_image: int = 0,
    batch_size: int = 8,
    box_crop: bool = False,
) -> Iterator[EditResult]:
    """Edit every sample with every text, and yield the outcomes, image by image.

    Args:
        editor: an editor, for example from `load_editor`.
        samples: the sources, for example `load_dataset(...).train.samples`.
        texts: instructions or prompts, as the editor's kind needs them, or `EditText`s that have both; `{}` stands for the
            class name.
        class_names: names by class index, needed where a text has a `{}`.
        seed: seed of all draws; the noise of an edit depends on it, the sample, the text and the edit's number alone.
        per_text: edits of every sample with every text.
        texts_per_image: texts drawn for every sample; 0: all of them.
        batch_size: edits made at once.
        box_crop: crop every source to its box first.

    Raises:
        DataError: a text has a `{}` but a class has no name, or an `EditText` lacks the text that the editor's kind needs.
    """
    wordings = [_wording(text, editor.settings.kind) for text in texts]
    plan = plan_edits(list(samples), wordings, class_names, seed=seed, per_text=per_text, texts_per_image=texts_per_image)
    for results in edit_batches(editor, batches_of(plan, batch_size), box_crop=box_crop):
        yield from results


def edit_batches(
    editor: Editor, batches: Iterable[Sequence[PlannedEdit]], *, box_crop: bool = False
) -> Iterator[list[EditResult]]:
    """Yield the outcomes batch by batch; a source that two consecutive batches need is read once."""
    needs_source = "image" in EDITORS[editor.settings.kind].needs
    sources: dict[str, Image.Image | str] = {}
    for batch in batches:
        samples = {edit.sample.sample_id: edit.sample for edit in batch} if needs_source else {}
        sources = {
            sample_id: sources[sample_id] if sample_id in sources else read_source(sample, box_crop=box_crop)
            for sample_id, sample in samples.items()
        }
        found = {sample_id: source for sample_id, source in sources.items() if isinstance(source, Image.Image)}
        usable = [edit for edit in batch if not needs_source or edit.sample.sample_id in found]
        requests = [
            Request(
                image=found.get(edit.sample.sample_id),
                text=edit.text,
                seed=edit.seed,
                box=None if box_crop else edit.sample.box,
                level=edit.level,
            )
            for edit in usable
        ]
        outcomes = dict(zip((edit.file_name for edit in usable), editor.edit(requests) if requests else [], strict=True))
        results = []
        for edit in batch:
            source = sources.get(edit.sample.sample_id)
            if isinstance(source, str):
                results.append(EditResult(planned=edit, source=None, image=None, reason=source, unreadable=True))
                continue
            outcome = outcomes[edit.file_name]
            reason = outcome if isinstance(outcome, str) else flaw(outcome, editor.output_size(*(source or outcome).size))
            image = outcome if isinstance(outcome, Image.Image) and not reason else None
            results.append(EditResult(planned=edit, source=source, image=image, reason=reason))
        yield results


def read_source(sample: Sample, *, box_crop: bool = False) -> Image.Image | str:
    """Return a source as upright RGB, or the reason why it cannot be read, without a path of this machine."""
    try:
        return read_image(sample.image, box=sample.box if box_crop else None)
    except DataError as error:
        return str(error).replace(str(sample.item), f"'{sample.sample_id}'")


def flaw(image: Image.Image, size: tuple[int, int]) -> str:
    """Return why an edit cannot be used (wrong size, black, of one colour), or the empty string.

    Pixels that were NaN in the pipeline are black.
    """
    if image.size != size:
        return f"{image.width} x {image.height} px instead of {size[0]} x {size[1]}"
    pixels_HWC = np.asarray(image.convert("RGB"))
    if pixels_HWC.max() <= ONE_COLOUR_STD:
        return "black"
    return "of one colour" if pixels_HWC.std(axis=(0, 1)).max() < ONE_COLOUR_STD else ""


def _wording(text: EditText | str, kind: str) -> Wording:
    if isinstance(text, str):
        return Wording("", text)
    name = EDITORS[kind].text
    if not getattr(text, name):
        raise DataError(f"the text for '{text.domain}' has no {name}, which an editor of the kind {kind} needs; add one")
    return Wording(text.domain, getattr(text, name))
