"""The report as one self-contained HTML page: no script, no network, light and dark.

A content security policy forbids the page to load anything, so the browser enforces "self-contained" as well. The page does
not depend on time or machine: the same runs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from flyp_saflex import __version__
from flyp_saflex.reporting.chapters import gallery_chapter, results_chapter
from flyp_saflex.reporting.figures import calibration_chapter, curves_chapter, scatter_chapter
from flyp_saflex.reporting.gallery import Gallery, gallery
from flyp_saflex.reporting.html import Markup, element, join, paragraph, text
from flyp_saflex.reporting.mistakes import mistakes_chapter
from flyp_saflex.reporting.provenance import provenance_chapter
from flyp_saflex.reporting.published import MARK, Published, published_chapter
from flyp_saflex.reporting.runs import Preface, Run, by_recipe, read_runs
from flyp_saflex.reporting.tables import Cell

MOST_GALLERIES = 3
"""Most runs with a gallery: the first seed of each of so many conditions that learned weights."""
CHAPTERS = {
    "results": "Results",
    "scatter": "ID against OOD",
    "calibration": "Calibration",
    "training": "Training",
    "gallery": "Gallery",
    "mistakes": "Mistakes",
    "provenance": "What was run",
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
    results: Mapping[Path, dict[str, Any]],
    found: Sequence[Cell],
    remarks: Sequence[str],
    baseline: str,
    preface: Preface,
    literature: Sequence[Published] = (),
) -> str:
    """Return the page as HTML.

    Args:
        results: results.json by run folder.
        found: cells from `tables.cells`.
        remarks: remarks from `tables.notes` and `seeds.seed_notes`.
        baseline: recipe that the other ones are compared with.
        preface: paragraphs at the top; a leading question is set in bold.
        literature: published figures, in a chapter of their own.
    """
    runs = read_runs(results)
    names = list(by_recipe(runs))
    one_seed = ["One seed per condition: differences of a few points are noise."] if _single(found) else []
    every = [*one_seed, *remarks, *(remark for run in runs for remark in run.remarks)]
    chapters = [
        results_chapter(found, every, baseline, names),
        scatter_chapter(runs),
        calibration_chapter(runs),
        curves_chapter(runs),
        gallery_chapter(_galleries(runs)),
        mistakes_chapter(runs, baseline),
        provenance_chapter(runs, baseline),
        *([published_chapter(literature)] if literature else []),
    ]
    style = (resources.files("flyp_saflex.assets") / "report.css").read_text(encoding="utf-8")
    titles = CHAPTERS | ({"published": MARK} if literature else {})
    links = join((element("a", title, href=f"#{identity}") for identity, title in titles.items()), "\n")
    head = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{text(_title(names))}</title>
<style>
{style}</style>
</head>
"""
    top = [*map(_answer, preface.paragraphs), _lead(runs, baseline)]
    body = [
        element("header", join([element("h1", "flyp-saflex report"), *top, element("nav", links, aria_label="Chapters")])),
        element("main", join(chapters)),
        element("footer", paragraph(f"Made by flyp-saflex {__version__}: flyp-saflex report RUN... --out FILE.html")),
    ]
    return f"{head}{element('body', join(['', *body, '']))}\n</html>\n"


def _lead(runs: Sequence[Run], baseline: str) -> Markup:
    groups = by_recipe(runs)
    counts = sorted({len(seeds) for seeds in groups.values()})
    seeds = (
        f"{counts[0]} to {counts[-1]} seeds each" if len(counts) > 1 else f"{counts[0]} seed{'s' if counts[0] > 1 else ''} each"
    )
    what = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {len(groups)} condition{'s' if len(groups) > 1 else ''}, {seeds}"
    configs = [run.config for run in runs if run.config is not None]
    data = " and ".join(dict.fromkeys(config.data.name for config in configs))
    models = " and ".join(dict.fromkeys(config.model.name.rpartition("/")[2] for config in configs))
    where = f" on {data}, starting from {models}" if configs else ""
    return paragraph(f"{what}{where}. Baseline:", element("b", baseline), class_="lead")


def _answer(sentence: str) -> Markup:
    question, mark, answer = sentence.partition("?")
    return paragraph(element("b", f"{question}?"), answer.strip()) if mark else paragraph(sentence, class_="note")


def _galleries(runs: Sequence[Run]) -> list[Gallery]:
    made: list[Gallery] = []
    for first, *_ in by_recipe(runs).values():
        if len(made) < MOST_GALLERIES and (found := gallery(first)) is not None:
            made.append(found)
    return made


def _title(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''} - flyp-saflex report"


def _single(found: Sequence[Cell]) -> bool:
    return all(cell.summary.n == 1 for cell in found)
