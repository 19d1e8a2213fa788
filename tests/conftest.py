"""Fixtures that several tests share: a tiny CLIP, a tiny folder of images, real data where it lies beside the checkout."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flyp_saflex.config import Config
    from flyp_saflex.storage.augment_cache import AugmentCache

# The models are so small that more threads only get in each other's way; torch and its child processes read this when loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TINY_PREPROCESS = {
    "size": 32,
    "mode": "RGB",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real images, tables and weights beside the checkout; the test is skipped without them. Never write there."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder with real data is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def _tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny_clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**TINY_CLIP)
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": TINY_PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def tiny_clip_dir(_tiny_clip: Path, tmp_path: Path) -> Path:
    """A folder for `model.name = "local-dir:..."`: ViT, 32 px, patch 8, 2 layers a tower, seeded random weights, a test's own."""
    return Path(shutil.copytree(_tiny_clip, tmp_path / "tiny_clip"))


@pytest.fixture
def tiny_images_dir(tmp_path: Path) -> Path:
    """root/<domain>/<class>/N.png: domains day and night, classes circle, square and stripes, 8 images each, 48 x 40 px."""
    import numpy as np
    from PIL import Image

    root = tmp_path / "tiny_images"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :48]
    for domain, ground in (("day", 200), ("night", 40)):
        for name in ("circle", "square", "stripes"):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for number in range(8):
                left, top = rng.integers(-6, 7, size=2)
                masks = {
                    "circle": (x - 24 - left) ** 2 + (y - 20 - top) ** 2 < 120,
                    "square": np.maximum(abs(x - 24 - left), abs(y - 20 - top)) < 10,
                    "stripes": (x + left) % 12 < 6,
                }
                pixels = rng.normal(ground, 10, size=(40, 48, 3))
                pixels[masks[name]] += (60, -30, 20) if domain == "night" else (-120, -60, 20)
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / f"{number}.png")
    return root


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
    from flyp_saflex import recipe

    return lambda *overrides: recipe.load("folder", [*tiny_options, *overrides])


@pytest.fixture
def edits(make_config: Callable[..., Config]) -> AugmentCache:
    """Two edits of every training image: one darkened, one upside down."""
    from flyp_saflex.data.registry import load_dataset
    from flyp_saflex.storage.augment_cache import AugmentCache

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
