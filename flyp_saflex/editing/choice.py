"""Choice of the edits to make: values of `editor.plan`, by counts of training images; no image is read.

    all     every planned edit, or `editor.budget` of them, drawn by hash
    quota   cells are classes: edits level the counts of images and edits, rare classes first
    bias    cells are pairs of class and place: edits level these counts, so that places where training never or rarely saw
            the class come first; the way out of "this animal is only ever seen at that camera"
    hard    every edit of the images that a run gets wrong, or with a budget of the hardest images first (`hard.py`)
    pilot   (`generate --pilot N`, instead of these) cells are class x text x level: N edits evenly over them

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

from flyp_saflex.editing.plan import Cell, EditPlan, PlannedEdit, stable_hash
from flyp_saflex.errors import ConfigError, DataError, nearest
from flyp_saflex.offline import EditorConfig
from flyp_saflex.records import Sample
from flyp_saflex.storage.results import align
from flyp_saflex.user_text import quoted


def choose_edits(
    plan: EditPlan,
    samples: Sequence[Sample],
    settings: EditorConfig,
    places: Mapping[str, str],
    *,
    seed: int,
    hardness: Mapping[str, float] | None = None,
) -> EditPlan:
    """Return the planned edits that `editor.plan` and `editor.budget` choose, in the order of the plan.

    Args:
        plan: every edit that could be made.
        samples: the training images, which are counted.
        settings: options `plan` and `budget`.
        places: place of each training domain (`read_places`); used by `bias` only.
        seed: seed of the draws.
        hardness: -1 (surely right) .. 1 (surely wrong) of each training image (`hard.read_hardness`); used by `hard` only.

    Raises:
        ConfigError: the budget is below one edit per class, or `bias` knows no place of the texts.
    """
    if settings.plan == "all":
        return _level(plan, [0] * len(plan), {0: 0}, settings.budget, seed) if settings.budget else plan
    if settings.plan == "hard":
        return _hardest(plan, hardness or {}, settings.budget)
    classes = Counter(sample.label for sample in samples)
    if settings.budget:
        check_number(
            "editor.budget", settings.budget, samples, f", or to 0 for as many as editor.plan = {settings.plan} asks for"
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


def check_number(option: str, number: int, samples: Sequence[Sample], other: str = "") -> None:
    """Check that a number of edits is at least one per class.

    Raises:
        ConfigError: it is not.
    """
    num_classes = len({sample.label for sample in samples})
    if number < num_classes:
        raise ConfigError(
            f"{option} = {number} is below one edit per class, and training has {num_classes} classes: set it to at least "
            f"{num_classes}{other}"
        )


def spread(plan: EditPlan, num: int, *, seed: int) -> EditPlan:
    """Return `num` of the planned edits, evenly over class x text x level; nearly so over each if fewer.

    Classes take turns; class number r goes through the texts from text r on, and takes the next level when it comes back to one.
    """
    cells = plan.cells()
    most, numbers = Counter(cells), Counter[Cell]()
    classes = sorted({cell[0] for cell in cells}, key=lambda label: stable_hash(seed, "class", label))
    texts, levels = sorted({cell[1] for cell in cells}), sorted({cell[2] for cell in cells}, key=lambda level: level or 0.0)
    order: list[Cell] = []
    for turn in range(len(texts) * len(levels)):
        for rank, label in enumerate(classes):
            text = (rank + turn) % len(texts)
            level = (turn // len(texts) + text + rank // len(texts)) % len(levels)
            order.append((label, texts[text], levels[level]))
    left = min(num, len(cells))
    while left:
        for cell in [cell for cell in order if numbers[cell] < most[cell]][:left]:
            numbers[cell] += 1
            left -= 1
    return take(plan, cells, numbers, seed)


def take(plan: EditPlan, cells: Sequence[Hashable], numbers: Mapping[Any, int], seed: int) -> EditPlan:
    """Return so many edits of each cell, in the order of the plan."""
    found = _in_order(plan, cells, seed)
    return plan.select(sorted(place for cell, places in found.items() for place in places[: numbers.get(cell, 0)]))


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
    of_cell = _in_order(plan, cells, seed)
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
    return take(plan, cells, numbers, seed)


def _in_order(plan: EditPlan, cells: Sequence[Hashable], seed: int) -> dict[Hashable, list[int]]:
    """Return the places of each cell's edits in the order of a hash, every image once before any image twice."""
    of_cell: dict[Hashable, list[int]] = {}
    for number in sorted(range(len(plan)), key=lambda number: stable_hash(seed, "choice", plan.file_names[number])):
        of_cell.setdefault(cells[number], []).append(number)
    for found in of_cell.values():
        times: Counter[int] = Counter()
        turns = {}
        for number in found:
            turns[number] = times[plan.sources[number]]
            times[plan.sources[number]] += 1
        found.sort(key=turns.__getitem__)
    return of_cell


def _hardest(plan: EditPlan, hardness: Mapping[str, float], budget: int) -> EditPlan:
    """Return the edits of the images that are wrong, or with a budget those of the hardest images first."""
    names = [sample_id for _, sample_id in plan.named()]
    scores = [hardness.get(name, -2.0) for name in names]  # an image without a prediction comes last
    if not budget and not any(score > 0 for score in scores):
        raise ConfigError(
            "editor.plan = hard: editor.hard_run gets no training image wrong, so none is hard: set editor.budget for the "
            "hardest ones, or take a run that learned less"
        )
    if not budget:
        return plan.select(place for place, score in enumerate(scores) if score > 0)
    order = sorted(range(len(plan)), key=lambda place: (-scores[place], names[place], place))
    return plan.select(sorted(order[:budget]))


def _some(names: set[str]) -> str:
    shown = ", ".join(quoted(name) or "(none)" for name in sorted(names)[:3])
    return shown + (" ..." if len(names) > 3 else "")
