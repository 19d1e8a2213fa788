"""Chapters of the page without figures: results, gallery, mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from flyp_saflex.evaluation.statistics import Interval
from flyp_saflex.presets import PRESETS
from flyp_saflex.reporting.figures import scatter_splits
from flyp_saflex.reporting.gallery import FATES, PER_FATE, Decision, Fate, Gallery
from flyp_saflex.reporting.html import NOTHING, Markup, cell, details, element, join, listing, paragraph, section, table
from flyp_saflex.reporting.plots import glyph
from flyp_saflex.reporting.runs import Run, by_recipe, confusions, mean_details
from flyp_saflex.reporting.tables import SHIFTS, Block, Cell, blocks, difference_text, is_baseline, value_text
from flyp_saflex.tables import METRICS

MOST_ROWS = 60
MOST_CONFUSIONS = 12
FATE_NOTES: dict[Fate, str] = {
    "kept": "Trained on with the label that they came with.",
    "relabelled": "Trained on, but another class has the largest share of the learned label.",
    "dropped": "Weight 0: left out at their last visit.",
}


def results_chapter(found: Sequence[Cell], remarks: Sequence[str], baseline: str, names: Sequence[str]) -> Markup:
    """Return the tables of values and differences, one table per metric and shift.

    Splits of role `select` are folded away if there are others: weights or alpha were chosen on them.
    """
    parts: list[object] = [
        listing(list(remarks), "remarks"),
        paragraph(
            "Mean ± standard deviation over n seeds, in percent (calibration and losses: as they are). Differences from",
            element("b", baseline),
            "in points, paired by seed, with 95 % t-intervals;",
            element("b", "bold"),
            "where the interval excludes zero. Hollow marks: WiSE-FT at the alpha that each run chose.",
            class_="note",
        ),
    ]
    tested = [cell for cell in found if cell.role == "test"]
    parts += _result_tables(tested or found, baseline, names)
    selecting = [cell for cell in found if cell.role != "test"]
    if tested and selecting:
        splits = ", ".join(dict.fromkeys(cell.split for cell in selecting))
        parts.append(
            details(f"The same on splits that select weights or alpha: {splits}", *_result_tables(selecting, baseline, names))
        )
    return section("results", "Results", *parts)


def _result_tables(found: Sequence[Cell], baseline: str, names: Sequence[str]) -> list[object]:
    made = blocks(found)
    parts: list[object] = []
    for metric in dict.fromkeys(block.metric for block in made):
        pair = sorted((block for block in made if block.metric == metric), key=lambda block: block.shift != "ood")
        tables = [_result_table(block, baseline, names) for block in pair]
        side_by_side = all(len(block.splits) == 1 for block in pair)
        parts += [element("h3", METRICS[metric].title), element("div", join(tables), class_="tables" if side_by_side else None)]
    return parts


def _result_table(block: Block, baseline: str, names: Sequence[str]) -> Markup:
    lines = []
    for name, line in block.lines:
        cells: list[object] = []
        for split in block.splits:
            one = line.get(split)
            cells += [cell(NOTHING, span=3)] if one is None else _values(one, is_baseline(line, baseline))
        first = next(iter(line.values()))
        mark = glyph(list(names).index(first.recipe), hollow=first.kind == "wise")
        lines.append([join([Markup(mark), name], " "), *cells])
    spread = any(cell.summary.deviation is not None for _, line in block.lines for cell in line.values())
    only = next(iter(block.splits)) if len(block.splits) == 1 else ""
    where = SHIFTS[block.shift][0].upper() + SHIFTS[block.shift][1:] + (f": {only}" if only else "")
    return table(
        f"{block.title}{', ' if only else ''}{only}",
        ["condition", *(["mean ± sd" if spread else "mean", "n", "vs baseline"] * len(block.splits))],
        lines,
        groups=[] if only else [(split, 3) for split in block.splits],
        class_="results",
        seen=where,
    )


def _values(one: Cell, is_reference: bool) -> list[Markup]:
    change = one.difference
    if is_reference:
        text, sure = "baseline", False
    else:
        text, sure = difference_text(change, one.metric).replace("-", "\N{MINUS SIGN}"), _excludes_zero(change)
        if change is not None and change.n != one.summary.n:
            text += f" ({change.n} pairs)"
    muted = "muted" if is_reference or change is None else None
    return [
        cell(value_text(one.summary, one.metric)),
        cell(one.summary.n, class_="muted"),
        cell(element("b", text) if sure else text, class_=muted),
    ]


def _excludes_zero(change: Interval | None) -> bool:
    return change is not None and change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)


def gallery_chapter(galleries: Sequence[Gallery]) -> Markup:
    """Return SAFLEX's decisions about single images, in three groups per run."""
    title = "What SAFLEX did with augmented images"
    if not galleries:
        return section(
            "gallery", title, paragraph("No run learned weights and logged them (saflex.enabled, train.log_augmented).")
        )
    parts: list[object] = [
        paragraph(
            "Left the source, right the edit; below them the instruction, the label that it came with, its learned weight and",
            f"the largest shares of its learned label, all at its last visit. At most {PER_FATE} per group, drawn by a hash of",
            "their names: nobody picked them.",
            class_="note",
        )
    ]
    for made in galleries:
        total = sum(made.counts.values())
        shares = ", ".join(f"{made.counts[fate]} {fate} ({made.counts[fate] / total:.0%})" for fate in FATES)
        parts += [element("h3", f"{made.run.recipe}, seed {made.run.seed}"), paragraph(f"{total} augmented images: {shares}.")]
        if made.repeated:
            made.remarks.append(
                "Random operations followed (augment.upstream), so the images that were trained on looked a little different."
            )
        parts.append(listing(made.remarks, "remarks"))
        names = made.run.class_names
        for fate, words in FATES.items():
            heading = element("h4", join([words, element("span", made.counts[fate], class_="count")], " "))
            cards = [_card(decision, names) for decision in made.shown[fate]]
            empty = paragraph(*(_why_none(made) if fate == "relabelled" else ["None in this run."]), class_="muted")
            parts += [
                heading,
                paragraph(FATE_NOTES[fate], class_="note"),
                element("div", join(cards), class_="cards") if cards else empty,
            ]
    return section("gallery", title, *parts)


def _why_none(made: Gallery) -> list[object]:
    config = made.run.config
    if config is not None and config.saflex.preset == "robust" and config.saflex.penalty == PRESETS["robust"].penalty:
        return ["None in this run: the preset", element("code", "robust"), "retains the labels that images came with."]
    return ["None in this run."]


def _card(decision: Decision, names: Mapping[int, str]) -> Markup:
    label = _name(decision.label, names)
    pictures = []
    for uri, alt in ((decision.source, f"Source image, {label}"), (decision.edit, f"Edit: {decision.instruction or label}")):
        if uri:
            pictures.append(f'<img src="{uri}" alt="{element("i", alt)[3:-4]}" loading="lazy">')
    frame = (
        element("div", Markup("".join(pictures)), class_="pair")
        if pictures
        else element("p", decision.identity, class_="muted file")
    )
    soft = [
        element("li", join([element("span", _name(top, names)), element("span", f"{share:.0%}")], ""), style=f"--v:{share:.2f}")
        for top, share in decision.soft_labels[:3]
    ]
    words = [
        frame,
        element("p", f"“{decision.instruction}”", class_="instruction") if decision.instruction else "",
        paragraph("came as", element("b", label)),
        paragraph("weight", element("b", f"{decision.weight:.2f}"), f"· kept {decision.times_kept} of {decision.visits} times"),
        element("ul", join(soft), class_="soft") if soft and decision.weight > 0 else "",
    ]
    return element("article", join(words), class_="card")


def _name(label: int | None, names: Mapping[int, str]) -> str:
    return "its own caption" if label is None else names.get(label, f"class {label}")


def mistakes_chapter(runs: Sequence[Run]) -> Markup:
    """Return the most frequent confusions and the tables per class and domain, for every test split."""
    groups = by_recipe(runs)
    id_split, ood_splits = scatter_splits(runs)
    parts: list[object] = [
        paragraph("Finetuned models (alpha = 1), means over seeds, in percent. Bars show the same numbers.", class_="note")
    ]
    for split in [*ood_splits, *([id_split] if id_split else [])]:
        found = [
            _confusions(groups, split),
            _per_row(groups, split, "per_class", "class", "f1", "F1 per class"),
            _per_row(groups, split, "per_group", "group", "accuracy", "Accuracy per group (domain, or data.group_columns)"),
        ]
        shown = [part for part in found if part]
        if shown:
            parts += [element("h3", f"{split}, {'in' if split == id_split else 'out of'} distribution"), *shown]
    if len(parts) == 1:
        parts.append(paragraph("The run folders hold no predictions and no details.json any more."))
    return section("mistakes", "Mistakes, classes, domains", *parts)


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
