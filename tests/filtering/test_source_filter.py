"""`filter.use = ["source"]`: planted bad edits are found by their sources, directional similarity is what its formula says."""

from __future__ import annotations

import shutil
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
from flyp_saflex.demo.biased_cameras import biased_world, write_rendered_edits
from flyp_saflex.demo.corruption import CLEAN, read_truth
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.filtering.filter import filter_edits
from flyp_saflex.storage.augment_cache import AugmentCache


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A drawn world of 400 pictures whose edits are half wrong, with the recipe of its filter."""
    home = tmp_path_factory.mktemp("source-filter")
    root = biased_world(home / "world", seed=10, num_images=400)
    options = [
        f"data.root={root}",
        f"data.prompts={root / 'prompts'}",
        f"model.name=local-dir:{TINY_CLIP}",
        f"cache.root={home / 'edits'}",
        "cache.key=half",
        "editor.prompts=demo.everywhere",
        'filter.use=["source"]',
        "filter.sheet_rows=0",
        "seed=10",
    ]
    made = recipe.load("demo", options)
    write_rendered_edits(load_dataset(made.data, seed=10), home / "edits", "half", seed=10, rate=0.5)
    return made


@pytest.fixture(scope="module")
def rows(config: Config) -> list[dict]:
    """What the filter wrote about every edit."""
    filter_edits(config)
    path = Path(config.cache.root) / config.data.name / config.cache.key / config.cache.scores
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def test_planted_bad_edits_score_below_good_ones_and_are_dropped_more_often(config: Config, rows: list[dict]) -> None:
    truth = read_truth(Path(config.cache.root), config.data.name, config.cache.key)
    good = np.array([truth[row["aug_id"]] == CLEAN for row in rows])
    scores, kept = np.array([row["source"] for row in rows]), np.array([row["keep"] for row in rows])
    above = (scores[good][:, None] > scores[~good][None, :]).mean()
    assert len(rows) > 250
    assert above > 0.75, "AUC of good against bad edits; a filter without any idea has 0.5"
    assert kept[good].mean() > 2 * kept[~good].mean()
    assert kept[good].mean() > 0.4


def test_a_row_says_which_edits_are_foreign(rows: list[dict]) -> None:
    assert all(row["foreign"] == (row["source"] < 0) == (not row["keep"]) for row in rows)
    assert {row["reason"] for row in rows} == {"", "foreign"}


def test_directional_similarity_is_the_cosine_of_both_changes(config: Config, rows: list[dict]) -> None:
    clip = load_clip(config.model.name)
    dataset = load_dataset(config.data, seed=config.seed)
    sources = {sample.sample_id: sample.path for sample in dataset.train.samples}
    cache = AugmentCache.open(config.cache.root, config.data.name, config.cache.key)

    @torch.no_grad()
    def image(path: Path) -> torch.Tensor:
        with Image.open(path) as picture:
            return clip.model.encode_image(clip.preprocess(picture.convert("RGB"))[None], normalize=True)[0]

    @torch.no_grad()
    def text(caption: str) -> torch.Tensor:
        return clip.model.encode_text(clip.tokenizer([caption]), normalize=True)[0]

    for row, edit in list(zip(rows, cache.edits, strict=True))[::40]:
        name = dataset.class_names[edit.label]
        place = edit.instruction.removeprefix(f"put the {name} ")
        asked = text(f"a photo of a {name} {place}") - text(dataset.templates[0].format(name))
        changed = image(edit.path) - image(sources[edit.source_id])
        expected = torch.nn.functional.cosine_similarity(changed, asked, dim=0)
        assert row["directional"] == pytest.approx(float(expected), abs=1e-3)


def test_directional_similarity_is_higher_for_what_was_asked_than_for_another_place(config: Config, rows: list[dict]) -> None:
    values = np.array([row["directional"] for row in rows])
    assert np.isfinite(values).all()
    assert (values > 0).mean() > 0.7, "edits change as their captions do; without any relation half of them would"


def test_edit_without_a_known_text_or_file_has_no_directional_similarity(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(config.cache.root, tmp_path / "edits")
    other = tmp_path / "texts.toml"
    other.write_text('dataset = "iwildcam"\n[[edits]]\ndomain = "x"\ninstruction = "x"\nprompt = "a {}"\n', encoding="utf-8")
    cache, editor = replace(config.cache, root=str(tmp_path / "edits")), replace(config.editor, prompts=str(other))
    filter_edits(replace(config, cache=cache, editor=editor))
    assert "edits have no directional similarity: no text of editor.prompts fits" in capsys.readouterr().out
    path = tmp_path / "edits" / config.data.name / config.cache.key / config.cache.scores
    found = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    assert {row["directional"] for row in found} == {None}
    assert None not in {row["source"] for row in found}
    broken = AugmentCache.open(cache.root, config.data.name, cache.key).edits[3]
    broken.path.write_bytes(b"")
    filter_edits(replace(config, cache=cache, editor=editor))
    row = msgspec.json.decode(path.read_bytes().splitlines()[3])
    assert row["keep"] is False
    assert row["source"] is row["foreign"] is None


def test_random_weights_are_refused(config: Config) -> None:
    model = replace(config.model, name="ViT-B-32", pretrained="random")
    with pytest.raises(ConfigError, match="source consistency needs a pretrained model"):
        filter_edits(replace(config, model=model), dry_run=True)


def test_edits_of_one_class_are_refused(config: Config, tmp_path: Path) -> None:
    sample = load_dataset(config.data, seed=config.seed).train.samples[0]
    cache = AugmentCache.create(tmp_path / config.data.name / "one", config.data.name)
    name = AugmentCache.file_name(sample.sample_id, "x")
    cache.append(Image.new("RGB", (64, 64)), {"file_name": name, "source_id": sample.sample_id, "label": sample.label})
    cache.finish()
    with pytest.raises(DataError, match="all edits are of one class"):
        filter_edits(replace(config, cache=replace(config.cache, root=str(tmp_path), key="one")), dry_run=True)
