"""Editor presets: every one edits with a tiny pipeline of its class, each edit from its request alone, batched or not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flyp_saflex.editing import generate as generate_module
from flyp_saflex.editing.control_image import canny
from flyp_saflex.editing.cost import preset_note
from flyp_saflex.editing.editor import Request, load_editor
from flyp_saflex.editing.presets import area_size, check_preset
from flyp_saflex.editing.settings import resolve
from flyp_saflex.errors import ConfigError, ModelError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.recipe import load as load_recipe
from flyp_saflex.storage import augment_cache_writer as writer_module
from flyp_saflex.tables import EDITORS, PRESETS

TOLERANCE = 2
"""Of 255, float32: batches sum in another order."""
TEXTS = ("put the deer in the snow", "make it night", "put the deer in the snow", "lake")


def picture(seed: int) -> Image.Image:
    """Return coarse noise: 8 x 8 px blocks have edges and survive a rescaling."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1))


def requests() -> list[Request]:
    return [Request(image=picture(row), text=text, seed=row, box=(8, 8, 16, 12)) for row, text in enumerate(TEXTS)]


def distance(one: Any, other: Any) -> int:
    assert isinstance(one, Image.Image), one
    assert isinstance(other, Image.Image), other
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from functools import cache

    from tiny_presets import build_controlnet, build_preset

    root = tmp_path_factory.mktemp("presets")

    @cache
    def build(preset: str) -> Path:
        return build_controlnet(root / preset) if preset == "controlnet" else build_preset(root / preset, preset)

    return build


@pytest.fixture
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Qwen-Image-Edit see sources of 64 x 64 px instead of a megapixel."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module

    whole = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: whole(64 * 64, ratio))
    monkeypatch.setitem(PRESETS, "qwen-image-edit", dataclasses.replace(PRESETS["qwen-image-edit"], source_area_px=64 * 64))


def edit_config(folders: Any, preset: str, **options: Any) -> EditorConfig:
    more = {"controlnet": str(folders("controlnet"))} if preset == "controlnet-canny" else {}
    size_px = 64 if preset == "flux2-klein" else 32  # it refuses smaller ones
    return EditorConfig(preset=preset, model=str(folders(preset)), steps=2, size_px=size_px, **more, **options)


@pytest.mark.usefixtures("small_areas")
@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_edits_from_the_request_alone_in_batches_or_one_by_one(
    preset: str, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = load_editor(edit_config(folders, preset))
    assert not PRESETS[preset].pipeline or type(editor._pipeline).__name__ == PRESETS[preset].pipeline  # type: ignore[attr-defined]
    calls: list[int] = []
    run = type(editor)._run  # type: ignore[attr-defined]
    monkeypatch.setattr(type(editor), "_run", lambda self, part, size: (calls.append(len(part)), run(self, part, size))[1])
    wanted = requests()
    torch.manual_seed(1)
    together = editor.edit(wanted)
    assert calls == ([4] if PRESETS[preset].batched else [1, 1, 1, 1])
    torch.manual_seed(2)
    alone = [editor.edit([request])[0] for request in wanted]
    assert max(distance(one, other) for one, other in zip(together, alone, strict=True)) <= TOLERANCE
    assert max(distance(one, other) for one, other in zip(together, editor.edit(wanted[::-1])[::-1], strict=True)) <= TOLERANCE
    # that is no empty claim: edits differ, and each of source, text and seed counts
    assert all(distance(one, other) > 20 for one, other in itertools.pairwise(together))
    one = wanted[0]
    assert distance(editor.edit([one])[0], alone[0]) == 0
    changes = {"text": "lake", "seed": 9} | ({} if preset == "text2img" else {"image": picture(7)})
    for name, value in changes.items():
        values = {"image": one.image, "text": one.text, "seed": one.seed, "box": one.box, name: value}
        assert distance(editor.edit([Request(**values)])[0], alone[0]) > 0, name


def killed_at_the_second_batch(config: Any) -> int:
    """Run `generate` in a child that kills itself between the images and the rows of its second batch; return its signal."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        write, batches = writer_module.append_rows, itertools.count()

        def append(path: Path, rows: Any) -> None:
            if path.name == "metadata.jsonl" and next(batches) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, rows)

        writer_module.append_rows = append
        generate_module.generate(config)
    finally:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.usefixtures("small_areas")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_killed_entry_goes_on_to_the_same_bytes(
    preset: str, folders: Any, tiny_images_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [{"category": "1", "conf": 0.9, "bbox": [0.25, 0.25, 0.5, 0.4]}]
    images = [str(path.relative_to(tiny_images_dir)) for path in sorted(tiny_images_dir.glob("day/*/*"))]
    boxes, texts = tmp_path / "boxes.json", tmp_path / "texts.toml"
    boxes.write_text(json.dumps({"images": [{"file": name, "detections": found} for name in images]}), encoding="utf-8")
    texts.write_text('[[edits]]\ndomain = "snow"\ninstruction = "put the deer in the snow"\nprompt = "put the {} in the snow"\n')
    config = edit_config(folders, preset, batch_size=2, prompts=str(texts))
    editor = load_editor(config)
    monkeypatch.setattr(generate_module, "load_editor", lambda *_, **__: editor)
    recipe = load_recipe("folder", [f"data.root={tiny_images_dir}", "data.train_domains=day", "data.test_domains=night"])
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, boxes=str(boxes), shots=2), editor=config)

    def at(name: str) -> Any:
        return dataclasses.replace(recipe, cache=dataclasses.replace(recipe.cache, root=str(tmp_path / name)))

    def files(entry: Path) -> dict[str, bytes]:
        paths = [entry / "metadata.jsonl", entry / "DONE", *sorted(entry.glob("images/**/*.png"))]
        return {str(path.relative_to(entry)): path.read_bytes() for path in paths}

    whole = files(generate_module.generate(at("whole")))
    assert len(whole) == 2 + 6, "two images of three classes"
    assert killed_at_the_second_batch(at("killed")) == signal.SIGKILL
    (entry,) = (tmp_path / "killed" / "folder").iterdir()
    assert len((entry / "metadata.jsonl").read_text().splitlines()) == 2, "the first batch is there, the second is lost"
    assert files(generate_module.generate(at("killed"))) == whole


def test_a_preset_fills_in_what_is_unset_and_is_stable() -> None:
    kontext = resolve(EditorConfig(preset="flux-kontext", steps=8))
    assert (kontext.kind, kontext.model, kontext.steps, kontext.guidance, kontext.size_px) == (
        "auto", "black-forest-labs/FLUX.1-Kontext-dev", 8, 2.5, 1024,
    )  # fmt: skip
    assert resolve(EditorConfig(preset="instruct-pix2pix")).image_guidance == 1.3
    for name in PRESETS:
        settings = resolve(EditorConfig(preset=name))
        assert resolve(settings) == settings
        assert settings.kind in EDITORS
        assert settings.model
        assert "licence" in preset_note(settings)
    assert preset_note(EditorConfig()) == ""


def test_presets_that_cannot_be_used_are_one_line(folders: Any, tmp_path: Path) -> None:
    def line(config: EditorConfig) -> str:
        with pytest.raises((ConfigError, ModelError)) as caught:
            load_editor(config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "editor.preset = 'flux-context': expected one of" in line(EditorConfig(preset="flux-context"))
    with pytest.raises(ConfigError, match="did you mean 'flux-kontext'"):
        load_recipe("folder", ["editor.preset=flux-context"])
    assert "is of the kind auto, but editor.kind = img2img" in line(EditorConfig(preset="flux-kontext", kind="img2img"))
    assert "is a StableDiffusionInpaintPipeline, but editor.preset = flux-kontext needs a FluxKontextPipeline" in line(
        EditorConfig(preset="flux-kontext", model=str(folders("inpaint")))
    )
    assert "use editor.preset = flux-kontext" in line(EditorConfig(preset="flux2-klein", model=str(folders("flux-kontext"))))
    assert "editor.controlnet is set but editor.kind = img2img" in line(EditorConfig(preset="img2img", controlnet="a/b"))
    (tmp_path / "empty").mkdir()
    for name in ("nothing here", str(tmp_path / "empty")):
        assert f"editor.controlnet = {name}" in line(
            EditorConfig(preset="controlnet-canny", model=str(folders("text2img")), controlnet=name)
        )
    old = SimpleNamespace(__version__="0.36.0")
    with pytest.raises(
        ModelError, match=r"needs diffusers' Flux2KleinPipeline, which diffusers 0\.36\.0 does not have: install a"
    ):
        check_preset(old, resolve(EditorConfig(preset="flux2-klein")))


def test_edges_are_thin_lines_where_the_grey_value_jumps() -> None:
    pixels = np.zeros((24, 32, 3), dtype=np.uint8)
    pixels[6:18, 8:24] = 200
    edges = np.asarray(canny(Image.fromarray(pixels)))[:, :, 0] > 0
    inner = edges[9:15]
    assert inner.sum(axis=1).tolist() == [2] * 6  # one pixel for each of the two sides
    assert set(np.flatnonzero(inner.any(axis=0))) <= {7, 8, 23, 24}
    assert not edges[:4].any()
    assert not edges[10:14, 12:20].any()
    assert not np.asarray(canny(Image.new("RGB", (16, 16), (90, 90, 90)))).any()


def test_areas_are_those_that_the_pipeline_calculates_and_stable() -> None:
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    assert area_size(512, 512, 1024 * 1024) == (1024, 1024)
    for width in range(64, 2048, 40):
        size = area_size(width, 512, 1024 * 1024)
        assert calculate_dimensions(1024 * 1024, size[0] / size[1])[:2] == size
