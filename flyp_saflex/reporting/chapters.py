"""Chapters of the page without figures: results, and SAFLEX's decisions about edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flyp_saflex.evaluation.statistics import Interval
from flyp_saflex.presets import PRESETS
from flyp_saflex.reporting.gallery import FATES, PER_FATE, Decision, Fate, Gallery, Share
from flyp_saflex.reporting.html import NOTHING, Markup, cell, details, element, image, join, listing, paragraph, section, table
from flyp_saflex.reporting.plots import glyph
from flyp_saflex.reporting.reasons import group_reason, reason
from flyp_saflex.reporting.tables import SHIFTS, Block, Cell, blocks, difference_text, has_intervals, is_baseline, value_text
from flyp_saflex.tables import METRICS

MOST_ROWS = 60
SHORT = 15
"""Most rows of a table that is shown without being unfolded."""
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
    value = "value [95 %]" if has_intervals(block) else "mean"
    only = next(iter(block.splits)) if len(block.splits) == 1 else ""
    where = SHIFTS[block.shift][0].upper() + SHIFTS[block.shift][1:] + (f": {only}" if only else "")
    return table(
        f"{block.title}, {', '.join(block.splits)}",
        ["condition", *(["mean ± sd" if spread else value, "n", "vs baseline"] * len(block.splits))],
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
        cell(value_text(one)),
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
            "their names: nobody picked them. In the tables, the shares are those of the last visit. The gain tells whether a",
            "small step on the edit, under its label, would lower the validation loss (above 0) or raise it (mean over visits).",
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
        parts.append(_share_table(made, "class", made.by_class, names))
        if made.by_instruction:
            parts.append(_share_table(made, "instruction", made.by_instruction, names))
        for fate, words in FATES.items():
            heading = element("h4", join([words, element("span", made.counts[fate], class_="count")], " "))
            cards = [_card(decision, made, names) for decision in made.shown[fate]]
            empty = paragraph(*(_why_none(made) if fate == "relabelled" else ["None in this run."]), class_="muted")
            parts += [
                heading,
                paragraph(
                    FATE_NOTES[fate], *([why] if cards and (why := group_reason(fate, made.run.config)) else []), class_="note"
                ),
                element("div", join(cards), class_="cards") if cards else empty,
            ]
    return section("gallery", title, *parts)


def _why_none(made: Gallery) -> list[object]:
    config = made.run.config
    if config is not None and config.saflex.preset == "robust" and config.saflex.penalty == PRESETS["robust"].penalty:
        return ["None in this run: the preset", element("code", "robust"), "retains the labels that images came with."]
    return ["None in this run."]


def _share_table(made: Gallery, key: str, shares: Sequence[Share], names: Mapping[int, str]) -> Markup:
    """Return the table of kept shares and mean gains by class or by instruction, folded away if it is long."""
    gains = any(share.mean_gain is not None for share in shares)
    lines: list[list[object]] = []
    for share in shares[:MOST_ROWS]:
        name = _name(share.name, names) if isinstance(share.name, int) else share.name
        line: list[object] = [name, cell(share.n, class_="muted"), cell(f"{100 * share.kept:.0f}", share=share.kept)]
        line.append(cell(f"{100 * share.relabelled:.0f}", share=share.relabelled))
        if gains:
            line.append(cell(NOTHING if share.mean_gain is None else _signed(share.mean_gain)))
        lines.append(line)
    more = f", the {MOST_ROWS} most frequent are shown" if len(shares) > MOST_ROWS else ""
    title = f"Edits by {key}"
    header = [key, "edits", "kept, %", "relabelled, %", *(["mean gain"] if gains else [])]
    unique = f"{title}: {made.run.recipe}, seed {made.run.seed}"
    return details(f"{title} ({len(shares)}{more})", table(unique, header, lines), open_=len(shares) <= SHORT)


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")


def _card(decision: Decision, made: Gallery, names: Mapping[int, str]) -> Markup:
    label = _name(decision.label, names)
    pictures = []
    for uri, alt in ((decision.source, f"Source image, {label}"), (decision.edit, f"Edit: {decision.instruction or label}")):
        if uri:
            pictures.append(image(uri, alt))
    frame = (
        element("div", join(pictures, ""), class_="pair") if pictures else element("p", decision.identity, class_="muted file")
    )
    soft = [
        element("li", join([element("span", _name(top, names)), element("span", f"{share:.0%}")], ""), style=f"--v:{share:.2f}")
        for top, share in decision.soft_labels[:3]
    ]
    why = reason(decision, made.run.config, names)
    words = [
        frame,
        element("p", f"“{decision.instruction}”", class_="instruction") if decision.instruction else "",
        paragraph("came as", element("b", label)),
        paragraph("weight", element("b", f"{decision.weight:.2f}"), f"· kept {decision.times_kept} of {decision.visits} times"),
        element("ul", join(soft), class_="soft") if soft and decision.weight > 0 else "",
        paragraph(why, class_="why") if why else "",
    ]
    return element("article", join(words), class_="card")


def _name(label: int | None, names: Mapping[int, str]) -> str:
    return "its own caption" if label is None else names.get(label, f"class {label}")
