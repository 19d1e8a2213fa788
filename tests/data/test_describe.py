"""`flyp-saflex data`: the numbers it returns and what it prints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flyp_saflex import recipe
from flyp_saflex.cli import main
from flyp_saflex.config import Config, DataConfig
from flyp_saflex.data.describe import describe
from flyp_saflex.errors import ConfigError, DataError


@pytest.fixture
def config(tiny_images_dir: Path) -> Config:
    return Config(data=DataConfig(root=str(tiny_images_dir), train_domains=("day",), test_domains=("night",), select_per_class=2))


def test_counts_sizes_and_clean_files(config: Config, capsys: pytest.CaptureFixture[str]):
    numbers = describe(config)
    assert numbers["num_classes"] == 3
    assert {name: counts["n"] for name, counts in numbers["splits"].items()} == {
        "train": 12,
        "id_val": 6,
        "id_test": 6,
        "night": 24,
    }
    assert numbers["splits"]["night"] == {
        "role": "test",
        "shift": "ood",
        "n": 24,
        "classes": {0: 8, 1: 8, 2: 8},
        "domains": {"night": 24},
    }
    assert numbers["sizes"]["train"] == {"width": (48, 48, 48), "height": (40, 40, 40)}
    assert numbers["unreadable"] == numbers["duplicates_across_splits"] == []
    printed = capsys.readouterr().out
    assert "night          test    ood        24" in printed
    assert "unreadable images: 0" in printed


def test_unreadable_files_and_duplicates_are_listed(config: Config, capsys: pytest.CaptureFixture[str]):
    root = Path(config.data.root)
    (root / "night" / "circle" / "0.png").write_bytes(b"")
    train = describe(config, dry_run=True)
    assert train["splits"]["night"]["n"] == 24
    shutil.copy(root / "day" / "square" / "0.png", root / "night" / "square" / "copy.png")
    shutil.copy(root / "night" / "stripes" / "1.png", root / "night" / "stripes" / "copy.png")
    capsys.readouterr()
    numbers = describe(config)
    assert [(row["split"], Path(row["path"]).name) for row in numbers["unreadable"]] == [("night", "0.png")]
    assert "the file is empty" in numbers["unreadable"][0]["reason"]
    (found,) = numbers["duplicates_across_splits"]
    assert {sample_id for _, sample_id in found} == {"day/square/0.png", "night/square/copy.png"}
    assert numbers["duplicates_within_splits"] == 1
    printed = capsys.readouterr().out
    assert "unreadable images: 1" in printed
    assert "training would stop" in printed
    assert "night: night/square/copy.png" in printed


def test_dry_run_reads_no_image_and_limit_cuts(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flyp_saflex.data.describe._read_one", lambda sample: pytest.fail("an image was read"))
    numbers = describe(config, limit=5, dry_run=True)
    assert {counts["n"] for counts in numbers["splits"].values()} == {5}
    assert "sizes" not in numbers


def test_only_the_first_process_prints(config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    assert describe(config)["splits"]["train"]["n"] == 12
    assert capsys.readouterr().out == ""


def test_a_missing_dataset_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(DataError):
        describe(Config(data=DataConfig(name="cub", root=str(tmp_path))))
    assert main(["data", "iwildcam", "--set", f"data.root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "place WILDS' iwildcam_v2.0 there" in error


@pytest.mark.parametrize("name", ["folder", "iwildcam", "iwildcam-mini", "cub"])
def test_recipes_select_on_a_split_that_their_dataset_has(name: str):
    config = recipe.load(name)
    splits = {
        "folder": {"id_val"},
        "iwildcam": {"id_val", "val"},
        "iwildcam-mini": {"val"},
        "cub": {"val"},
    }[name]
    assert config.data.name == name
    assert {config.train.select_split, config.saflex.validation_split} <= splits


def test_materialise_writes_copies_that_training_and_evaluation_read(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from flyp_saflex.evaluation.evaluate import evaluate
    from flyp_saflex.images import reader
    from flyp_saflex.training.train import train

    copies = tmp_path / "copies"
    config = make_config(f"data.materialised={copies}", "data.materialised_px=36", "train.steps=2")
    monkeypatch.setattr("flyp_saflex.data.describe._read_one", lambda sample: pytest.fail("every image was read twice"))
    assert describe(config, dry_run=True, materialise=True)["materialised"]["todo"] == 48
    assert "to make: 48" in capsys.readouterr().out
    assert not copies.exists()
    assert describe(config, limit=6, materialise=True)["materialised"]["resized"] == 24
    made = describe(config, materialise=True)["materialised"]
    assert (made["kept"], made["resized"], made["copied"], made["unreadable"]) == (24, 24, 0, [])
    printed = capsys.readouterr().out
    assert f"resized copies in {copies} (shorter side 36 px): 24 there already" in printed
    assert "new: 24 resized, 0 small ones as they are" in printed
    reads: list[Path] = []
    read = reader.read_picture
    monkeypatch.setattr(reader, "read_picture", lambda path, **options: (reads.append(path), read(path, **options))[1])
    train(config, tmp_path / "run")
    assert evaluate(tmp_path / "run", splits=["night"])["results"][0]["n"] == 24
    assert reads == [], "no file was opened"
    assert capsys.readouterr().out.count(f"48 of 48 images are read from {copies}") == 1, "said once, by training"
    (Path(config.data.root) / "night" / "circle" / "0.png").touch()
    evaluate(tmp_path / "run", splits=["night"])
    assert [path.name for path in reads] == ["0.png"]
    assert "23 of 24 images are read from" in capsys.readouterr().out


def test_materialise_without_a_folder_is_one_line(config: Config, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match=r"--materialise: data\.materialised is empty, .* set data\.materialised=DIR"):
        describe(config, materialise=True)
    root = config.data.root
    assert main(["data", "folder", "--set", f"data.root={root}", "--set", "data.train_domains=day", "--materialise"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_materialise_goes_on_at_the_command_line(tiny_images_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tiny_images_dir / "night" / "circle" / "0.png").write_bytes(b"")
    command = ["data", "folder", "--materialise", "--set", "data.materialised_px=36"]
    command += ["--set", f"data.materialised={tmp_path / 'copies'}"]
    for option in (f"root={tiny_images_dir}", "train_domains=day", "test_domains=night"):
        command += ["--set", f"data.{option}"]
    for there, new in ((0, 47), (47, 0)):
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert f"{there} there already" in printed
        assert f"new: {new} resized" in printed
        assert "unreadable: 1\n" in printed
        assert "0.png cannot be decoded (the file is empty)" in printed


def test_images_under_two_labels_are_named_in_both(tiny_images_dir: Path, capsys: pytest.CaptureFixture[str]):
    root = tiny_images_dir / "day"
    for number in range(3):
        shutil.copy(root / "circle" / f"{number}.png", root / "square" / f"copy_{number}.png")
    shutil.copy(root / "stripes" / "0.png", root / "stripes" / "again.png")
    found = describe(Config(data=DataConfig(root=str(root))))["duplicates_under_two_labels"]
    assert [sorted(group) for group in sorted(found, key=sorted)] == [
        [(f"circle/{number}.png", "circle"), (f"square/copy_{number}.png", "square")] for number in range(3)
    ]
    printed = capsys.readouterr().out
    assert "3 images are there under two labels" in printed
    assert "square/copy_1.png (square)" in printed


def test_images_that_use_a_part_of_their_range_are_counted(tiny_images_dir: Path, capsys: pytest.CaptureFixture[str]):
    import numpy as np
    from PIL import Image

    ramp = np.tile(np.linspace(0, 4095, 48).astype(np.uint16), (40, 1))
    Image.fromarray(ramp).save(tiny_images_dir / "day" / "circle" / "12bit.png")
    Image.fromarray(ramp * 16).save(tiny_images_dir / "day" / "circle" / "16bit.png")
    assert describe(Config(data=DataConfig(root=str(tiny_images_dir / "day"))))["faint"] == ["circle/12bit.png"]
    assert "less than a tenth of their range: 1, first: circle/12bit.png" in capsys.readouterr().out


def test_file_names_that_are_not_utf8_can_be_printed(tiny_images_dir: Path, capfd: pytest.CaptureFixture[str]):
    import os

    folder = os.fsencode(tiny_images_dir / "day" / "circle")
    try:
        Path(os.fsdecode(os.path.join(folder, b"caf\xe9.png"))).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    describe(Config(data=DataConfig(root=str(tiny_images_dir / "day"))))
    assert r"caf\udce9.png cannot be decoded (the file is empty)" in capfd.readouterr().out
