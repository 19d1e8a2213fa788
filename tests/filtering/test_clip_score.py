"""`filter.use = ["clip-score"]`: the score is the formula's, and edits below the threshold are dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from flyp_saflex import recipe
from flyp_saflex.assets import TINY_CLIP
from flyp_saflex.clip.model import load_clip
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError
from flyp_saflex.filtering.alia import clip_score
from flyp_saflex.filtering.filter import filter_edits
from flyp_saflex.storage.augment_cache import AugmentCache


@pytest.fixture
def config(tiny_images_dir: Path, tmp_path: Path) -> Config:
    """Six edits, one of which cannot be read, with the recipe of their filter."""
    home = tmp_path / "cache"
    options = [
        f"data.root={tiny_images_dir}",
        "data.train_domains=day",
        "data.test_domains=night",
        "data.select_fraction=0.25",
        "data.test_fraction=0.25",
        f"model.name=local-dir:{TINY_CLIP}",
        f"cache.root={home}",
        "cache.key=six",
        'filter.use=["clip-score"]',
        "filter.sheet_rows=2",
    ]
    made = recipe.load("folder", options)
    dataset = load_dataset(made.data, seed=made.seed)
    cache = AugmentCache.create(home / dataset.name / "six", dataset.name)
    generator = np.random.default_rng(0)
    for sample in dataset.train.samples[:6]:
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
        name = AugmentCache.file_name(sample.sample_id, "x")
        cache.append(Image.fromarray(pixels), {"file_name": name, "source_id": sample.sample_id, "label": sample.label})
    cache.finish()
    AugmentCache.open(home, dataset.name, "six").edits[5].path.write_bytes(b"")
    return made


def scored(config: Config) -> list[dict]:
    filter_edits(config)
    path = Path(config.cache.root) / config.data.name / config.cache.key / config.cache.scores
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def test_the_score_is_that_of_the_formula() -> None:
    assert clip_score([0.2, -0.3, 1.0, np.nan]) == pytest.approx([0.5, 0.0, 2.5, np.nan], nan_ok=True)


def test_edits_are_compared_with_the_name_of_their_class_and_dropped_below_the_threshold(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, dataset = load_clip(config.model.name), load_dataset(config.data, seed=config.seed)
    rows = scored(config)
    cache = AugmentCache.open(config.cache.root, config.data.name, config.cache.key)
    with torch.no_grad():
        for row, edit in list(zip(rows, cache.edits, strict=True))[:5]:
            with Image.open(edit.path) as picture:
                image_D = clip.model.encode_image(clip.preprocess(picture.convert("RGB"))[None], normalize=True)[0]
            captions = [template.format(dataset.class_names[edit.label]) for template in dataset.templates]
            text_D = clip.model.encode_text(clip.tokenizer(captions), normalize=True).mean(dim=0)
            expected = 2.5 * max(0.0, float(image_D @ text_D / text_D.norm()))
            assert row["clip_score"] == pytest.approx(expected, abs=1e-3)
    assert rows[5]["clip_score"] is rows[5]["low_score"] is None
    assert rows[5]["keep"] is False
    found = sorted(row["clip_score"] for row in rows[:5])
    assert found[0] < found[-1]
    capsys.readouterr()
    threshold = (found[1] + found[2]) / 2
    middle = scored(replace(config, filter=replace(config.filter, min_clip_score=threshold)))
    assert [row["keep"] for row in middle[:5]] == [row["clip_score"] >= threshold for row in rows[:5]]
    assert {row["reason"] for row in middle[:5]} == {"", "low-score"}
    out = capsys.readouterr().out
    assert f"CLIPScore: median {found[2]:.3f}" in out
    assert "low-score: fits the name of its class less than" in out
    assert "filter-low-score.jpg" in out
    kept = scored(replace(config, filter=replace(config.filter, min_clip_score=2.5, drop=("semantic",))))
    assert [(row["keep"], row["low_score"]) for row in kept[:5]] == [(True, True)] * 5  # told, but not asked to drop


def test_random_weights_are_refused(config: Config) -> None:
    model = replace(config.model, name="ViT-B-32", pretrained="random")
    with pytest.raises(ConfigError, match="CLIPScore needs a pretrained model"):
        filter_edits(replace(config, model=model), dry_run=True)
