"""Fixtures for runs of the trainer: a recipe of a few steps on the tiny images, and edits of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flyp_saflex import recipe
from flyp_saflex.cache import AugmentCache
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset


@pytest.fixture(scope="session", autouse=True)
def _keep_libraries_out_of_garbage_collection() -> Iterator[None]:
    """Every run ends in a full collection, a fifth of its time: most of what it looks at are modules that stay."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tiny_options(tiny_clip_dir: Path, tiny_images_dir: Path, tmp_path: Path) -> list[str]:
    """`--set` values of a run that takes a second: 12 training images of 3 classes, 5 steps of 6 rows."""
    return [
        f"data.root={tiny_images_dir}",
        "data.train_domains=day",
        "data.test_domains=night",
        "data.select_fraction=0.25",
        "data.test_fraction=0.25",
        f"model.name=local-dir:{tiny_clip_dir}",
        "model.pretrained=",
        f"cache.root={tmp_path / 'augment_cache'}",
        "train.steps=5",
        "train.batch_size=6",
        "train.lr=1e-3",
        "train.head_lr=1e-2",
        "train.warmup_steps=2",
        "train.log_every=1",
        "train.checkpoint_every=0",
        "evaluate.batch_size=8",
        "evaluate.bootstrap=0",
        "seed=3",
    ]


@pytest.fixture
def make_config(tiny_options: list[str]) -> Callable[..., Config]:
    """`make_config("train.steps=2", ...)`: the tiny recipe with some options changed."""
    return lambda *overrides: recipe.load("folder", [*tiny_options, *overrides])


@pytest.fixture
def edits(make_config: Callable[..., Config]) -> AugmentCache:
    """Two edits of every training image: one darkened, one upside down."""
    config = make_config()
    samples = load_dataset(config.data, seed=config.seed).train.samples
    cache = AugmentCache.create(Path(config.cache.root) / "folder" / "v1", "folder")
    from PIL import Image

    for sample in samples:
        with Image.open(sample.path) as image:
            for number, edit in enumerate((image.point(lambda value: value // 2), image.rotate(180))):
                name = AugmentCache.file_name(sample.sample_id, "", number)
                row = {"file_name": name, "source_id": sample.sample_id, "label": sample.label, "instruction": ""}
                cache.append(edit, row)
    cache.finish()
    return cache


@pytest.fixture(scope="session")
def tiny_editor(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_editor("img2img")`: folder of a diffusers pipeline with random weights (`tiny_models.py`), built once."""
    from functools import cache

    from tiny_models import build_tiny_editor

    root = tmp_path_factory.mktemp("tiny_editors")

    @cache
    def build(kind: str, safety_checker: str = "") -> Path:
        return build_tiny_editor(root / f"{kind}-{safety_checker or 'unchecked'}", kind, safety_checker=safety_checker)

    return build
