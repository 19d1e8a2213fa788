"""Captioning by chat models that read images: real classes, tiny and random, asked for the scene and never for the class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_language_models import build_tiny_chat, build_tiny_vlm

from flyp_saflex import recipe
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ModelError
from flyp_saflex.prompting.captions import draw
from flyp_saflex.prompting.domains import request
from flyp_saflex.prompting.edit_prompts import load_edit_prompts
from flyp_saflex.prompting.language_models import CHAT_SIDE_PX, SCENE, Captioner
from flyp_saflex.prompting.prompts import caption_images, prompts

FAMILIES = ("qwen2.5-vl", "llava")


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from functools import cache

    root = tmp_path_factory.mktemp("vlm")
    return cache(lambda family: build_tiny_vlm(root / family, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_depends_on_its_image_alone(family: str, vlm: Callable[[str], Path]) -> None:
    captioner = Captioner(str(vlm(family)))
    images = [picture(0), picture(1), picture(2, 48, 64)]
    together, alone = captioner(images), [captioner([image])[0] for image in images]
    assert together == alone
    assert len(set(together)) == 3
    assert not any(SCENE[:20] in text for text in together), "the request is no part of the caption"


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_asked_for_the_scene_in_its_own_template(
    family: str, vlm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Captioner(str(vlm(family)), precision="bf16")
    templates, inputs = [], []
    processor = type(captioner._processor)
    template, call = processor.apply_chat_template, processor.__call__
    monkeypatch.setattr(
        processor, "apply_chat_template", lambda self, asked, **more: (templates.append(asked), template(self, asked, **more))[1]
    )
    monkeypatch.setattr(processor, "__call__", lambda self, **values: (inputs.append(values), call(self, **values))[1])
    captioner([picture(0, 1600, 800)])
    assert templates == [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SCENE}]}]]
    assert inputs[0]["images"][0][0].size == (CHAT_SIDE_PX, CHAT_SIDE_PX // 2)
    assert inputs[0]["text"][0].startswith("<|im_start|>")
    for word in ("place", "light", "weather", "viewpoint"):
        assert word in SCENE
    assert "Do not name or describe the subject" in SCENE


def test_from_images_to_edit_texts_with_a_chat_captioner(
    vlm: Callable[[str], Path], tiny_images_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [f"data.root={tiny_images_dir}", "data.train_domains=day", "data.test_domains=night", "data.select_per_class=2"]
    options += ["prompts.num_captions=2", "prompts.max_domains=2", "prompts.max_new_tokens=40"]
    options.append(f"prompts.captioner={vlm('llava')}")
    dataset = load_dataset(recipe.load("folder", options).data, seed=0)
    captions = caption_images(Captioner(str(vlm("llava"))), draw(dataset.train.samples, 2, seed=0), 16)
    question = request([caption.text for caption in captions], dataset.class_names, 2)
    chat = build_tiny_chat(tmp_path / "chat", [(question, "- near a lake")])
    texts = load_edit_prompts(str(prompts(recipe.load("folder", [*options, f"prompts.llm={chat}"]))), "folder")
    assert [edit.domain for edit in texts.edits] == ["near a lake"]
    assert texts.made["captioner_request"] == SCENE
    assert not set(dataset.class_names) & set(SCENE.lower().replace(",", " ").replace(".", " ").split())


def test_a_template_that_refuses_images_is_one_line(vlm: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(vlm("llava"), tmp_path / "strict"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('text only') }}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"its chat template refuses the request \(text only\)"):
        Captioner(str(folder))([picture(0)])
