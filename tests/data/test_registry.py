"""What holds for every dataset: few shots, more training rows, quick looks, roles, and the common checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from flyp_saflex.config import DataConfig
from flyp_saflex.data import registry
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.data.splitting import few_shot, quick_look, role_and_shift
from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.tables import DATASETS


def sample(name: str, label: int = 0) -> Sample:
    return Sample(sample_id=name, item=Path(name), label=label)


def split(name: str, labels: list[int], role="train", shift="id") -> Split:
    samples = tuple(sample(f"{name}/{index}.png", label) for index, label in enumerate(labels))
    return Split(name=name, role=role, shift=shift, samples=samples)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataConfig]:
    """Let `load_dataset` read the splits that a test makes up."""

    def install(*splits: Split, num_classes: int = 2, name: str = "folder") -> DataConfig:
        dataset = Dataset(
            name=name,
            root=Path("."),
            class_names=tuple(f"class {label}" for label in range(num_classes)),
            splits={one.name: one for one in splits},
            templates=("a {}",),
        )
        monkeypatch.setitem(DATASETS, name, lambda config: dataset)
        return DataConfig(name=name)

    return install


@pytest.fixture
def domains(tiny_images_dir: Path) -> DataConfig:
    return DataConfig(root=str(tiny_images_dir), train_domains=("day",), test_domains=("night",), select_per_class=2)


def ids(one: Split) -> list[str]:
    return [row.sample_id for row in one.samples]


def test_shots_are_drawn_per_class_with_the_seed(domains: DataConfig):
    config = dataclasses.replace(domains, shots=2)
    first, again, other = (load_dataset(config, seed=seed) for seed in (0, 0, 1))
    assert first.train.class_counts() == {0: 2, 1: 2, 2: 2}
    assert ids(first.train) == ids(again.train) != ids(other.train)
    assert all(ids(first.splits[name]) == ids(other.splits[name]) for name in ("id_val", "id_test", "night"))
    assert set(ids(first.train)) < set(ids(load_dataset(domains).train))


def test_shots_keep_what_there_is(domains: DataConfig):
    dataset = load_dataset(dataclasses.replace(domains, shots=100))
    assert ids(dataset.train) == ids(load_dataset(domains).train)
    assert any("fewer training images" in note for note in dataset.notes)


def test_more_shots_contain_fewer_shots():
    one = split("train", [0, 1] * 20)
    assert set(ids(few_shot(one, 3, seed=4))) < set(ids(few_shot(one, 5, seed=4)))


def test_limit_spreads_over_classes_and_ignores_the_seed(domains: DataConfig):
    first, other = (load_dataset(domains, seed=seed, limit=4) for seed in (0, 1))
    assert all(len(one) == 4 for one in first.splits.values())
    assert all(sorted(one.class_counts().values()) == [1, 1, 2] for one in first.splits.values())
    assert ids(first.train) == ids(other.train)
    with pytest.raises(DataError, match="--limit 0"):
        load_dataset(domains, limit=0)


def test_a_quick_look_keeps_the_order_of_the_file():
    one = split("train", [0] * 50 + [1] * 2)
    assert quick_look(one, 100, seed=0) is one
    chosen = quick_look(one, 10, seed=0)
    assert chosen.class_counts() == {0: 8, 1: 2}
    assert ids(chosen) == [name for name in ids(one) if name in set(ids(chosen))]


def test_add_to_train_moves_a_split(domains: DataConfig):
    plain = load_dataset(domains)
    dataset = load_dataset(dataclasses.replace(domains, add_to_train=("id_val",)))
    assert ids(dataset.train) == ids(plain.train) + ids(plain.splits["id_val"])
    assert "id_val" not in dataset.splits
    with pytest.raises(DataError, match="'night' cannot be added, its role is 'test'; possible are: id_val"):
        load_dataset(dataclasses.replace(domains, add_to_train=("night",)))
    with pytest.raises(DataError, match="no split 'id_vla'; did you mean 'id_val'"):
        load_dataset(dataclasses.replace(domains, add_to_train=("id_vla",)))


def test_roles_are_kept(domains: DataConfig):
    dataset = load_dataset(domains)
    assert split_for(dataset, "night", "test") is dataset.splits["night"]
    assert split_for(dataset, "id_val").role == "select"
    with pytest.raises(
        DataError, match=r"'night' cannot be used as a 'select' split: test splits never select.*use one of: id_val"
    ):
        split_for(dataset, "night", "select")
    with pytest.raises(DataError, match=r"'id_val' cannot be used as a 'test' split.*use one of: id_test, night"):
        split_for(dataset, "id_val", "test")
    with pytest.raises(DataError, match="never trained on"):
        split_for(dataset, "night", "train")
    with pytest.raises(DataError, match=r"no split 'nigth'; did you mean 'night'\? \(it has: train, id_val, id_test, night\)"):
        split_for(dataset, "nigth", "test")


def test_the_id_validation_split_is_found_under_its_other_names(reader):
    dataset = load_dataset(reader(split("train", [0, 1]), split("valid", [0, 1], "select")), check_files=False)
    assert split_for(dataset, "id_val", "select").name == "valid"
    ood = load_dataset(reader(split("train", [0, 1]), split("val", [0, 1], "select", "ood")), check_files=False)
    with pytest.raises(DataError, match="no split 'id_val'"):
        split_for(ood, "id_val", "select")


def test_names_give_roles_as_in_wilds():
    wilds = ("train", "id_val", "val", "id_test", "test")
    assert [role_and_shift(name, wilds) for name in wilds] == [
        ("train", "id"),
        ("select", "id"),
        ("select", "ood"),
        ("test", "id"),
        ("test", "ood"),
    ]
    assert [role_and_shift(name, ()) for name in ("dev", "test", "ood_val", "ood_x", "sketch")] == [
        ("select", "id"),
        ("test", "id"),
        ("select", "ood"),
        ("test", "ood"),
        ("test", "ood"),
    ]


BAD = {
    "no train": ([split("test", [0, 1], "test")], r"no split 'train' \(found: test\)"),
    "empty": ([split("train", [0, 1]), split("test", [], "test")], "split 'test' of 'folder' is empty"),
    "label too large": (
        [split("train", [0, 1, 2])],
        r"'train/2.png' of split 'train' has the label 2, but there are 2 classes \(0\.\.1\)",
    ),
    "label below zero": ([split("train", [0, 1, -1])], "has the label -1"),
    "absent class": ([split("train", [0, 0])], "1 of 2 classes have no training image.*'class 1'"),
    "unseen class": (
        [split("train", [0, 0]), split("test", [1, 1], "test")],
        "split 'test' has 2 images of classes without.*'class 1'",
    ),
    "in two splits": (
        [split("train", [0, 1]), dataclasses.replace(split("train", [0], "test"), name="test")],
        "'train/0.png' is there twice, in 'train' and 'test'",
    ),
    "twice in a split": (
        [Split(name="train", role="train", shift="id", samples=(sample("a"), sample("a", 1)))],
        "in the same split",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_dataset_may_do(case: str, reader):
    splits, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(reader(*splits), check_files=False)
    assert "\n" not in str(caught.value)


def test_published_lists_get_a_note_instead(reader):
    dataset = load_dataset(reader(split("train", [0, 0]), name="cub"), check_files=False)
    assert any("'class 1'" in note for note in dataset.notes)


def test_missing_files_are_counted_and_named(domains: DataConfig):
    for number in range(5):
        (Path(domains.root) / "night" / "circle" / f"{number}.png").unlink()
    # The folder reader lists what is there, so only a list (table, CUB, WILDS) can name files that are not.
    dataset = load_dataset(domains)
    lost = dataclasses.replace(dataset.train.samples[0], item=Path(domains.root) / "nope.png", sample_id="nope.png")
    broken = dataclasses.replace(dataset, splits={"train": dataclasses.replace(dataset.train, samples=(lost,))})
    with pytest.raises(DataError, match=r"are missing \(1 of 1 in train\), first: .*nope\.png"):
        registry._check_files(broken)


def test_added_rows_come_on_top_of_the_few_shots(tiny_images_dir):
    config = DataConfig(
        root=str(tiny_images_dir), train_domains=("day",), select_domains=("night",), shots=2, select_fraction=0.25
    )
    few = load_dataset(config, seed=1)
    more = load_dataset(dataclasses.replace(config, add_to_train=("night",)), seed=1)
    assert more.train.samples == few.train.samples + few.splits["night"].samples
    assert "night" not in more.splits


def test_groups_of_class_and_domain_are_made_for_any_reader(tiny_images_dir):
    base = DataConfig(
        root=str(tiny_images_dir), train_domains=("day",), test_domains=("night",), group_columns=("class", "domain")
    )
    dataset = load_dataset(base)
    found = {sample.group for split in dataset.splits.values() for sample in split.samples}
    assert found == {f"class={name}, domain={domain}" for name in dataset.class_names for domain in ("day", "night")}
    with pytest.raises(DataError, match="'place' is no column"):
        load_dataset(dataclasses.replace(base, group_columns=("place",)))


def test_own_classes_are_those_of_the_whole_split(tiny_images_dir):
    (tiny_images_dir / "night" / "circle").rename(tiny_images_dir / "night" / ".hidden")
    base = DataConfig(root=str(tiny_images_dir), train_domains=("day",), test_domains=("night",), own_classes=("night",))
    dataset = load_dataset(base, limit=1)
    assert [dataset.class_names[label] for label in dataset.splits["night"].own_classes] == ["square", "stripes"]
    assert dataset.splits["id_test"].own_classes == ()
    for name, words in (("nihgt", "did you mean 'night'"), ("train", "is trained on")):
        with pytest.raises(DataError, match=words):
            load_dataset(dataclasses.replace(base, own_classes=(name,)))
