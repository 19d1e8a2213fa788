"""`filter.use = ["near-duplicate"]`: copies are found, changes of structure, light and colour are kept."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from flyp_saflex import recipe
from flyp_saflex.assets import TINY_CLIP
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError
from flyp_saflex.filtering.filter import filter_edits
from flyp_saflex.filtering.near_duplicate import hash_distance
from flyp_saflex.images.decode import read_image
from flyp_saflex.storage.augment_cache import AugmentCache


def photograph(seed: int) -> Image.Image:
    """Return coarse blobs of colour, which have structure as photographs have."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((160, 120), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def test_copies_are_near_and_changes_are_far() -> None:
    for seed in range(8):
        source = photograph(seed)
        copies = (source, as_jpeg(source), source.resize((96, 72)), source.filter(ImageFilter.GaussianBlur(1)))
        assert max(hash_distance(copy, source) for copy in copies) < 6
        greyer = source.convert("L").convert("RGB")
        changed = (photograph(seed + 100), ImageEnhance.Brightness(source).enhance(0.2), greyer)
        assert min(hash_distance(edit, source) for edit in changed) >= 6


@pytest.fixture
def config(tiny_images_dir: Path, tmp_path: Path) -> Config:
    """Four edits: a copy, one of another size, a new image, and one that cannot be read."""
    home = tmp_path / "cache"
    options = [f"data.root={tiny_images_dir}", "data.train_domains=day", "data.test_domains=night"]
    options += ["data.select_fraction=0.25", "data.test_fraction=0.25", f"model.name=local-dir:{TINY_CLIP}"]
    options += [f"cache.root={home}", "cache.key=four", 'filter.use=["near-duplicate"]', "filter.sheet_rows=1"]
    made = recipe.load("folder", options)
    dataset = load_dataset(made.data, seed=made.seed)
    cache = AugmentCache.create(home / dataset.name / "four", dataset.name)
    for number, sample in enumerate(dataset.train.samples[:4]):
        source = read_image(sample.image)
        edit = (source, source.resize((48, 48)), photograph(1), source)[number]
        name = AugmentCache.file_name(sample.sample_id, "x")
        cache.append(edit, {"file_name": name, "source_id": sample.sample_id, "label": sample.label})
    cache.finish()
    AugmentCache.open(home, dataset.name, "four").edits[3].path.write_bytes(b"")
    return made


def test_near_duplicates_are_dropped_and_their_distance_is_written(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = filter_edits(config)
    folder = Path(config.cache.root) / config.data.name / config.cache.key
    rows = [msgspec.json.decode(line) for line in (folder / config.cache.scores).read_bytes().splitlines()]
    assert [row["near_duplicate"] for row in rows] == [True, True, False, None]
    assert [row["keep"] for row in rows] == [False, False, True, False]
    assert rows[0]["hash_distance"] == 0
    assert rows[2]["hash_distance"] >= 6
    assert rows[3]["hash_distance"] is None
    assert rows[0]["reason"] == "near-duplicate"
    assert (numbers["kept"], numbers["near-duplicate"]) == (1, 2)
    printed = capsys.readouterr().out
    assert "perceptual hashes of edit and source (at least 6 bits apart)" in printed
    assert "distance to the source in bits: median" in printed
    assert (folder / "sheets" / "filter-near-duplicate.jpg").is_file()


def test_the_missing_package_is_one_line(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flyp_saflex.extras.is_installed", lambda package: False)
    with pytest.raises(ConfigError, match=r'filter.use = "near-duplicate" needs imagehash.*flyp-saflex\[edits\]'):
        filter_edits(config)
