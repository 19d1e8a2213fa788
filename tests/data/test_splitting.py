"""Split names: roles in any spelling, no two splits of one name, every row in exactly one split or told."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from flyp_saflex.config import DataConfig
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.data.splitting import canonical_split, in_reporting_order, role_and_shift, split_notes
from flyp_saflex.errors import DataError
from flyp_saflex.records import Split


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "Val", "Test"), ("train id", "select id", "test id")),
        (("Training", "VALIDATION", "testing"), ("train id", "select id", "test id")),
        (("TRAIN", "Dev", "id-test", "test"), ("train id", "select id", "test id", "test ood")),
        (("train", "id val", "val"), ("train id", "select id", "select ood")),
        (("train", "eval", "Test"), ("train id", "select id", "test id")),
        (("train", "val", "Evaluation"), ("train id", "select id", "test id")),
        (("train", "Eval"), ("train id", "test id")),
        (("train", "OOD_Val", "sketch"), ("train id", "select ood", "test ood")),
    ],
)
def test_usual_names_have_their_role_in_any_spelling(names: tuple[str, ...], expected: tuple[str, ...]):
    assert tuple(" ".join(role_and_shift(name, names)) for name in names) == expected


def test_names_that_are_read_otherwise_than_written_are_told():
    assert canonical_split("Training") == "train"
    assert canonical_split("Test") == "Test"
    assert split_notes(["train", "val", "Test", "ood_night"]) == []
    train, eval_, other = split_notes(["Train", "eval", "test", "holdout"])
    assert "'Train' is read as 'train'" in train
    assert "'eval' selects models" in eval_
    assert "'holdout': taken for out-of-distribution test splits" in other


@pytest.mark.parametrize("names", [("a", "a"), ("Test", "test"), ("Köln", unicodedata.normalize("NFD", "Köln")), ("x" * 201,)])
def test_splits_of_one_name_or_of_a_name_too_long_are_refused(names: tuple[str, ...]):
    with pytest.raises(DataError, match=r"two splits|has 201 bytes, at most 200"):
        in_reporting_order(Split(name=name, role="test", shift="ood", samples=()) for name in names)


def write(root: Path, rows: list[tuple[str, str, str]]) -> Path:
    """Write images and a table of (name, label, part)."""
    (root / "img").mkdir(parents=True, exist_ok=True)
    for name, _, _ in rows:
        Image.new("RGB", (4, 4)).save(root / "img" / f"{name}.png")
    lines = [f"{name}.png,{label},{part}\n" for name, label, part in rows]
    (root / "t.csv").write_text("path,label,part\n" + "".join(lines), encoding="utf-8")
    return root


def config(root: Path, **options) -> DataConfig:
    return DataConfig(name="table", table=str(root / "t.csv"), root=str(root / "img"), **options)


PARTS = ("train", "id_val", "id_test", "pool", "val")


@pytest.mark.parametrize("part", ["train", "id_val", "id_test", "Train", "ID_VAL"])
@pytest.mark.parametrize("role", ["select_domains", "test_domains"])
def test_a_domain_with_the_name_of_a_held_out_split_is_refused(part: str, role: str, tmp_path: Path):
    rows = [(f"{number}{domain}", "ab"[number % 2], domain) for number in range(20) for domain in (part, "other")]
    write(tmp_path, rows)
    with pytest.raises(DataError, match=f"a domain called '{part}' is taken for a split; set data.split_column=part"):
        load_dataset(config(tmp_path, domain_column="part", train_domains=("other",), **{role: (part,)}))


def test_a_training_domain_may_have_any_name(tmp_path: Path):
    rows = [(f"{number}{part}", "ab"[number % 2], part) for number in range(20) for part in PARTS]
    dataset = load_dataset(
        config(write(tmp_path, rows), domain_column="part", train_domains=("train", "id_val"), test_domains=("pool", "val"))
    )
    homes = {sample.sample_id: split.name for split in dataset.splits.values() for sample in split.samples}
    assert {homes[f"{number}{part}.png"] for number in range(20) for part in ("train", "id_val")} == {
        "train",
        "id_val",
        "id_test",
    }
    assert all(homes[f"{number}pool.png"] == "pool" for number in range(20)), "a test domain called pool is not trained on"
    assert dataset.notes[0] == f"100 rows of {tmp_path / 't.csv'} = 80 in splits + 20 left out " + (
        "(20 of domains that no data.*_domains names)"
    )


@pytest.mark.parametrize("seed", range(12))
def test_every_row_is_in_one_split_or_counted_as_left_out(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    names = rng.sample(["a", "b", "Ä", unicodedata.normalize("NFD", "Ä"), "pool", "val", "dev", "x y"], 6)
    rows = [(f"{number}-{place}", "ab"[number % 2], name) for place, name in enumerate(names) for number in range(20)]
    rng.shuffle(rows)
    write(tmp_path, rows)
    with open(tmp_path / "t.csv", "a", encoding="utf-8") as file:
        file.write("# a comment\n\n,,\n")
    domains = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in names))
    dataset = load_dataset(
        config(
            tmp_path,
            domain_column="part",
            train_domains=tuple(domains[:2]),
            select_domains=(domains[2],),
            test_domains=(domains[3],),
        )
    )
    used = [sample for split in dataset.splits.values() for sample in split.samples]
    assert len(dataset.splits) == 5
    assert len({sample.sample_id for sample in used}) == len(used)
    wanted = {name for name, _, part in rows if unicodedata.normalize("NFC", part) in domains[:4]}
    assert {sample.path.stem for sample in used} == wanted
    assert dataset.notes[0].startswith(
        f"123 rows of {tmp_path / 't.csv'} = {len(wanted)} in splits + {123 - len(wanted)} left out"
    )


def test_split_columns_of_any_spelling_train_and_select(tmp_path: Path):
    rows = [(f"{number}{part}", "ab"[number % 2], part) for number in range(4) for part in ("Train", "Valid", "TEST")]
    dataset = load_dataset(config(write(tmp_path, rows), split_column="part"))
    assert {split.name: (split.role, split.shift) for split in dataset.splits.values()} == {
        "train": ("train", "id"),
        "Valid": ("select", "id"),
        "TEST": ("test", "id"),
    }
    assert split_for(dataset, "id_val", "select").name == "Valid"
    rows.append(("9", "a", "test"))
    with pytest.raises(DataError, match="'TEST' and 'test'; rename one"):
        load_dataset(config(write(tmp_path, rows), split_column="part"))


def test_few_shots_and_quick_looks_tell_their_counts(tmp_path: Path):
    rows = [(f"{number}{part}", "ab"[number % 2], part) for number in range(6) for part in ("train", "test")]
    dataset = load_dataset(config(write(tmp_path, rows), split_column="part", shots=2), limit=3)
    assert "data.shots = 2: 4 of 6 training images are used" in dataset.notes
    assert "a quick look: at most 3 images of each split, 6 of 10 in all" in dataset.notes
