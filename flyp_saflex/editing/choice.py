"""Choice of the edits to make: values of `editor.plan`, by counts of training images; no image is read.

    all     every planned edit, or `editor.budget` of them, drawn by hash
    quota   cells are classes: edits level the counts of images and edits, rare classes first
    bias    cells are pairs of class and place: edits level these counts, so that places where training never or rarely saw
            the class come first; the way out of "this animal is only ever seen at that camera"

Levelling: cell c with n_c images, and p_c planned edits to choose from, gets min(p_c, max(0, level - n_c)) edits. Without a
budget the level is the largest n_c (`bias`: the largest of the class, so that its own place gets none); with one it is the
highest level that the budget reaches, and what is left goes to the smallest cells. With `bias` no cell rises above the largest
of its class, so that a large budget is not used up. Edits of a cell are taken image by image in the order of a hash. The choice
depends on the plan alone, so it is the same on every process and after every restart.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flyp_saflex.editing.plan import EditPlan, PlannedEdit, stable_hash
from flyp_saflex.errors import ConfigError, DataError, nearest
from flyp_saflex.offline import EditorConfig
from flyp_saflex.records import Sample
from flyp_saflex.storage.results import align
from flyp_saflex.user_text import quoted


def choose_edits(
    plan: EditPlan, samples: Sequence[Sample], settings: EditorConfig, places: Mapping[str, str], *, seed: int
) -> EditPlan:
    """Return the planned edits that `editor.plan` and `editor.budget` choose, in the order of the plan.

    Args:
        plan: every edit that could be made.
        samples: the training images, which are counted.
        settings: options `plan` and `budget`.
        places: place of each training domain (`read_places`); used by `bias` only.
        seed: seed of the draws.

    Raises:
        ConfigError: the budget is below one edit per class, or `bias` knows no place of the texts.
    """
    if settings.plan == "all":
        return _level(plan, [0] * len(plan), {0: 0}, settings.budget, seed) if settings.budget else plan
    classes = Counter(sample.label for sample in samples)
    if 0 < settings.budget < len(classes):
        raise ConfigError(
            f"editor.budget = {settings.budget} is below one edit per class, and training has {len(classes)} classes: set it to "
            f"at least {len(classes)}, or to 0 for as many as editor.plan = {settings.plan} asks for"
        )
    if settings.plan == "quota":
        return _level(plan, [edit.sample.label for edit in plan], classes, settings.budget, seed)
    seen = Counter((sample.label, places.get(sample.domain, sample.domain)) for sample in samples)
    texts, known = {edit.domain for edit in plan}, {place for _, place in seen}
    if not texts & known:
        example = nearest(next(iter(sorted(texts)), ""), known)
        raise ConfigError(
            f"editor.plan = bias: no text's domain ({_some(texts)}) is a place of the training images ({_some(known)}){example}: "
            "call the domains of the texts as the dataset's, or give editor.places, a CSV file with the columns domain and place"
        )
    cells = [(edit.sample.label, edit.domain) for edit in plan]
    ceilings = {cell: max(count for (label, _), count in seen.items() if label == cell[0]) for cell in set(cells)}
    return _level(plan, cells, seen, settings.budget, seed, ceilings=ceilings)


def read_places(file: str, samples: Sequence[Sample]) -> dict[str, str]:
    """Return the place of each training domain from a CSV file with the columns `domain` and `place`; no file: none.

    Raises:
        DataError: the file cannot be read, or lacks a column or a domain.
    """
    if not file:
        return {}
    path = Path(file).expanduser()
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(
            f"editor.places = {file} cannot be read ({reason}): give a CSV file with the columns domain, place"
        ) from None
    if not rows or any(row.get("domain") is None or row.get("place") is None for row in rows):
        raise DataError(f"editor.places = {file}: expected a header and rows with the columns domain and place; add them")
    places = {row["domain"]: row["place"] for row in rows}
    missing = sorted({sample.domain for sample in samples} - set(places))
    if missing:
        raise DataError(
            f"editor.places = {file} has no place for {len(missing)} of the training domains, first '{quoted(missing[0])}'"
            f"{nearest(missing[0], places)}: add a row for each"
        )
    return places


def choice_table(plan: Sequence[PlannedEdit], samples: Sequence[Sample], class_names: Sequence[str]) -> str:
    """Return a table class x text: training images, edits per text's domain, and their sum."""
    images = Counter(sample.label for sample in samples)
    cells = Counter((edit.sample.label, edit.domain or edit.text) for edit in plan)
    texts = list(dict.fromkeys(edit.domain or edit.text for edit in plan))
    lines = [("class", "images", *(text[:24] for text in texts), "edits", "images + edits")]
    for label in sorted(images):
        counts = [cells[label, text] for text in texts]
        numbers = (images[label], *counts, sum(counts), images[label] + sum(counts))
        name = class_names[label] if 0 <= label < len(class_names) else str(label)
        lines.append((name[:40], *(str(number) for number in numbers)))
    sums = [sum(cells[label, text] for label in images) for text in texts]
    total = (len(samples), *sums, len(plan), len(samples) + len(plan))
    return align([*lines, ("all", *(str(number) for number in total))], left=1)


def _level(
    plan: EditPlan,
    cells: Sequence[Hashable],
    counts: Mapping[Any, int],
    budget: int,
    seed: int,
    *,
    ceilings: Mapping[Any, int] | None = None,
) -> EditPlan:
    """Choose edits so that counts of images and edits are level over cells.

    Args:
        plan: edits to choose from.
        cells: cell of each.
        counts: images per cell.
        budget: number of edits; 0: raise every cell to the largest count.
        seed: seed of the draws.
        ceilings: largest level per cell; None: there is none.
    """
    of_cell: dict[Hashable, list[int]] = {}
    for number in sorted(range(len(plan)), key=lambda number: stable_hash(seed, "choice", plan.file_names[number])):
        of_cell.setdefault(cells[number], []).append(number)
    for found in of_cell.values():  # every image once before any image twice
        times: Counter[int] = Counter()
        turns = {}
        for number in found:
            turns[number] = times[plan.sources[number]]
            times[plan.sources[number]] += 1
        found.sort(key=turns.__getitem__)
    images = {cell: counts[cell] for cell in of_cell}
    most = {
        cell: len(found) if ceilings is None else min(len(found), max(0, ceilings[cell] - images[cell]))
        for cell, found in of_cell.items()
    }

    def wanted(level: int) -> dict[Hashable, int]:
        return {cell: min(most[cell], max(0, level - images[cell])) for cell in of_cell}

    level = max(counts.values(), default=0) if ceilings is None else max(ceilings.values(), default=0)
    if budget:
        level, beyond = 0, max([0, *images.values()]) + len(plan) + 1
        while beyond - level > 1:  # the highest level whose edits fit into the budget
            middle = (level + beyond) // 2
            level, beyond = (middle, beyond) if sum(wanted(middle).values()) <= budget else (level, middle)
    numbers = wanted(level)
    left = budget - sum(numbers.values())
    smallest_first = sorted(of_cell, key=lambda cell: (images[cell], stable_hash(seed, "cell", cell)))
    for cell in smallest_first:
        if left > 0 and numbers[cell] < most[cell] and images[cell] + numbers[cell] <= level:
            numbers[cell] += 1
            left -= 1
    chosen = {number for cell, found in of_cell.items() for number in found[: numbers[cell]]}
    return plan.select(sorted(chosen))


def _some(names: set[str]) -> str:
    shown = ", ".join(quoted(name) or "(none)" for name in sorted(names)[:3])
    return shown + (" ..." if len(names) > 3 else "")
