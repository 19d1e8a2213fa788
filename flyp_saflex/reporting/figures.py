"""Chapters of the page with figures: ID against OOD with WiSE-FT paths, and training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flyp_saflex.reporting.html import Markup, element, figure, join, paragraph, plain, section
from flyp_saflex.reporting.plots import Path2D, curves, glyph, mean_curve, scatter
from flyp_saflex.reporting.runs import Run, by_recipe
from flyp_saflex.tables import METRICS

SCATTERED = ("accuracy", "macro_f1")
"""Metrics with a plot of OOD against ID."""
MOST_SPLITS = 3
QUANTITIES = {
    "loss": ("loss", False, "Training loss. Comparable between conditions only if they train on the same images and weights."),
    "lr": ("learning rate", False, "Learning rate."),
    "kept_fraction": ("augmented images kept, %", True, "Share of a batch's augmented images whose weight is above zero."),
    "label_entropy": ("entropy, nats", False, "Entropy of the learned soft labels; 0: one class has it all."),
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
    for split in ood_splits[:MOST_SPLITS]:
        for metric in SCATTERED:
            words = METRICS[metric].title
            paths: dict[int, list[Path2D]] = {}
            for number, seeds in enumerate(groups.values()):
                found = [path for run in seeds if (path := path_of(run.results, id_split, split, metric)) is not None]
                if found:
                    paths[number] = found
                    swept = swept or any(len(path.alphas) > 1 for path in found)
            if not paths:
                continue
            ends = "; ".join(f"{name}: {_end(paths[n])}" for n, name in enumerate(groups) if n in paths)
            drawing = scatter(
                paths,
                x_label=plain(f"{id_split}, %"),
                y_label=plain(f"{split}, %"),
                name=f"f{split_number(ood_splits, split)}{metric[0]}",
                alt=plain(f"{words} in percent, {id_split} (in distribution) against {split} (out of distribution). {ends}"),
            )
            figures.append(figure(Markup(drawing), f"{words}: {id_split} against {split}."))
    left_out = ood_splits[MOST_SPLITS:]
    note = (
        "Up and to the right is better. Large marks: finetuned models, means over seeds; faint ones: single seeds."
        + (
            " Lines: WiSE-FT, from the smallest alpha evaluated to the finetuned weights; a ring: the alpha chosen."
            if swept
            else ""
        )
        + (f" Not drawn: {', '.join(left_out)}." if left_out else "")
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


def curves_chapter(runs: Sequence[Run]) -> Markup:
    """Return the curves of loss, learning rate, kept fraction and label entropy, as far as they were logged."""
    groups = by_recipe(runs)
    figures, missing = [], []
    for quantity, (y_label, percent, caption) in QUANTITIES.items():
        lines = {}
        for number, seeds in enumerate(groups.values()):
            rows = [
                [(row["step"], float(row[quantity])) for row in run.metrics if _is_number(row.get(quantity))] for run in seeds
            ]
            if any(rows):
                lines[number] = mean_curve([found for found in rows if found])
        if not lines:
            missing.append(y_label.partition(",")[0])
            continue
        last = "; ".join(
            f"{name}: {lines[n].mean[-1]:.3g} at step {lines[n].steps[-1]}" for n, name in enumerate(groups) if n in lines
        )
        alt = plain(f"{caption} {last}")
        figures.append(figure(Markup(curves(lines, y_label=y_label, name=f"c{quantity[:2]}", alt=alt, percent=percent)), caption))
    parts = [paragraph("Lines: means over seeds; bands: from the lowest to the highest seed.", class_="note")]
    if missing:
        parts.append(paragraph(f"Not logged by these runs: {', '.join(missing)}.", class_="note"))
    if figures:
        parts += [legend(list(groups)), _grid(figures)]
    return section("training", "Training", *parts)


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
