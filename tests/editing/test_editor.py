"""An editor of a new kind is one entry of the table; it needs no diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex import load_editor, recipe
from flyp_saflex.editing.editor import Request
from flyp_saflex.editing.generate import generate
from flyp_saflex.editing.settings import EditorKind
from flyp_saflex.errors import ConfigError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.tables import EDITORS

TEXTS = """dataset = "folder"
[[edits]]
domain = "fog"
instruction = "put the {} in the fog"
[[edits]]
domain = "thin fog"
instruction = "put the {} in thin fog"
"""


class FogEditor:
    """An editor of pillow alone: blends the source with grey; `editor.strength` is the part of the fog."""

    def __init__(self, settings: EditorConfig) -> None:
        self.settings, self.identity = settings, {"model": "fog", "revision": "1"}

    def output_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        return width_px, height_px

    def edit(self, requests: list[Request]) -> list[Image.Image | str]:
        assert len(requests) <= self.settings.batch_size
        assert self.settings.strength is not None
        fog = [Image.new("RGB", request.image.size, (190, 190, 190)) for request in requests if request.image]
        pairs = zip(requests, fog, strict=True)
        return [Image.blend(request.image, grey, self.settings.strength) for request, grey in pairs if request.image]


def load_fog(settings: EditorConfig, *, device: object) -> FogEditor:
    return FogEditor(settings)


@pytest.fixture(params=["callable", "name"])
def fog(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    load = load_fog if request.param == "callable" else f"{__name__}:load_fog"
    monkeypatch.setitem(EDITORS, "fog", EditorKind(text="instruction", usual={"strength": 0.6}, load=load))


def test_a_new_kind_is_one_entry_of_the_table(fog: None, tiny_images_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.toml").write_text(TEXTS, encoding="utf-8")
    options = [
        f"data.root={tiny_images_dir}",
        "data.train_domains=day",
        f"cache.root={tmp_path / 'cache'}",
        f"editor.prompts={tmp_path / 'texts.toml'}",
        "editor.kind=fog",
        "editor.batch_size=3",
    ]
    entry = generate(recipe.load("folder", options), limit=4)
    rows = [json.loads(line) for line in (entry / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8
    assert (entry / "DONE").is_file()
    assert entry.name.startswith("fog-")
    for row in rows:
        assert (row["kind"], row["model"], row["revision"], row["strength"]) == ("fog", "fog", "1", 0.6)
        assert not {"steps", "guidance", "image_guidance"} & row.keys()
        with Image.open(tiny_images_dir / row["source_id"]) as source, Image.open(entry / row["file_name"]) as edit:
            expected = 0.4 * np.asarray(source.convert("RGB"), dtype=float) + 0.6 * 190
            assert np.abs(np.asarray(edit) - expected).max() <= 1
    assert json.loads((entry / "settings.json").read_text(encoding="utf-8"))["model"] == ""


def test_options_that_a_kind_does_not_have_are_refused(fog: None) -> None:
    for option, value in (("model", "an/editor"), ("guidance", 3.0), ("steps", 4)):
        with pytest.raises(ConfigError, match=f"editor.{option} is set but editor.kind = fog has no such thing: remove it"):
            load_editor(EditorConfig(kind="fog", **{option: value}))
    assert load_editor(EditorConfig(kind="fog", strength=0.2)).settings.strength == 0.2
