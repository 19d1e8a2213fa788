"""ALIA's released layout becomes a cache entry: rows find their sources, another training list is noticed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex import recipe
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.editing.import_alia import import_alia
from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset
from flyp_saflex.storage.augment_cache import AugmentCache

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "import_alia.py"
SETTINGS = "strength-0.6_guidance-7.5"


@pytest.fixture
def options(tiny_images_dir: Path, tmp_path: Path) -> list[str]:
    return [
        f"data.root={tiny_images_dir}",
        "data.train_domains=day",
        "data.test_domains=night",
        f"cache.root={tmp_path / 'cache'}",
    ]


@pytest.fixture
def dataset(options: list[str]) -> Dataset:
    return load_dataset(recipe.load("folder", options).data)


@pytest.fixture
def released(dataset: Dataset, tmp_path: Path) -> Path:
    """Two prompts, two edits of every third training image; a class's folder is named as ALIA might name it."""
    names = {"circle": "001.Circle", "square": "square", "stripes": "lines"}
    for number, prompt in enumerate(("in_the_snow", "at night")):
        for row in range(0, len(dataset.train), 3):
            name = names[dataset.class_names[dataset.train.samples[row].label]]
            folder = tmp_path / "alia" / prompt / SETTINGS / name
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(2):
                pixels = np.full((8, 8, 3), (row, k, number), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{row}-{k}.png")
    return tmp_path / "alia"


def test_every_edit_finds_its_source(released: Path, dataset: Dataset, tmp_path: Path):
    cache = import_alia(released, dataset, tmp_path / "cache")
    usable = AugmentCache.open(tmp_path / "cache", "folder", "alia").check_against(dataset)
    assert len(usable) == 2 * 2 * len(range(0, len(dataset.train), 3))
    for edit in usable:
        with Image.open(edit.path) as image:
            row, k, prompt = image.getpixel((0, 0))
        assert edit.source_id == dataset.train.samples[row].sample_id
        assert edit.label == dataset.train.samples[row].label
        assert edit.provenance["k"] == k
        assert edit.instruction == ("in the snow", "at night")[prompt]
        assert (edit.provenance["strength"], edit.provenance["guidance"]) == (0.6, 7.5)
    assert cache.done
    before = (cache.folder / "metadata.jsonl").read_bytes()
    lines = before.splitlines(keepends=True)
    (cache.folder / "metadata.jsonl").write_bytes(b"".join(lines[:5]))
    assert len(import_alia(released, dataset, tmp_path / "cache")) == len(lines), "goes on"
    assert (cache.folder / "metadata.jsonl").read_bytes() == before


def test_files_are_kept_to_the_byte(released: Path, dataset: Dataset, tmp_path: Path):
    cache = import_alia(released, dataset, tmp_path / "cache")
    assert sorted(edit.path.read_bytes() for edit in cache.edits) == sorted(path.read_bytes() for path in released.rglob("*.png"))


def test_another_training_list_is_noticed(released: Path, dataset: Dataset, tmp_path: Path):
    files = sorted(released.rglob("*.png"))
    last = len(dataset.train) - 1
    (files[0].parent / f"{last}-0.png").write_bytes(files[0].read_bytes())
    with pytest.raises(
        DataError, match=rf"row {last} of the training split of 'folder' is 'stripes', but .* another training list"
    ):
        import_alia(released, dataset, tmp_path / "cache")
    (files[0].parent / f"{last}-0.png").rename(files[0].parent / "999-0.png")
    with pytest.raises(DataError, match=rf"999-0\.png: row 999, but the training split of 'folder' has {last + 1} images"):
        import_alia(released, dataset, tmp_path / "cache")
    (files[0].parent / "999-0.png").rename(files[0].parent / "x.png")
    with pytest.raises(DataError, match=r"x\.png: expected <prompt>/strength"):
        import_alia(released, dataset, tmp_path / "cache")
    (files[0].parent / "x.png").unlink()
    files[0].write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be decoded"):
        import_alia(released, dataset, tmp_path / "cache")
    with pytest.raises(DataError, match="holds no edits: expected <prompt>/strength"):
        import_alia(tmp_path / "nowhere", dataset, tmp_path / "cache")


def test_the_script_answers_in_one_line(released: Path, options: list[str], tmp_path: Path, monkeypatch, capsys):
    def run(folder: Path, *more: str) -> int:
        sets = [part for option in (*options, *more) for part in ("--set", option)]
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(folder), "folder", *sets])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return int(ended.value.code or 0)

    assert run(released) == 0
    assert 'train with cache.key=alia and augment.upstream=["cache"]' in capsys.readouterr().out
    assert run(tmp_path / "nowhere") == 2
    assert run(released, "data.shots=2") == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["holds no edits" in errors[0], "data.shots" in errors[1], len(errors)] == [True, True, 2]
