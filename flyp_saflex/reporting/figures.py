"""Chapters of the page with figures: ID against OOD with WiSE-FT paths, reliability, training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flyp_saflex.evaluation.calibration import Bin
from flyp_saflex.evaluation.metrics import CALIBRATION_BINS
from flyp_saflex.evaluation.statistics import summarise
from flyp_saflex.reporting.html import NOTHING, Markup, element, figure, join, paragraph, plain, section, table
from flyp_saflex.reporting.plots import Curve, Path2D, curves, glyph, mean_curve, reliability_plot, scatter
from flyp_saflex.reporting.predictions import reliability_of
from flyp_saflex.reporting.runs import Run, by_recipe
from flyp_saflex.tables import METRICS

SCATTERED = ("accuracy", "macro_f1")
"""Metrics with a plot of OOD against ID."""
MOST_SPLITS = 3
FEWEST_IN_BIN = 5
"""Images that a point of a reliability plot stands for at least."""
QUANTITIES = {
    "loss": ("loss", False, "Training loss. Comparable between conditions only if they train on the same images and weights."),
    "lr": ("learning rate", False, "Learning rate."),
    "kept_fraction": ("augmented images kept, %", True, "Share of a batch's augmented images whose weight is above zero."),
    "label_entropy": ("entropy, nats", False, "Entropy of the learned soft labels; 0: one class has it all."),
    "mean_gain": ("mean gain", False, "Mean gain of the upstream label over the augmented images of a step; above 0: they help."),
    "rho": ("rho, %", True, "rho: estimated share of edits that do not show their label."),
}


def legend(names: Sequence[str]) -> Markup:
    """Return the list of conditions with their colours and markers."""
    items = (element("li", join([Markup(glyph(number)), element("span", name)], "")) for number, name in enumerate(names))
    return element("ul", join(items), class_="legend")


def scatter_chapter(runs: Sequence[Run]) -> Markup:
    """Return the figures of ID against OOD, one per metric and OOD split."""
    groups = by_recipe(runs)
    id_split, ood_splits = scatter_splits(runs)
    title = "In distribution against out of distribution"
    if not id_split or not ood_splits:
        return section("scatter", title, paragraph("No figure: the runs were not evaluated both in and out of distribution."))
    figures, swept = [], False
    drawn: dict[str, dict[int, list[Path2D]]] = {}
    left_out: list[str] = []
    for split in ood_splits[:MOST_SPLITS]:
        for metric in SCATTERED:
            words = METRICS[metric].title
            paths: dict[int, list[Path2D]] = {}
            for number, seeds in enumerate(groups.values()):
                found = [path for run in seeds if (path := path_of(run.results, id_split, split, metric)) is not None]
                if found:
                    paths[number] = found
            if not paths:
                continue
            what = f"{words}, {id_split} against {split}"
            if (same := next((other for other, known in drawn.items() if known == paths), "")) or _num_points(paths) < 2:
                left_out.append(f"{what} ({f'the same as {same}' if same else 'a single point: see the tables'})")
                continue
            drawn[what] = paths
            ends = "; ".join(f"{name}: {_end(paths[n])}" for n, name in enumerate(groups) if n in paths)
            drawing = scatter(
                paths,
                x_label=plain(f"{id_split}, %"),
                y_label=plain(f"{split}, %"),
                name=f"f{split_number(ood_splits, split)}{metric[0]}",
                alt=plain(f"{words} in percent, {id_split} (in distribution) against {split} (out of distribution). {ends}"),
            )
            swept = swept or any(len(path.alphas) > 1 for found in paths.values() for path in found)
            figures.append(figure(Markup(drawing), f"{words}: {id_split} against {split}."))
    left_out += ood_splits[MOST_SPLITS:]
    if not figures:
        return section("scatter", title, paragraph(f"No figure. Not drawn: {'; '.join(left_out) or 'no metric'}."))
    note = (
        "Up and to the right is better. Large marks: finetuned models, means over seeds; faint ones: single seeds."
        + (
            " Lines: WiSE-FT, from the smallest alpha evaluated to the finetuned weights; a ring: the alpha chosen."
            if swept
            else ""
        )
        + (f" Not drawn: {'; '.join(left_out)}." if left_out else "")
    )
    return section("scatter", title, paragraph(note, class_="note"), legend(list(groups)), _grid(figures))


def scatter_splits(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """Return the ID split and the OOD splits to draw: of role `test` if any, else of role `select`."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for run in runs:
        for row in run.results["results"]:
            found.setdefault((row["role"], row["shift"]), {})[row["split"]] = None
    ids, oods = (list(found.get(("test", shift)) or found.get(("select", shift)) or ()) for shift in ("id", "ood"))
    return (ids[0] if ids else ""), oods


def path_of(results: Mapping[str, Any], id_split: str, ood_split: str, metric: str) -> Path2D | None:
    """Return a run's path over alpha in one panel; None without results on both splits at alpha = 1."""
    values = {
        split: {
            row["wise_alpha"]: row[metric] for row in results["results"] if row["split"] == split and row.get(metric) is not None
        }
        for split in (id_split, ood_split)
    }
    alphas = sorted(values[id_split].keys() & values[ood_split].keys())
    if not alphas or alphas[-1] != 1:
        return None
    x, y = (tuple(float(values[split][alpha]) for alpha in alphas) for split in (id_split, ood_split))
    chosen = results.get("chosen_alpha")
    return Path2D(tuple(alphas), x, y, chosen if chosen in alphas else None)


def calibration_chapter(runs: Sequence[Run]) -> Markup:
    """Return the calibration errors and the reliability plot of every test split."""
    groups = by_recipe(runs)
    id_split, ood_splits = scatter_splits(runs)
    splits = [*ood_splits[:MOST_SPLITS], *([id_split] if id_split else [])]
    title = "Calibration"
    errors = _error_table(groups, splits)
    figures, missing = [], []
    for number, split in enumerate(splits):
        lines = {index: bins for index, seeds in enumerate(groups.values()) if (bins := _reliable_bins(seeds, split))}
        if not lines:
            missing.append(split)
            continue
        told = "; ".join(
            f"{name}: {', '.join(f'{100 * bin.confidence:.0f} to {100 * bin.accuracy:.0f}' for bin in lines[index])}"
            for index, name in enumerate(groups)
            if index in lines
        )
        alt = plain(f"Reliability on {split}: confidence to accuracy in percent. {told}")
        figures.append(figure(Markup(reliability_plot(lines, name=f"r{number}", alt=alt)), f"Reliability on {split}."))
    if not errors and not figures:
        return section("calibration", title, paragraph("The run folders hold neither calibration errors nor predictions."))
    parts: list[object] = [
        paragraph(
            "Is a model that is 80 % sure right in 80 % of the cases? Points below the dashed diagonal: too sure; above:",
            "not sure enough. Finetuned models (alpha = 1), the images of all seeds together, in",
            f"{CALIBRATION_BINS} bins of equal width; bins with fewer than {FEWEST_IN_BIN} images are not drawn. ECE, the",
            "expected calibration error, is the mean distance from the diagonal over images.",
            class_="note",
        ),
        errors,
    ]
    if missing:
        parts.append(paragraph(f"No reliability plot, for want of predictions: {', '.join(missing)}.", class_="note"))
    if figures:
        parts += [legend(list(groups)), _grid(figures)]
    return section("calibration", title, *parts)


def _reliable_bins(seeds: Sequence[Run], split: str) -> list[Bin]:
    return [bin for bin in reliability_of(seeds, split) if bin.n >= FEWEST_IN_BIN]


def _error_table(groups: Mapping[str, Sequence[Run]], splits: Sequence[str]) -> Markup:
    """Return the table of calibration errors; nothing where none was computed."""
    lines, any_found = [], False
    for number, (name, seeds) in enumerate(groups.items()):
        line: list[object] = [join([Markup(glyph(number)), name], " ")]
        for split in splits:
            values = [
                float(row["ece"])
                for run in seeds
                for row in run.results["results"]
                if row["split"] == split and row["wise_alpha"] == 1 and _is_number(row.get("ece"))
            ]
            any_found = any_found or bool(values)
            found = summarise(values) if values else None
            spread = f" ± {100 * found.deviation:.1f}" if found and found.deviation is not None else ""
            line.append(f"{100 * found.mean:.1f}{spread}" if found else NOTHING)
        lines.append(line)
    caption = "Expected calibration error (ECE) in percent, mean ± sd over seeds; lower is better"
    return table(caption, ["condition", *splits], lines, class_="marked", seen=caption) if any_found else Markup("")


def curves_chapter(runs: Sequence[Run]) -> Markup:
    """Return the curves of the logged quantities; one that is constant over the run is told in a line instead."""
    groups = by_recipe(runs)
    names = list(groups)
    figures, missing, constant = [], [], []
    for quantity, (y_label, percent, meaning) in QUANTITIES.items():
        lines = {}
        for number, seeds in enumerate(groups.values()):
            rows = [
                [(row["step"], float(row[quantity])) for row in run.metrics if _is_number(row.get(quantity))] for run in seeds
            ]
            if any(rows):
                lines[number] = mean_curve([found for found in rows if found])
        what, caption = y_label.partition(",")[0], meaning
        if not lines:
            missing.append(what)
            continue
        if all(_is_constant(line) for line in lines.values()):
            constant.append(f"{what} ({_values(lines, names, percent)})")
            continue
        last = "; ".join(f"{names[n]}: {line.mean[-1]:.3g} at step {line.steps[-1]}" for n, line in lines.items())
        alt = plain(f"{caption} {last}")
        if len(lines) > 1 and all(line == next(iter(lines.values())) for line in lines.values()):
            caption = f"{caption} The same in all conditions that log it: one line is drawn."
            lines = dict([next(iter(lines.items()))])
        drawing = curves(lines, y_label=y_label, name=f"c{quantity[:2]}", alt=alt, percent=percent)
        figures.append(figure(Markup(drawing), caption))
    parts = [paragraph("Lines: means over seeds; bands: from the lowest to the highest seed.", class_="note")] if figures else []
    if missing:
        parts.append(paragraph(f"Not logged by these runs: {', '.join(missing)}.", class_="note"))
    if constant:
        parts.append(paragraph(f"Constant over the logged steps, so not drawn: {'; '.join(constant)}.", class_="note"))
    if figures:
        parts += [legend(names), _grid(figures)]
    return section("training", "Training", *parts)


def _is_constant(line: Curve) -> bool:
    """Return whether a line has one value at all steps, for every seed the same or not."""
    return all(len(set(values)) < 2 for values in (line.mean, line.low, line.high))


def _values(lines: Mapping[int, Curve], names: Sequence[str], percent: bool) -> str:
    """Return the constant of every condition; one value where all have the same."""
    shown = {names[n]: f"{100 * line.mean[0]:.0f} %" if percent else f"{line.mean[0]:.3g}" for n, line in lines.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{name}: {value}" for name, value in shown.items())


def _num_points(paths: Mapping[int, Sequence[Path2D]]) -> int:
    """Return the number of distinct points of a figure."""
    return len({point for found in paths.values() for path in found for point in zip(path.x, path.y, strict=True)})


def split_number(splits: Sequence[str], split: str) -> int:
    """Return the position of a split, which goes into the identifiers of its figures."""
    return list(splits).index(split)


def _end(paths: Sequence[Path2D]) -> str:
    x, y = (sum(getattr(path, axis)[-1] for path in paths) / len(paths) for axis in "xy")
    return f"{100 * x:.1f}, {100 * y:.1f}"


def _grid(figures: Sequence[Markup]) -> Markup:
    return element("div", join(figures), class_="figures")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
