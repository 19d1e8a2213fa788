"""Figures of the page: drawn by matplotlib, as SVG with CSS variables for two colour schemes.

matplotlib has one colour per element, a page has two schemes. So figures are drawn in placeholder colours (`STANDS_FOR`),
which are replaced by `var(--...)` afterwards. Series differ in colour *and* in markers and dashes, so they can be told apart
without colours. Text stays text: it can be selected, is read aloud, and has the reader's own font.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flyp_saflex.evaluation.calibration import Bin

SERIES = 7
"""Colours `--s0` .. `--s6` of the stylesheet; the eighth condition has the first colour again, with another marker."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ROUND = [1, 2, 2.5, 5, 10]
"""Steps between ticks, times a power of ten."""
DASHES = ("-", (0, (5, 1.5)), (0, (2, 1)), (0, (6, 1.5, 1.5, 1.5)))
GRID = "#020202"
STANDS_FOR = {"#000000": "currentColor", GRID: "var(--line)", "#ffffff": "var(--paper)"} | {
    f"#0300{k:02x}": f"var(--s{k})" for k in range(SERIES)
}
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flyp-saflex",  # identifiers would differ from run to run
    "text.parse_math": False,  # a split may be called $x$
    "text.usetex": False,
    "font.size": 9,
    "text.color": "black",  # whatever the user's own matplotlibrc says: black is rewritten to the page's colour of text
    "axes.labelcolor": "black",
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.axisbelow": True,
    "path.simplify_threshold": 0.3,
}
NUMBER = re.compile(r"-?\d+\.\d+")
COLOUR = re.compile(r"#[0-9a-f]{6}")


@dataclass(frozen=True)
class Path2D:
    """Path of a run from the pretrained to the finetuned weights in one panel.

    Attributes:
        alphas: alphas of WiSE-FT, increasing; 1 is the finetuned model.
        x, y: metric in and out of distribution, fractions.
        chosen: the alpha that the run chose; None if it did not choose.
    """

    alphas: tuple[float, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    chosen: float | None = None


@dataclass(frozen=True)
class Curve:
    """One quantity of one condition over steps: mean, and the range over its seeds.

    Attributes:
        steps, mean, low, high: of equal length.
    """

    steps: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    low: tuple[float, ...] = field(default=())
    high: tuple[float, ...] = field(default=())


def scatter(paths: Mapping[int, Sequence[Path2D]], *, x_label: str, y_label: str, name: str, alt: str) -> str:
    """Draw ID against OOD as SVG: seeds faint, the mean over seeds bold, the finetuned end marked.

    Args:
        paths: paths of the seeds by number of the condition.
        x_label: title of the ID axis.
        y_label: title of the OOD axis.
        name: prefix of the figure's identifiers; every figure of a page needs its own.
        alt: text alternative of the figure.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6, 3.7), layout="constrained")
        axes = figure.subplots()
        for number, seeds in paths.items():
            colour, marker = _colour(number), MARKERS[number % len(MARKERS)]
            for seed in seeds if len(seeds) > 1 else ():
                axes.plot(_percent(seed.x), _percent(seed.y), color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(_percent(seed.x[-1:]), _percent(seed.y[-1:]), marker, color=colour, alpha=0.35, markersize=4)
            mean = mean_path(seeds)
            x, y = _percent(mean.x), _percent(mean.y)
            axes.plot(x, y, color=colour, linewidth=1.6, marker=".", markersize=5)
            axes.plot(x[-1:], y[-1:], marker, color=colour, markersize=8.5, markeredgecolor="#ffffff", markeredgewidth=0.8)
            if mean.chosen is not None:
                at = mean.alphas.index(mean.chosen)
                axes.plot(x[at], y[at], "o", color="none", markeredgecolor=colour, markersize=13, markeredgewidth=1.3)
        axes.margins(0.12)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _few_ticks(axes)
        return _svg(figure, name, alt)


def mean_path(seeds: Sequence[Path2D]) -> Path2D:
    """Average paths at the alphas that all seeds have; `chosen` is kept if all seeds chose the same alpha."""
    shared = [alpha for alpha in seeds[0].alphas if all(alpha in seed.alphas for seed in seeds)]
    x, y = (
        tuple(sum(getattr(seed, axis)[seed.alphas.index(alpha)] for seed in seeds) / len(seeds) for alpha in shared)
        for axis in "xy"
    )
    chosen = {seed.chosen for seed in seeds}
    same = next(iter(chosen)) if len(chosen) == 1 else None
    return Path2D(tuple(shared), x, y, same if same in shared else None)


def curves(lines: Mapping[int, Curve], *, y_label: str, name: str, alt: str, percent: bool = False) -> str:
    """Draw one quantity over training steps as SVG: a line per condition, with a band over its seeds."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.subplots()
        factor = 100.0 if percent else 1.0
        for number, line in lines.items():
            colour, dashes = _colour(number), DASHES[number % len(DASHES)]
            mean, low, high = ([factor * value for value in values] for values in (line.mean, line.low, line.high))
            if low != high:
                axes.fill_between(line.steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(line.steps, mean, color=colour, linestyle=dashes, linewidth=1.5, marker="." if len(mean) == 1 else "")
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        if percent:
            axes.set_ylim(-3, 103)
        elif max((max(line.mean) for line in lines.values()), default=0.0) == 0:
            axes.set_ylim(-0.05, 1)  # a line at zero shall look like zero, not like noise around it
        _few_ticks(axes)
        return _svg(figure, name, alt)


def reliability_plot(lines: Mapping[int, Sequence[Bin]], *, name: str, alt: str) -> str:
    """Draw accuracy against confidence as SVG: a line per condition, marks as large as their share of images.

    Args:
        lines: bins by number of the condition.
        name: prefix of the figure's identifiers.
        alt: text alternative of the figure.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.6, 3.7), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=GRID, linewidth=1.2, linestyle=DASHES[1])
        for number, bins in lines.items():
            colour = _colour(number)
            total = sum(bin.n for bin in bins)
            x, y = _percent([bin.confidence for bin in bins]), _percent([bin.accuracy for bin in bins])
            axes.plot(x, y, color=colour, linewidth=1.1, linestyle=DASHES[number % len(DASHES)])
            areas = [14 + 130 * bin.n / total for bin in bins]
            axes.scatter(x, y, s=areas, color=colour, marker=MARKERS[number % len(MARKERS)], edgecolors="#ffffff", linewidths=0.6)
        axes.set_xlim(0, 102)
        axes.set_ylim(-2, 102)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel("accuracy, %")
        _few_ticks(axes)
        return _svg(figure, name, alt)


def mean_curve(runs: Sequence[Sequence[tuple[int, float]]], *, points: int = 150) -> Curve:
    """Average (step, value) pairs over seeds.

    Args:
        runs: finite values by step, per seed.
        points: longer series are thinned to at most this many steps, and the last one.
    """
    by_step: dict[int, list[float]] = {}
    for rows in runs:
        for step, value in rows:
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    stride = max(1, -(-len(steps) // points))
    steps = [*steps[:-1:stride], steps[-1]] if steps else []
    values = [by_step[step] for step in steps]
    means = tuple(sum(found) / len(found) for found in values)
    return Curve(tuple(steps), means, tuple(map(min, values)), tuple(map(max, values)))


def glyph(number: int, *, hollow: bool = False) -> str:
    """Return a small inline SVG of a condition's colour and marker; `hollow` marks its WiSE-FT variant."""
    shapes = {
        "o": '<circle cx="6" cy="6" r="4.2"/>',
        "s": '<path d="M2.2 2.2h7.6v7.6H2.2z"/>',
        "^": '<path d="M6 1.4 10.8 10H1.2z"/>',
        "D": '<path d="M6 .8 11.2 6 6 11.2.8 6z"/>',
        "v": '<path d="M6 10.6 1.2 2h9.6z"/>',
        "P": '<path d="M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z"/>',
        "X": '<path d="M3.2 1 6 3.8 8.8 1 11 3.2 8.2 6 11 8.8 8.8 11 6 8.2 3.2 11 1 8.8 3.8 6 1 3.2z"/>',
        "*": '<path d="m6 .6 1.5 3.6 3.9.3-3 2.5 1 3.8L6 8.8l-3.4 2 1-3.8-3-2.5 3.9-.3z"/>',
    }
    shape = shapes[MARKERS[number % len(MARKERS)]]
    colour = f"var(--s{number % SERIES})"
    style = f"fill: none; stroke: {colour}; stroke-width: 1.6" if hollow else f"fill: {colour}"
    return f'<svg class="glyph" viewBox="0 0 12 12" aria-hidden="true" style="{style}">{shape}</svg>'


def _colour(number: int) -> str:
    return f"#0300{number % SERIES:02x}"


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _few_ticks(axes: Axes) -> None:
    """Place 4 to 9 round ticks on each axis: neighbouring steps differ by a factor of at most 2."""
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=ROUND, integer=axes.get_xlabel() == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=ROUND))
    axes.tick_params(length=0)


def _svg(figure: Figure, name: str, alt: str) -> str:
    """Return the figure as an SVG element: no metadata, unique identifiers, CSS variables, coordinates to a tenth."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib only measures the text, in its own font; the browser draws it, with the reader's fonts (CJK names).
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    used = {
        match for element in root.iter() for value in element.attrib.values() for match in re.findall(r"#([\w.-]+)\)?$", value)
    }
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = element.text if element.tag == "text" else None
        element.tail = None
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            short = key.rpartition("}")[2]
            if (short == "id" and value not in used) or (short == "transform" and value.startswith("rotate(-0 ")):
                continue
            element.set(short, _attribute(short, value, name))
    root.attrib = {"class": "plot", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "style":
        parts = [part for part in value.split("; ") if not part.startswith("font-family")]
        return COLOUR.sub(lambda match: STANDS_FOR.get(match[0], match[0]), "; ".join(parts))
    value = re.sub(r"#(?=[\w.-]+\)?$)", f"#{name}-", value)
    if key in ("d", "x", "y", "transform"):
        value = " ".join(NUMBER.sub(lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value).split())
    return value
