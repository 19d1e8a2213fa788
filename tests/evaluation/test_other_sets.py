"""ImageNet's shifts and folders of the user's own: classes, subsets, and accuracy before and after finetuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from flyp_saflex.cli import main
from flyp_saflex.clip.imagenet import imagenet_classes
from flyp_saflex.config import DataConfig
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import DataError


def folders(root: Path, names) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / f"{name}_0.jpg").touch()
    return root


def read(name: str, root: Path):
    return load_dataset(DataConfig(root=str(root)), test_set=name)


def test_imagenets_classes_are_in_the_order_of_their_wordnet_ids():
    names = imagenet_classes()
    assert list(names) == sorted(names)
    assert (len(names), names["n01440764"], names["n15075141"]) == (1000, "tench", "toilet paper")
    assert list(names.values())[1] == "goldfish"


@pytest.mark.parametrize("subset", ["r", "a"])
def test_subsets_have_200_classes_in_imagenets_order(subset: str):
    names, every = imagenet_classes(subset), imagenet_classes()
    assert len(names) == 200
    assert [wnid for wnid in every if wnid in names] == list(names)


def test_folders_by_index_are_numbers_and_not_in_the_order_of_text(tmp_path: Path):
    """ImageNet-V2 names its folders 0..999: in the order of text 10 comes before 2."""
    dataset = read("imagenet-v2", folders(tmp_path, map(str, range(1000))))
    assert all(int(Path(sample.sample_id).parent.name) == sample.label for sample in dataset.splits["test"].samples)
    assert dataset.class_names[2] == "great white shark"


def test_folders_by_wordnet_id_have_the_labels_of_the_subset(tmp_path: Path):
    wnids = list(imagenet_classes("a"))
    dataset = read("imagenet-a", folders(tmp_path, wnids))
    found = {Path(sample.sample_id).parent.name: sample.label for sample in dataset.splits["test"].samples}
    assert found == {wnid: label for label, wnid in enumerate(wnids)}
    assert dataset.splits["test"].role == "test"


def test_a_wrong_or_missing_class_is_told_in_one_line(tmp_path: Path):
    wnids = list(imagenet_classes("r"))
    with pytest.raises(DataError, match=r"the folder 'n01440764' is no class of imagenet-r \(one of 1; it has 200 classes\)"):
        read("imagenet-r", folders(tmp_path / "more", [*wnids, "n01440764"]))
    with pytest.raises(DataError, match=r"1 of 200 classes of imagenet-r have no folder \(n01443537\)") as caught:
        read("imagenet-r", folders(tmp_path / "less", wnids[1:]))
    assert "\n" not in str(caught.value)


def test_a_run_is_tested_on_other_classes_before_and_after(tmp_path: Path, tiny_options, tiny_images_dir: Path, capsys):
    run = tmp_path / "run"
    assert main(["train", "folder", *(f"--set={option}" for option in tiny_options), f"--run-dir={run}"]) == 0
    assert main(["evaluate", str(run)]) == 0
    own = (run / "results.json").read_bytes()
    for name, shade in (("wolf", 10), ("fox", 200)):
        for number in range(3):
            (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (shade, 9 * number, 50)).save(tmp_path / "pets" / name / f"{number}.png")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--on", f"pets={tmp_path / 'pets'}", "--on", f"night={tiny_images_dir / 'night'}"]) == 0
    out = capsys.readouterr().out
    assert "set    images  before  after  change" in out
    found = json.loads((run / "results-on-pets.json").read_text(encoding="utf-8"))
    rows = {row["wise_alpha"]: row for row in found["results"]}
    assert set(rows) == {0.0, 1.0}
    assert rows[1.0]["n"] == 6
    change = 100 * (rows[1.0]["accuracy"] - rows[0.0]["accuracy"])
    assert f"{100 * rows[0.0]['accuracy']:.1f}" in out
    assert f"{change:+.1f}" in out
    assert (run / "results.json").read_bytes() == own
    assert main(["evaluate", str(run), "--on", "a=b", "--split", "test"]) == 2
    assert "--on tests other sets: it goes without --split" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--on", "pets"]) == 2
    assert "--on pets: expected NAME=PATH" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--on", f"pets={tmp_path / 'nowhere'}"]) == 2
    assert "is not there" in capsys.readouterr().err
