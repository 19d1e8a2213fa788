"""Mistakes chapter of the page: confusions, pictures of confident mistakes, tables per class and domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from flyp_saflex.records import Sample
from flyp_saflex.reporting.figures import scatter_splits
from flyp_saflex.reporting.html import NOTHING, Markup, cell, details, element, image, join, listing, paragraph, section, table
from flyp_saflex.reporting.pictures import sample_thumbnail, samples_of
from flyp_saflex.reporting.predictions import Mistake, confident_mistakes, confusions, predicted_names
from flyp_saflex.reporting.runs import Run, by_recipe, mean_details

MOST_ROWS = 60
MOST_CONFUSIONS = 12
PER_CLASS = 2
"""Pictures of mistakes per class."""
MOST_CLASSES = 8
"""Classes with pictures of mistakes."""


def mistakes_chapter(runs: Sequence[Run], baseline: str) -> Markup:
    """Return the most frequent confusions, pictures of mistakes, and the tables per class and domain, for every test split.

    Args:
        runs: of all conditions.
        baseline: condition whose mistakes are shown as pictures.
    """
    groups = by_recipe(runs)
    id_split, ood_splits = scatter_splits(runs)
    parts: list[object] = [
        paragraph("Finetuned models (alpha = 1), means over seeds, in percent. Bars show the same numbers.", class_="note")
    ]
    splits = [*ood_splits, *([id_split] if id_split else [])]
    first = groups[baseline][0]
    mistakes = {split: confident_mistakes(first, split, per_class=PER_CLASS, most_classes=MOST_CLASSES) for split in splits}
    samples, remark = samples_of(first) if any(mistakes.values()) else ({}, "")
    for split in splits:
        found = [
            _confusions(groups, split),
            _pictures(groups, split, baseline, mistakes[split], samples),
            _per_row(groups, split, "per_class", "class", "f1", "F1 per class"),
            _per_row(groups, split, "per_group", "group", "accuracy", "Accuracy per group (domain, or data.group_columns)"),
        ]
        shown = [part for part in found if part]
        if shown:
            parts += [element("h3", f"{split}, {'in' if split == id_split else 'out of'} distribution"), *shown]
    if remark and len(parts) > 1:
        parts.insert(1, listing([remark], "remarks"))
    if len(parts) == 1:
        parts.append(paragraph("The run folders hold no predictions and no details.json any more."))
    return section("mistakes", "Mistakes, classes, domains", *parts)


def _pictures(
    groups: Mapping[str, Sequence[Run]], split: str, baseline: str, mistakes: Sequence[Mistake], samples: Mapping[str, Sample]
) -> Markup:
    """Return cards of the baseline's most confident mistakes, with the answers of the other conditions (first seeds)."""
    if not mistakes:
        return Markup("")
    identities = [mistake.sample_id for mistake in mistakes]
    others = {recipe: predicted_names(seeds[0], split, identities) for recipe, seeds in groups.items() if recipe != baseline}
    cards = []
    for mistake in mistakes:
        answers = {recipe: found[mistake.sample_id] for recipe, found in others.items() if mistake.sample_id in found}
        right = [recipe for recipe, answer in answers.items() if answer == mistake.label]
        picture = sample_thumbnail(samples.get(mistake.sample_id))
        alt = f"{mistake.label}, taken for {mistake.prediction}"
        parts = [
            image(picture, alt) if picture else element("p", mistake.sample_id, class_="muted file"),
            paragraph("is", element("b", mistake.label)),
            paragraph("taken for", element("b", mistake.prediction), f"· {100 * mistake.confidence:.0f} % sure"),
        ]
        if answers:
            parts.append(paragraph(_others(right, len(answers)), class_="muted"))
        cards.append(element("article", join(parts), class_="card"))
    what = f"Most confident mistakes of {baseline}, seed {groups[baseline][0].seed}"
    note = paragraph(
        f"At most {PER_CLASS} per class, for the {MOST_CLASSES} classes with the most mistakes. Look before you blame the",
        "model: a confident mistake may be a wrong label.",
        class_="note",
    )
    return details(what, note, element("div", join(cards), class_="cards"), open_=True)


def _others(right: Sequence[str], count: int) -> str:
    """Return in which of the other conditions an image is right: by name where they are few."""
    if not right:
        return "wrong in every other condition"
    return f"right: {right[0]}" if len(right) == 1 else f"right in {len(right)} of {count} other conditions"


def _confusions(groups: Mapping[str, Sequence[Run]], split: str) -> Markup:
    counts: dict[str, Counter[tuple[str, str]]] = {}
    for recipe, seeds in groups.items():
        per_seed = [confusions(run, split) for run in seeds]
        counts[recipe] = sum(per_seed, Counter())
    total: Counter[tuple[str, str]] = sum(counts.values(), Counter())
    worst = sorted(total, key=lambda pair: (-total[pair], pair))[:MOST_CONFUSIONS]
    if not worst:
        return Markup("")
    lines: list[list[object]] = []
    for pair in worst:
        means = [counts[recipe][pair] / len(seeds) for recipe, seeds in groups.items()]
        lines.append([f"{pair[0]} → {pair[1]}", *(f"{mean:.1f}".removesuffix(".0") for mean in means)])
    caption = f"Worst confusions on {split}: images of a class (left) that were taken for another (right), mean number per seed"
    return table(caption, ["class → prediction", *groups], lines, seen=caption)


def _per_row(groups: Mapping[str, Sequence[Run]], split: str, kind: str, key: str, value: str, title: str) -> Markup:
    columns = {recipe: mean_details(seeds, split, kind, key, value) for recipe, seeds in groups.items()}
    sizes: dict[str, int] = {}
    for column in columns.values():
        for row, (n, _) in column.items():
            sizes.setdefault(row, n)
    rows = sorted((row for row, n in sizes.items() if n), key=lambda row: -sizes[row])
    if len(rows) < 2:
        return Markup("")
    names = {str(label): name for seeds in groups.values() for run in seeds for label, name in run.class_names.items()}
    lines: list[list[object]] = []
    for row in rows[:MOST_ROWS]:
        means = [column.get(row, (0, None))[1] for column in columns.values()]
        cells = [cell(NOTHING) if mean is None else cell(f"{100 * mean:.1f}", share=mean) for mean in means]
        lines.append([names.get(row, row) if kind == "per_class" else row, cell(sizes[row], class_="muted"), *cells])
    more = f": the {MOST_ROWS} largest of {len(rows)}; all are in details.json" if len(rows) > MOST_ROWS else f" ({len(rows)})"
    return details(f"{title}{more}", table(f"{title}, {split}", [key, "images", *columns], lines))
