"""Published figures: as their sources print them, apart from our runs, and only where the data is the same."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from flyp_saflex.data.medmnist import published_sets
from flyp_saflex.errors import RunError
from flyp_saflex.reporting.published import published
from flyp_saflex.reporting.report import report
from flyp_saflex.tables import METRICS


def run_on(root: Path, dataset: str, seed: int = 0) -> Path:
    run = root / f"{dataset}-{seed}"
    run.mkdir()
    row = {"split": "test", "role": "test", "shift": "ood", "wise_alpha": 1.0, "n": 9, "accuracy": 0.5, "macro_f1": 0.25}
    (run / "results.json").write_text(json.dumps({"recipe": "ours", "seed": seed, "results": [row]}), encoding="utf-8")
    record = {"name": dataset, "class_names": ["a"], "templates": ["{}"], "fingerprint": "x", "images": "y", "splits": {}}
    (run / "data.json").write_text(json.dumps(record), encoding="utf-8")
    return run


def test_every_row_names_its_source_and_a_metric_of_ours():
    rows = published()
    assert len({(row.dataset, row.split, row.metric, row.method, row.model) for row in rows}) == len(rows)
    for row in rows:
        assert row.metric in METRICS
        assert 0 < float(row.percent) < 100
        assert "arXiv" in row.source


def test_tables_7_and_8_are_those_of_the_appendix(shared_dir: Path):
    lines = (shared_dir / "paper" / "saflex_appendix.txt").read_text(encoding="utf-8").splitlines()
    wanted = {"Crop": "Crop", "Soft Augmentation (w/ Crop)": "Soft-Augmentation with crop", "LP-A3": "LP-A3"}
    ours = {name: [row.value for row in published() if row.method == name] for name in wanted.values()}
    found = {wanted[line.split("\t")[0]]: line.split("\t")[1:] for line in lines if line.split("\t")[0] in wanted}
    assert ours == found
    assert all(len(values) == 8 for values in ours.values())


def test_figures_on_medical_images_stand_beside_runs_of_the_reader(tmp_path: Path):
    sets = {f"medmnist-{name}" for name in published_sets()}
    assert {row.dataset for row in published() if "table 7" in row.source or "table 8" in row.source} <= sets
    text = report([run_on(tmp_path, "medmnist-derma")], published=True)
    _, literature = text.split("\n---\n")
    assert "### Literature, not our runs: Accuracy on medmnist-derma" in literature
    assert "76.22 ± 0.27" in literature


def test_figures_stand_below_ours_and_are_marked(tmp_path: Path):
    text = report([run_on(tmp_path, "iwildcam")], published=True)
    ours, literature = text.split("\n---\n")
    assert "FLYP" not in ours
    assert "### Literature, not our runs: Macro-F1 on iwildcam" in literature
    assert "35.6" in literature
    assert "medmnist" not in literature
    assert literature.rstrip().endswith("No difference is computed with them.")


def test_without_the_option_a_report_has_none(tmp_path: Path):
    run = run_on(tmp_path, "iwildcam")
    for form in ("md", "csv", "json", "html"):
        assert "arXiv" not in report([run], form=form)


def test_other_forms_mark_them_too(tmp_path: Path):
    run = run_on(tmp_path, "iwildcam")
    table = list(csv.DictReader(io.StringIO(report([run], form="csv", published=True))))
    drm = next(row for row in table if row["recipe"] == "DRM (ViT-B/16)" and row["split"] == "test")
    assert (drm["kind"], float(drm["mean"]), drm["n"]) == ("published", pytest.approx(0.405), "")
    assert "arXiv 2411.19757" in drm["notes"]
    assert {row["kind"] for row in table if row["recipe"] == "ours"} == {"finetuned"}
    found = json.loads(report([run], form="json", published=True))
    assert {cell["recipe"] for cell in found["cells"]} == {"ours"}
    assert len(found["published"]) == 16
    page = report([run], form="html", published=True)
    assert 'href="#published"' in page
    assert '<section id="published">' in page


def test_data_without_published_figures_is_told_in_one_line(tmp_path: Path):
    with pytest.raises(
        RunError, match=r"--published: no published figure is known .*\(folder\); known are iwildcam, medmnist-path"
    ) as caught:
        report([run_on(tmp_path, "folder")], published=True)
    assert "\n" not in str(caught.value)
