"""Figures: none is empty or drawn twice, axes have ticks, names outside of Latin script stay text."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flyp_saflex.reporting import plots
from flyp_saflex.reporting.figures import calibration_chapter, curves_chapter, scatter_chapter
from flyp_saflex.reporting.plots import Path2D
from flyp_saflex.reporting.runs import Run


def run(recipe="a", *, rows=(), metrics=(), seed=0, path=Path("nowhere")):
    return Run(path, recipe, seed, {"results": list(rows)}, metrics=list(metrics))


def row(split, shift, accuracy, f1, alpha=1.0, **extras):
    return {"split": split, "role": "test", "shift": shift, "wise_alpha": alpha, "accuracy": accuracy, "macro_f1": f1, **extras}


def series(**columns):
    return [
        {"step": step, **dict(zip(columns, values, strict=True))}
        for step, values in enumerate(zip(*columns.values(), strict=True))
    ]


def drawings(chapter):
    return chapter.count('class="plot"')


def test_constant_quantity_is_told_and_not_drawn():
    chapter = curves_chapter([run(metrics=series(loss=[3, 2, 1], rho=[0.25] * 3, kept_fraction=[1.0] * 3))])
    assert drawings(chapter) == 1
    assert "Constant over the logged steps, so not drawn: augmented images kept (100 %); rho (25 %)." in chapter


def test_quantity_that_varies_in_one_condition_is_drawn():
    runs = [run(metrics=series(rho=[0.25, 0.25])), run("b", metrics=series(rho=[0.25, 0.3]))]
    chapter = curves_chapter(runs)
    assert drawings(chapter) == 1
    assert "rho, %" in chapter


def test_constants_that_differ_between_conditions_are_told_by_name():
    chapter = curves_chapter([run(metrics=series(rho=[0.25, 0.25])), run("b", metrics=series(rho=[0.5, 0.5]))])
    assert "rho (a: 25 %, b: 50 %)" in chapter


def test_same_curve_in_all_conditions_is_one_line():
    same = [run(name, metrics=series(lr=[2.0, 1.0])) for name in "ab"]
    chapter = curves_chapter(same)
    assert "one line is drawn" in chapter
    lines = len(re.findall(r"stroke: var\(--s\d\)", chapter))
    other = curves_chapter([same[0], run("b", metrics=series(lr=[2.0, 1.5]))])
    assert len(re.findall(r"stroke: var\(--s\d\)", other)) == lines + 1


def test_single_point_is_no_figure():
    chapter = scatter_chapter([run(rows=[row("id_test", "id", 0.9, 0.8), row("far", "ood", 0.5, 0.4)])])
    assert drawings(chapter) == 0
    assert "a single point: see the tables" in chapter


def test_figure_with_the_same_content_is_drawn_once():
    runs = [run(name, rows=[row("id_test", "id", x, x), row("far", "ood", x / 2, x / 2)]) for name, x in (("a", 0.9), ("b", 0.8))]
    chapter = scatter_chapter(runs)
    assert drawings(chapter) == 1
    assert "Macro-F1, id_test against far (the same as Accuracy, id_test against far)" in chapter


@pytest.mark.parametrize("centre", [3.0, 47.7, 96.0])
@pytest.mark.parametrize("width", [0.1, 0.4, 1.3, 2.6, 5.1, 9.9, 33.0])
def test_ood_axis_has_at_least_four_ticks(centre, width):
    low, high = max(0.0, centre - width / 2) / 100, min(100.0, centre + width / 2) / 100
    drawn = plots.scatter({0: [Path2D((0.0, 1.0), (0.5, 0.6), (low, high))]}, x_label="x", y_label="y", name="n", alt="")
    ends = re.findall(r"text-anchor: end[^>]*>[^<]*\d", drawn)  # labels of the vertical axis
    assert 4 <= len(ends) <= 10, ends


def test_cjk_names_stay_text_and_no_warning_is_shown(recwarn):
    drawn = plots.scatter(
        {0: [Path2D((0.0, 1.0), (0.5, 0.6), (0.3, 0.4))]}, x_label="域内, %", y_label="हिन्दी 시험, %", name="n", alt="域外"
    )
    assert "域内, %</text>" in drawn
    assert "हिन्दी 시험, %</text>" in drawn
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def predictions(path, split, confidences, right):
    (path / "predictions").mkdir(parents=True)
    columns = {"label": [0] * len(right), "prediction": [int(not r) for r in right], "confidence": confidences}
    pq.write_table(pa.table(columns | {"alpha": [1.0] * len(right)}), path / "predictions" / f"{split}.parquet")


def test_calibration_error_and_reliability_are_those_of_the_predictions(tmp_path):
    predictions(tmp_path, "far", [0.9] * 10 + [0.5] * 10 + [0.1], [True] * 7 + [False] * 3 + [True] * 6 + [False] * 5)
    rows = [
        row("id_test", "id", 0.9, 0.8, ece=0.01),
        row("far", "ood", 0.5, 0.4, ece=0.1519),
        row("far", "ood", 0.5, 0.4, 0.5, ece=0.9),
    ]
    chapter = calibration_chapter([run(rows=rows, path=tmp_path)])
    assert drawings(chapter) == 1
    assert "90 to 70" in chapter
    assert "50 to 60" in chapter
    assert "10 to 0" not in chapter, "a bin of one image is not drawn"
    assert "<td>15.2</td>" in chapter
    assert "<td>1.0</td>" in chapter
    assert "90.0</td>" not in chapter, "alpha 0.5 is another model"
    assert "for want of predictions: id_test" in chapter


def test_calibration_without_any_file_says_so():
    chapter = calibration_chapter([run(rows=[row("far", "ood", 0.5, 0.4)])])
    assert "neither calibration errors nor predictions" in chapter
