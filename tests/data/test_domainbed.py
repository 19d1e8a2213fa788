"""DomainBed's layouts: leave-one-domain-out by name, counted, and what is missing told."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyp_saflex.config import DataConfig
from flyp_saflex.data import domainbed
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.errors import DataError
from flyp_saflex.tables import DATASETS

BENCHMARKS = (domainbed.PACS, domainbed.VLCS, domainbed.OFFICE_HOME, domainbed.TERRA_INCOGNITA, domainbed.DOMAIN_NET)
TOTALS = {"pacs": 9_991, "vlcs": 10_729, "office-home": 15_588, "domain-net": 586_575}
"""Table 3 of arXiv 2007.01434. TerraIncognita is left out: the paper's number is not that of the downloaded files."""
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def make(root: Path, benchmark, classes=("one", "two"), count: int = 10) -> Path:
    """Lay out empty files: the reader opens none."""
    for domain in benchmark.images:
        for name in classes:
            folder = root / benchmark.folder / domain / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpg").touch()
    return root


def test_published_numbers_add_up_to_the_papers():
    sums = {b.name: sum(n for n in b.images.values() if n is not None) for b in BENCHMARKS if b.name in TOTALS}
    assert sums == TOTALS


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_each_is_read_by_its_name_with_one_domain_left_out(tmp_path: Path, benchmark):
    assert DATASETS[benchmark.name] is benchmark
    classes = PACS_CLASSES if benchmark.prompts else ("one", "two")
    left_out = list(benchmark.images)[-1]
    root = make(tmp_path, benchmark, classes)
    dataset = load_dataset(DataConfig(name=benchmark.name, root=str(root), test_domains=(left_out,)))
    kept = {domain for domain in benchmark.images if domain != left_out}
    assert dataset.name == benchmark.name
    assert {sample.domain for sample in dataset.train.samples} == kept
    selected = split_for(dataset, "id_val", "select")
    assert {sample.domain for sample in selected.samples} <= kept
    assert selected.shift == "id"
    test = dataset.splits[left_out]
    assert (test.role, test.shift, len(test)) == ("test", "ood", 10 * len(classes))
    assert sum(len(split) for split in dataset.splits.values()) == 10 * len(classes) * len(benchmark.images)


def test_domainbeds_own_parts_are_a_fifth_to_select_and_none_to_test(tmp_path: Path):
    root = make(tmp_path, domainbed.VLCS)
    config = DataConfig(name="vlcs", root=str(root), test_domains=("SUN09",), select_fraction=0.2, test_fraction=0.0)
    sizes = {name: len(split) for name, split in load_dataset(config).splits.items()}
    assert sizes == {"train": 48, "id_val": 12, "SUN09": 20}


def test_the_domain_folders_may_be_the_root_itself(tmp_path: Path):
    root = make(tmp_path, domainbed.VLCS) / "VLCS"
    assert len(load_dataset(DataConfig(name="vlcs", root=str(root), test_domains=("SUN09",))).splits["SUN09"]) == 20


def test_other_numbers_than_the_published_ones_are_told(tmp_path: Path):
    dataset = load_dataset(DataConfig(name="vlcs", root=str(make(tmp_path, domainbed.VLCS)), test_domains=("SUN09",)))
    assert any("20 images of 'LabelMe', but 2656 are published" in note for note in dataset.notes)
    assert any("2 classes, but 5 are published" in note for note in dataset.notes)


def test_a_real_part_of_pacs_has_the_published_counts(shared_dir: Path):
    config = DataConfig(
        name="pacs", root=str(shared_dir / "data" / "pacs160"), train_domains=("photo", "cartoon"), test_domains=("art_painting",)
    )
    dataset = load_dataset(config)
    assert not [note for note in dataset.notes if "published" in note]
    assert len(dataset.splits["art_painting"]) == 2048
    assert sum(len(split) for split in dataset.splits.values()) == 2048 + 2344 + 1670


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"data\.test_domains is empty \(data\.name = vlcs\); name the domain .*\(domains: Caltech101, LabelMe, SUN09",
        ),
        ({"test_domains": ("SUN9",)}, r"no folder 'SUN9' in .*did you mean 'SUN09'"),
    ],
)
def test_a_missing_test_domain_is_told_in_one_line(tmp_path: Path, options: dict, message: str):
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(DataConfig(name="vlcs", root=str(make(tmp_path, domainbed.VLCS)), **options))
    assert "\n" not in str(caught.value)


def test_a_missing_training_domain_is_told_in_one_line(tmp_path: Path):
    root = make(tmp_path, domainbed.VLCS)
    (root / "VLCS" / "LabelMe").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"no folder LabelMe in .*; expected VLCS/<domain>/<class>/\* .*set data\.train_domains"):
        load_dataset(DataConfig(name="vlcs", root=str(root), test_domains=("SUN09",)))
