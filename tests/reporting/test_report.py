"""The report: numbers by hand and by scipy, groups by recipe and seed, forms, and mistakes."""

import csv
import io
import json
import subprocess
import sys

import pytest
from scipy import stats

from flyp_saflex.errors import RunError
from flyp_saflex.reporting.report import report
from flyp_saflex.storage.results import Results, align, read_results

PLAIN = {0: (0.80, 0.50), 1: (0.82, 0.54), 2: (0.84, 0.52)}
SAFLEX = {0: (0.81, 0.56), 1: (0.84, 0.58), 2: (0.84, 0.59)}


def write_run(root, recipe, seed, id_accuracy, ood_accuracy, *, wise=None, n=100, **extras):
    """Write a run with id_test and sketch at alpha = 1, and at another alpha `wise` better on sketch."""
    run = root / f"{recipe}-{seed}"
    run.mkdir(parents=True, exist_ok=True)

    def row(split, role, shift, alpha, accuracy):
        numbers = {"n": n, "accuracy": accuracy, "macro_f1": accuracy / 2, "worst_group_accuracy": accuracy / 4, "ece": 0.1}
        return {"split": split, "role": role, "shift": shift, "wise_alpha": alpha, **numbers, **extras}

    rows = [
        row("train", "train", "id", 1.0, 0.99),
        row("id_test", "test", "id", 1.0, id_accuracy),
        row("sketch", "test", "ood", 1.0, ood_accuracy),
    ]
    if wise is not None:
        rows.append(row("sketch", "test", "ood", 0.5, ood_accuracy + wise))
    result = {"recipe": recipe, "seed": seed, "results": rows, "chosen_alpha": None if wise is None else 0.5}
    (run / "results.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def runs(tmp_path):
    plain = [write_run(tmp_path, "plain", seed, *numbers) for seed, numbers in PLAIN.items()]
    return plain + [write_run(tmp_path, "saflex", seed, *numbers, wise=0.1) for seed, numbers in SAFLEX.items()]


def cells(text):
    return {(c["metric"], c["split"], c["recipe"], c["kind"]): c for c in json.loads(text)["cells"]}


def test_means_spreads_and_paired_intervals(runs):
    found = cells(report(runs, form="json"))
    plain = found["accuracy", "sketch", "plain", "finetuned"]
    assert plain["summary"] == {"mean": pytest.approx(0.52), "deviation": pytest.approx(0.02), "n": 3}
    assert plain["difference"] is None
    saflex = found["accuracy", "sketch", "saflex", "finetuned"]
    a, b = [v[1] for v in SAFLEX.values()], [v[1] for v in PLAIN.values()]
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert saflex["difference"] == {
        "mean": pytest.approx(0.17 / 3),
        "low": pytest.approx(interval.low),
        "high": pytest.approx(interval.high),
        "n": 3,
    }
    assert found["macro_f1", "sketch", "saflex", "finetuned"]["summary"]["mean"] == pytest.approx(sum(a) / 6)


def test_one_seed_has_the_bootstrap_interval_of_its_images(tmp_path):
    run = write_run(tmp_path, "a", 0, 0.5, 0.5, accuracy_interval=[0.41, 0.62])
    text = report([run])
    assert "50.0 [41.0, 62.0] (1)" in text
    assert "Note: [low, high] behind a value of one seed: 95 % bootstrap interval over the images" in text
    assert "[41.0" not in text[text.index("### Macro-F1") : text.index("### Worst")], "an interval belongs to one metric"
    assert cells(report([run], form="json"))["accuracy", "sketch", "a", "finetuned"]["interval"] == [0.41, 0.62]
    (row,) = [
        r for r in csv.DictReader(io.StringIO(report([run], form="csv"))) if (r["metric"], r["split"]) == ("accuracy", "sketch")
    ]
    assert (row["interval_low"], row["interval_high"]) == ("0.41", "0.62")


def test_several_seeds_have_a_spread_and_no_bootstrap_interval(tmp_path):
    runs = [write_run(tmp_path, "a", seed, 0.5, 0.5, accuracy_interval=[0.41, 0.62]) for seed in (0, 1)]
    text = report(runs)
    assert "bootstrap" not in text
    assert "50.0 ± 0.0 (2)" in text


@pytest.mark.parametrize("interval", [None, [], [0.4], [0.6, 0.4], "ab", [None, None]])
def test_interval_that_is_none_is_left_out(tmp_path, interval):
    assert "bootstrap" not in report([write_run(tmp_path, "a", 0, 0.5, 0.5, accuracy_interval=interval)])


def write_choice(root, seed, alpha):
    """Write a run that chose an alpha; only at alpha 1 the row is that of the finetuned model."""
    run = write_run(root, "a", seed, 0.5, 0.5, wise=0.1)
    result = json.loads((run / "results.json").read_text()) | {"chosen_alpha": alpha}
    (run / "results.json").write_text(json.dumps(result))
    return run


def test_alpha_1_is_one_row(tmp_path):
    runs = [write_choice(tmp_path, seed, 1.0) for seed in (0, 1)]
    for text in (report(runs), report(runs, form="html")):
        assert "a (WiSE-FT: alpha 1)" in text
        assert "a + WiSE-FT" not in text
    kinds = [cell["kind"] for cell in cells(report(runs, form="json")).values() if cell["split"] == "sketch"]
    assert kinds.count("wise") == kinds.count("finetuned"), "JSON and CSV keep both"


def test_seeds_that_chose_different_alphas_have_two_rows(tmp_path):
    text = report([write_choice(tmp_path, 0, 1.0), write_choice(tmp_path, 1, 0.5)])
    assert "a + WiSE-FT, alpha 0.5, 1" in text
    assert "WiSE-FT: alpha 1)" not in text


def test_wise_rows_stand_apart(runs):
    found = cells(report(runs, form="json"))
    wise = found["accuracy", "sketch", "saflex", "wise"]
    assert wise["alphas"] == [0.5]
    assert wise["summary"]["mean"] == pytest.approx(sum(v[1] for v in SAFLEX.values()) / 3 + 0.1)
    assert wise["difference"]["mean"] == pytest.approx(0.17 / 3 + 0.1)
    assert ("accuracy", "sketch", "plain", "wise") not in found
    assert found["accuracy", "sketch", "saflex", "finetuned"]["alphas"] == [1.0]


def test_tables_never_mix_id_and_ood_or_two_metrics_and_leave_train_out(runs, capsys):
    text = report(runs)
    assert capsys.readouterr().out == text
    tables = text.split("### ")[1:]
    assert len(tables) == 3 * 2 * 2  # metrics x shifts x (values, differences)
    for table in tables:
        assert ("id_test" in table) != ("sketch" in table)
        assert (table.startswith("Accuracy") + table.startswith("Macro-F1") + table.startswith("Worst-group")) == 1
    assert "train" not in text
    values, differences = (table for table in tables if table.startswith("Accuracy, out of"))
    assert "52.0 ± 2.0 (3)" in values
    assert "saflex + WiSE-FT, alpha 0.5" in values
    assert "+5.7 [+1.9, +9.5] (3)" in differences
    rows = [line for line in values.splitlines() if line.startswith("|")]
    assert len({len(line) for line in rows}) == 1, "columns line up in a terminal"
    assert len({line.count("|") for line in rows}) == 1


def test_baseline_can_be_named(runs):
    found = cells(report(runs, form="json", baseline="saflex"))
    assert found["accuracy", "id_test", "plain", "finetuned"]["difference"]["mean"] == pytest.approx(-0.01)
    assert found["accuracy", "sketch", "saflex", "wise"]["difference"]["mean"] == pytest.approx(0.1)
    with pytest.raises(
        RunError, match=r"--baseline saflx: no run has this recipe; did you mean 'saflex'\? \(recipes: plain, saflex\)"
    ):
        report(runs, baseline="saflx")


def test_one_seed_has_no_spread_and_unshared_seeds_no_difference(tmp_path):
    text = report([write_run(tmp_path, "a", 0, 0.5, 0.5), write_run(tmp_path, "b", 1, 0.6, 0.6)])
    assert "50.0 (1)" in text
    assert "±" not in text.replace("mean ± standard", "")
    assert "no shared seed" in text


def test_csv_has_a_row_per_cell(runs, tmp_path):
    out = tmp_path / "table.csv"
    text = report(runs, out=out)
    assert out.read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 3 * (2 * 2 + 1)
    row = next(
        r for r in rows if (r["metric"], r["split"], r["recipe"], r["kind"]) == ("accuracy", "id_test", "saflex", "finetuned")
    )
    assert float(row["mean"]) == pytest.approx(0.83)
    assert float(row["difference"]) == pytest.approx(0.01)
    assert (row["n"], row["pairs"], row["seeds"], row["baseline"]) == ("3", "3", "0 1 2", "plain")


def test_html_is_made_for_a_name_that_ends_in_html(tmp_path, capsys):
    out = tmp_path / "page.html"
    report([write_run(tmp_path, "a<b", 0, 0.5, 0.5)], out=out)
    text = out.read_text()
    assert text.startswith("<!doctype html>")
    assert "a&lt;b" in text
    assert "a<b" not in text
    assert text.count("<table") == text.count("</table>") >= 6
    assert capsys.readouterr().out == f"wrote {out}\n"


def test_notes_tell_what_is_not_comparable(tmp_path):
    runs = [
        write_run(tmp_path, "a", 0, 0.5, 0.5, n=100),
        write_run(tmp_path, "b", 0, 0.5, 0.5, n=20, limit=20, overrides=["data.box_crop=true"]),
    ]
    text = report(runs)
    assert f"Note: {runs[1]}: evaluated with --limit" in text
    assert f"Note: {runs[1]}: evaluated with --set data.box_crop=true" in text
    assert "Note: sketch: runs differ in the number of images (100, 20)" in text
    assert "Note" not in report(runs[:1])


def test_worst_group_tables_are_left_out_where_every_split_is_one_group(tmp_path):
    runs = [write_run(tmp_path, "a", 0, 0.5, 0.75, worst_group_accuracy=0.5)]
    text = report(runs)
    assert "Worst-group accuracy, in distribution" not in text
    assert "Worst-group accuracy, out of distribution" in text
    assert ("worst_group_accuracy", "id_test", "a", "finetuned") in cells(report(runs, form="json"))


def test_mistakes_are_named(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(RunError, match=r"raw has no results.json: run `flyp-saflex evaluate .*raw` first"):
        report([tmp_path / "raw"])
    (tmp_path / "raw" / "results.json").write_text('{"recipe": "x"}')
    with pytest.raises(RunError, match=r"results.json is not what evaluate writes \(KeyError"):
        report([tmp_path / "raw"])
    (tmp_path / "raw" / "results.json").write_text('{"recipe": ')
    with pytest.raises(RunError, match=r"results.json is not what evaluate writes"):
        report([tmp_path / "raw"])
    same = [write_run(tmp_path / "one", "a", 0, 0.5, 0.5), write_run(tmp_path / "two", "a", 0, 0.6, 0.6)]
    with pytest.raises(RunError, match=r"both recipe 'a' with seed 0: give one of them.*--set recipe=a-variant"):
        report(same)
    report([same[0], same[0]], form="json")  # the same folder twice is one run


def row(split, alpha, accuracy, **extras):
    role = "select" if split == "val" else "test"
    numbers = {"accuracy": accuracy, "macro_f1": accuracy, "worst_group_accuracy": accuracy, "ece": 0.0, "n": 10}
    return {"split": split, "role": role, "shift": "id", "wise_alpha": alpha, **numbers, **extras}


def results(path, select="val"):
    return Results(path, recipe="r", seed=0, order=["val", "test"], select_split=select, select_metric="accuracy")


def test_results_choose_the_larger_of_equal_alphas_and_keep_the_choice(tmp_path):
    first = results(tmp_path)
    first.add([row("test", 1.0, 0.1), row("val", 0.0, 0.5), row("val", 0.5, 0.7), row("val", 0.75, 0.7), row("val", 1.0, 0.6)])
    assert first.chosen_alpha == 0.75
    first.write()
    later = results(tmp_path, select="")
    later.add([row("test", 1.0, 0.2)])
    assert [(r["split"], r["wise_alpha"]) for r in later.rows] == [
        ("val", 0.0),
        ("val", 0.5),
        ("val", 0.75),
        ("val", 1.0),
        ("test", 1.0),
    ]
    assert later.rows[-1]["accuracy"] == 0.2
    assert later.chosen_alpha == 0.75
    later.write()
    assert read_results(tmp_path)["chosen_alpha"] == 0.75


def test_results_never_choose_on_a_test_split(tmp_path):
    found = results(tmp_path, select="test")
    found.add([row("test", 0.5, 0.9), row("test", 1.0, 0.1)])
    assert found.chosen_alpha is None


def test_the_report_needs_no_torch():
    code = "import sys, flyp_saflex.reporting.report as r; sys.exit('torch' in sys.modules or not r.RENDERERS)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_align_pads_to_columns():
    assert align([("a", "bb"), ("ccc", "d")], left=1) == "a    bb\nccc   d"
