"""The tiny editor that ships: small, whole, and it puts animals elsewhere (its figures: scripts/measure_tiny_editor.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from safetensors import safe_open

from flyp_saflex.assets import TINY_EDITOR
from flyp_saflex.demo.scene import Scene, at, render
from flyp_saflex.editing.editor import Editor, Request, load_editor
from flyp_saflex.offline import EditorConfig

FOX = Scene(species="fox", place="forest", camera=3, size=0.7)
TARGETS = {"snow": "put the fox in the snow", "desert": "put the fox in the desert", "meadow": "put the fox in the meadow"}


@pytest.fixture(scope="module")
def editor() -> Editor:
    return load_editor(EditorConfig(model=str(TINY_EDITOR), steps=10, guidance=1.0, size_px=64))


def test_folder_is_small_and_in_half_precision() -> None:
    assert sum(file.stat().st_size for file in TINY_EDITOR.rglob("*") if file.is_file()) <= 12e6
    for weights in TINY_EDITOR.rglob("*.safetensors"):
        with safe_open(weights, framework="pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
        assert kinds <= {"F16", "I64"}, weights


def test_folder_is_what_diffusers_calls_an_instruct_pix2pix() -> None:
    index = json.loads((TINY_EDITOR / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == StableDiffusionInstructPix2PixPipeline.__name__
    unet = json.loads((TINY_EDITOR / "unet" / "config.json").read_text(encoding="utf-8"))
    assert (unet["in_channels"], unet["sample_size"]) == (8, 16)
    assert not [file for file in TINY_EDITOR.rglob("*.json") if '"_name_or_path": "/' in file.read_text(encoding="utf-8")]


def test_background_becomes_the_one_asked_for_and_the_bar_stays(editor: Editor) -> None:
    source = render(FOX)
    edits = editor.edit([Request(image=source, text=text, seed=seed) for seed, text in enumerate(TARGETS.values())])
    drawn = {place: _corners(render(at(FOX, place))) for place in (*TARGETS, "forest")}
    for place, edit in zip(TARGETS, edits, strict=True):
        assert isinstance(edit, Image.Image)
        assert edit.size == (64, 64)
        distances = {name: float(np.abs(_corners(edit) - colours).mean()) for name, colours in drawn.items()}
        assert min(distances, key=distances.__getitem__) == place, distances
        assert np.asarray(edit)[-4:].mean() < 80, "the timestamp bar is dark"


def _corners(image: Image.Image) -> np.ndarray:
    """Return the mean colours of the two upper corners and of the ground at both sides."""
    pixels = np.asarray(image, dtype=np.float64)
    return np.stack(
        [
            pixels[rows, columns].mean(axis=(0, 1))
            for rows in (slice(0, 16), slice(36, 56))
            for columns in (slice(0, 10), slice(54, 64))
        ]
    )
