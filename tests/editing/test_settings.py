"""The table of editors, the usual values of their options, and sizes and boxes of edits."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from flyp_saflex.editing.settings import PER_KIND, levels_of, output_size, resolve, scale_box
from flyp_saflex.errors import ConfigError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.tables import EDITORS


def test_usual_values_of_the_kinds() -> None:
    pix2pix = resolve(EditorConfig())
    assert (pix2pix.model, pix2pix.steps, pix2pix.guidance, pix2pix.image_guidance, pix2pix.strength) == (
        "timbrooks/instruct-pix2pix",
        20,
        5.0,
        1.3,
        None,
    )
    values = {kind: resolve(EditorConfig(kind=kind)) for kind in ("img2img", "text2img", "inpaint")}
    assert {kind: (s.steps, s.guidance, s.image_guidance, s.strength) for kind, s in values.items()} == {
        "img2img": (50, 7.5, None, 0.5),
        "text2img": (50, 7.5, None, None),
        "inpaint": (50, 7.5, None, 1.0),
    }
    assert {kind: s.model for kind, s in values.items()} == {
        "img2img": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "text2img": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "inpaint": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    }
    auto = resolve(EditorConfig(kind="auto", model="owner/editor"))
    assert (auto.steps, auto.guidance, auto.image_guidance, auto.strength) == (20, None, None, None)
    assert [name for name, kind in EDITORS.items() if kind.text == "instruction"] == ["instruct-pix2pix", "auto"]


@pytest.mark.parametrize("kind", ["instruct-pix2pix", "img2img", "text2img", "inpaint"])
def test_resolving_changes_no_option_that_is_set_and_is_stable(kind: str) -> None:
    config = EditorConfig(kind=kind, model="mine", steps=7, guidance=3.0, batch_size=2)
    settings = resolve(config)
    assert (settings.model, settings.steps, settings.guidance, settings.batch_size) == ("mine", 7, 3.0, 2)
    assert resolve(settings) == settings


def test_usual_values_are_of_options_that_exist_and_may_be_left_unset() -> None:
    unset = {field.name for field in dataclasses.fields(EditorConfig) if field.default is None} | {"model"}
    assert set(PER_KIND) == unset - {"size_px"}  # of a preset, not of a kind
    assert resolve(EditorConfig()).size_px == 512
    assert all(set(kind.usual) <= unset for kind in EDITORS.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "text2img", "strength": 0.5}, "editor.strength is set but editor.kind = text2img"),
        ({"strength": 0.5}, "editor.strength is set but editor.kind = instruct-pix2pix"),
        ({"kind": "img2img", "image_guidance": 1.5}, "editor.image_guidance is set but editor.kind = img2img"),
        ({"kind": "auto"}, "editor.kind = auto has no usual model: set editor.model"),
        (
            {"kind": "pix2pix"},
            "one of instruct-pix2pix, img2img, text2img, inpaint, controlnet-canny, auto; did you mean 'instruct-pix2pix'?",
        ),
        ({"kind": "text2img", "size_px": 0}, "editor.size_px = 0 keeps the source's size"),
        ({"image_guidance": 0.5}, "expected at least 1"),
        ({"guidance": 1.0, "negative_prompt": "a drawing"}, "so editor.negative_prompt has no effect"),
        ({"kind": "img2img", "strength": 0.01, "steps": 20}, "not one whole step"),
        ({"kind": "img2img", "strengths": (0.5, 0.01), "steps": 20}, "editor.strength = 0.01 of editor.steps = 20 is not one"),
        (
            {"strengths": (0.5, 0.7)},
            "editor.strengths is set but editor.kind = instruct-pix2pix has no strength: remove it, or use editor.image_guid",
        ),
        ({"kind": "text2img", "strengths": (0.5,)}, "has no strength: remove it, or use one of img2img, inpaint"),
        ({"kind": "img2img", "image_guidances": (1.5,)}, "has no image_guidance: remove it, or use editor.strengths"),
        ({"image_guidances": (1.5, 0.5)}, "editor.image_guidance = 0.5 would switch"),
        ({"kind": "img2img", "strengths": (0.5, 0.7), "strength": 0.6}, "editor.strengths is set beside editor.strength"),
        ({"kind": "img2img", "strengths": (0.5, 0.5)}, "holds a level twice"),
        ({"guidance": 1.0, "image_guidances": (1.5,)}, "so editor.image_guidances has no effect"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        resolve(EditorConfig(**options))
    assert "\n" not in str(caught.value)


def test_levels_belong_to_the_option_that_they_list() -> None:
    assert levels_of(resolve(EditorConfig(kind="img2img"))) == ("", ())
    settings = resolve(EditorConfig(kind="img2img", strengths=(0.7, 0.3)))
    assert levels_of(settings) == ("strength", (0.7, 0.3))
    assert settings.strength == 0.7
    assert levels_of(resolve(EditorConfig(image_guidances=(1.2, 1.8)))) == ("image_guidance", (1.2, 1.8))


def test_output_size_keeps_the_aspect_ratio_on_the_grid() -> None:
    assert output_size(640, 480, size_px=512, grid_px=8) == (680, 512)
    assert output_size(480, 640, size_px=512, grid_px=64) == (512, 704)
    assert output_size(1, 1, size_px=0, grid_px=8) == (8, 8)
    assert output_size(2048, 1536, size_px=0, grid_px=8) == (2048, 1536)
    assert output_size(333, 201, size_px=0, grid_px=8) == (336, 200)


def test_boxes_are_rescaled_outwards_and_clipped() -> None:
    assert scale_box((10, 20, 30, 40), (100, 100), (50, 50)) == (5, 10, 20, 30)
    assert scale_box((1, 1, 1, 1), (100, 100), (50, 50)) == (0, 0, 1, 1)
    assert scale_box((-5, 90, 20, 20), (100, 100), (200, 200)) == (0, 180, 30, 200)
    assert scale_box((100, 0, 5, 5), (100, 100), (200, 200)) is None
