"""Seeds of one condition: the same data and the same options, in every form of the report."""

import csv
import io

import pytest
from test_report import write_run

from flyp_saflex.errors import RunError
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.reporting.report import report
from flyp_saflex.storage.data_record import record_of

FORMS = ("md", "csv", "json", "html")


def record(names=("cat", "dog"), *, images=range(8), cut=4):
    """A record of images in train (before `cut`) and id_test."""
    samples = [Sample(sample_id=f"{n}.png", item=n, label=n % 2) for n in images]
    splits = {
        "train": Split(name="train", role="train", shift="id", samples=tuple(samples[:cut])),
        "id_test": Split(name="id_test", role="test", shift="id", samples=tuple(samples[cut:])),
    }
    return record_of(Dataset(name="folder", root=None, class_names=names, splits=splits, templates=("a {}",)))


def run_on(root, recipe, seed, data=None):
    run = write_run(root, recipe, seed, 0.5, 0.5)
    if data is not None:
        data.write(run)
    return run


@pytest.mark.parametrize("other", [record(("oak", "elm")), record(images=range(1, 9)), record(images=range(10))])
@pytest.mark.parametrize("form", FORMS)
def test_different_data_are_no_seeds_of_one_condition(tmp_path, other, form):
    runs = [run_on(tmp_path, "folder", 0, record()), run_on(tmp_path, "folder", 1, other)]
    with pytest.raises(RunError, match="both recipe 'folder' but on other data") as caught:
        report(runs, form=form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_remarks_stand_in_every_form(tmp_path, form):
    runs = [run_on(tmp_path, "folder", 0, record()), run_on(tmp_path, "folder", 1, record(cut=6))]
    text = report(runs, form=form)
    assert f"{runs[1]} is not on the data of {runs[0]}: " in text
    if form == "csv":
        assert all("is not on the data" in row["notes"] for row in csv.DictReader(io.StringIO(text)))


def test_seeds_on_the_same_data_have_no_remark(tmp_path):
    assert "Note" not in report([run_on(tmp_path, "folder", seed, record()) for seed in range(3)])


def test_a_difference_between_conditions_on_other_data_is_told(tmp_path):
    runs = [run_on(tmp_path, "a", 0, record()), run_on(tmp_path, "b", 0, record(("oak", "elm")))]
    assert "are on other data (class 0 was 'cat' and is 'oak'): their difference is not one of methods" in report(runs)


def test_results_on_other_data_are_named(tmp_path):
    run = run_on(tmp_path, "a", 0, record())
    (run / "results-on-away.json").write_text("{}")
    assert "results on other data are not shown (results-on-away.json)" in report([run])


def test_runs_without_a_record_are_told(tmp_path):
    runs = [run_on(tmp_path, "folder", 0, record()), run_on(tmp_path, "folder", 1)]
    assert f"{runs[1]} has no data.json: whether the seeds of folder are on the same data is not known" in report(runs)
