"""Editors of diffusers: what an edit depends on, sizes, kinds, safety checker, options and weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flyp_saflex.editing import prompt_encoder
from flyp_saflex.editing.diffusers_editor import DiffusersEditor
from flyp_saflex.editing.editor import Request, load_editor
from flyp_saflex.errors import ConfigError, ModelError, RunError
from flyp_saflex.offline import EditorConfig

Load = Callable[..., DiffusersEditor]
KINDS = ("instruct-pix2pix", "img2img", "text2img", "inpaint")
TOLERANCE = 2
"""Of 255, float32. Batches sum in another order; measured with the models here: 0 or 1 for every kind and scheduler."""
TEXTS = ("put the deer in the snow", "make it night", "put the deer in the snow", "the deer among rocks", "lake")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def requests(sizes: tuple[tuple[int, int], ...] = ((32, 32),) * 5) -> list[Request]:
    return [
        Request(image=picture(*size, seed=row), text=text, seed=2**63 - 1 - row, box=(8, 8, 16, 12))
        for row, (text, size) in enumerate(zip(TEXTS, sizes, strict=True))
    ]


def distance(one: Image.Image | str, other: Image.Image | str) -> int:
    assert isinstance(one, Image.Image), one
    assert isinstance(other, Image.Image), other
    assert one.size == other.size
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def largest(some: list[Any], others: list[Any]) -> int:
    return max(distance(one, other) for one, other in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def load(tiny_editor: Callable[..., Path]) -> Load:
    """`load("img2img", steps=2)`: an editor of 32 px and 2 steps, loaded once."""

    @functools.cache
    def make(kind: str, checker: str = "", **options: Any) -> DiffusersEditor:
        values = {"model": str(tiny_editor(kind, checker)), "steps": 2, "size_px": 32} | options
        editor = load_editor(EditorConfig(kind=kind, **values))
        assert isinstance(editor, DiffusersEditor)
        return editor

    return make


# What an edit depends on


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_does_not_depend_on_its_batch(kind: str, load: Load) -> None:
    editor = load(kind)
    wanted = requests()
    together = editor.edit(wanted)
    assert largest(together, [editor.edit([request])[0] for request in wanted]) <= TOLERANCE
    assert largest(together, editor.edit(wanted[::-1])[::-1]) <= TOLERANCE
    assert largest(together, load(kind, batch_size=2).edit(wanted)) <= TOLERANCE
    # and that is no empty claim: edits are far from their sources and from each other
    assert all(distance(one, other) > 50 for one, other in itertools.pairwise(together))


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_noise_of_every_step_is_the_edits_own(scheduler: str, load: Load) -> None:
    editor = load("instruct-pix2pix", scheduler=scheduler, steps=3)
    wanted = requests()
    torch.manual_seed(1)
    together = editor.edit(wanted)
    torch.manual_seed(2)
    assert largest(together, [editor.edit([request])[0] for request in wanted]) <= TOLERANCE
    assert distance(together[0], load("instruct-pix2pix", steps=3).edit(wanted[:1])[0]) > TOLERANCE


def test_noise_of_ddim_with_eta_is_the_edits_own(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler

    original = DDIMScheduler.step

    @functools.wraps(original)
    def noisy(self: Any, *args: Any, eta: float = 0.0, **options: Any) -> Any:
        return original(self, *args, eta=1.0, **options)

    editor, wanted = load("img2img", steps=6), requests()
    quiet = editor.edit(wanted)
    monkeypatch.setattr(DDIMScheduler, "step", noisy)
    together = editor.edit(wanted)
    assert largest(together, [editor.edit([request])[0] for request in wanted]) <= TOLERANCE
    assert largest(together, quiet) > TOLERANCE


def test_mixed_sizes_come_back_in_order(load: Load) -> None:
    editor = load("instruct-pix2pix", size_px=24)
    wanted = requests(((32, 32), (64, 48), (48, 64), (32, 32), (640, 480)))
    edits = editor.edit(wanted)
    assert [edit.size for edit in edits if isinstance(edit, Image.Image)] == [(24, 24), (32, 24), (24, 32), (24, 24), (32, 24)]
    assert largest(edits, [editor.edit([request])[0] for request in wanted]) <= TOLERANCE
    assert editor.edit([]) == []


@pytest.mark.parametrize("scheduler", ["UniPCMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_schedulers_with_a_memory_forget_the_batch_before(scheduler: str, load: Load) -> None:
    editor, wanted = load("img2img", scheduler=scheduler, steps=6), requests()
    first = editor.edit(wanted[:1])
    editor.edit(wanted[1:])
    assert largest(first, editor.edit(wanted[:1])) == 0


@pytest.mark.parametrize("change", ["image", "text", "seed"])
def test_an_edit_depends_on_image_text_and_seed(change: str, load: Load) -> None:
    values: dict[str, Any] = {"image": picture(32, 32), "text": "make it night", "seed": 5}
    other = values | {change: {"image": picture(32, 32, 1), "text": "snow", "seed": 6}[change]}
    edits = load("instruct-pix2pix").edit([Request(**values), Request(**other)])
    assert distance(*edits) > 20


@pytest.mark.parametrize(("kind", "option"), [("img2img", "strength"), ("instruct-pix2pix", "image_guidance")])
def test_an_edit_at_a_level_is_that_of_an_editor_set_to_it(kind: str, option: str, load: Load) -> None:
    levels = (0.5, 1.0) if option == "strength" else (1.2, 3.0)
    mixed = load(kind, **{f"{option}s": levels})
    at = [dataclasses.replace(request, level=levels[row % 2]) for row, request in enumerate(requests())]
    found = mixed.edit(at)
    for place, level in enumerate(levels):
        expected = load(kind, **{option: level}).edit(requests()[place::2])
        assert largest(found[place::2], expected) <= TOLERANCE
    assert distance(mixed.edit([at[0]])[0], mixed.edit([dataclasses.replace(at[0], level=levels[1])])[0]) > TOLERANCE


def test_half_precision_is_close_to_float32(load: Load) -> None:
    exact = load("instruct-pix2pix").edit(requests())
    for precision in ("bf16", "fp16"):
        edits = load("instruct-pix2pix", precision=precision).edit(requests())
        # 8 and 11 bits of mantissa; the noise is drawn in that precision too, from the same stream
        differences = [
            np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).mean() for a, b in zip(edits, exact, strict=True)
        ]
        assert max(differences) < 8


@pytest.mark.parametrize("kind", ["instruct-pix2pix", "img2img"])
def test_every_text_is_encoded_once(kind: str, tiny_editor: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    editor = load_editor(EditorConfig(kind=kind, model=str(tiny_editor(kind)), steps=2, size_px=16))
    seen: list[str] = []
    original = prompt_encoder.Texts._encode
    monkeypatch.setattr(prompt_encoder.Texts, "_encode", lambda self, text: (seen.append(text), original(self, text))[1])
    first = editor.edit(requests())
    assert largest(first, editor.edit(requests())) == 0
    assert sorted(seen) == sorted(set(TEXTS))
    monkeypatch.setattr(prompt_encoder, "REMEMBERED", 2)  # of four: forgotten and encoded again, the same comes out
    editor._texts._found.clear()
    assert largest(first, editor.edit(requests())) == 0
    assert len(editor._texts._found) == 2


def test_embedded_texts_equal_what_the_pipeline_encodes_itself(load: Load) -> None:
    """The calls of the documentation, without any of ours."""
    request = requests()[0]
    for kind, options in (("instruct-pix2pix", {"image_guidance_scale": 1.3, "guidance_scale": 5.0}), ("text2img", {})):
        editor = load(kind, negative_prompt="a drawing", guidance=options.get("guidance_scale"))
        direct = editor._pipeline(
            prompt=request.text,
            negative_prompt="a drawing",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(request.seed),
            **({"image": request.image} if kind == "instruct-pix2pix" else {"width": 32, "height": 32}),
            **options,
        ).images[0]
        assert distance(editor.edit([request])[0], direct) == 0
        assert distance(load(kind).edit([request])[0], direct) > 0  # the negative prompt counts


def test_a_compiled_denoiser_gives_the_same_edit(load: Load) -> None:
    with torch.compiler.set_stance("force_eager"):  # the real compiler takes minutes on a small machine
        editor = load("img2img", compile=True)
        assert editor._pipeline.unet._compiled_call_impl is not None
        assert largest(editor.edit(requests()), load("img2img").edit(requests())) == 0


# Sizes


@pytest.mark.parametrize("kind", ["instruct-pix2pix", "img2img", "inpaint"])
def test_every_size_is_edited(kind: str, load: Load) -> None:
    editor = load(kind, size_px=0, steps=2)
    assert editor.grid_px == 4
    for size in ((1, 1), (1, 7), (5, 5), (13, 17), (28, 36), (20, 44)):
        edit = editor.edit([Request(image=picture(*size), text="snow", seed=0, box=(0, 0, size[0] / 2, size[1] / 4))])[0]
        assert isinstance(edit, Image.Image), edit
        assert edit.size == editor.output_size(*size)


def test_a_thin_source_is_refused_and_the_others_are_edited(load: Load) -> None:
    thin = Request(image=picture(1, 100), text="snow", seed=0)
    edits = load("instruct-pix2pix").edit([thin, requests()[0]])
    assert edits[0] == "the source is 1 x 100 px, more than 8 times as long as wide"
    assert isinstance(edits[1], Image.Image)


def test_other_modes_are_read_as_rgb(load: Load) -> None:
    grey = picture(32, 32).convert("L")
    edits = load("img2img").edit([Request(image=image, text="snow", seed=0) for image in (grey, grey.convert("RGB"))])
    assert distance(*edits) <= TOLERANCE


# Kinds


def test_inpaint_keeps_the_box_and_repaints_the_rest(load: Load) -> None:
    source = picture(64, 64)
    edit = load("inpaint", size_px=64).edit([Request(image=source, text="snow", seed=0, box=(16, 24, 32, 20))])[0]
    same = (np.asarray(edit) == np.asarray(source)).all(axis=2)
    assert same[24:44, 16:48].all()
    same[24:44, 16:48] = False
    assert same.mean() < 0.01


def test_inpaint_without_a_usable_box_says_so(load: Load) -> None:
    boxes = (None, (40, 40, 8, 8), (-8, -8, 100, 100), (4, 4, 0, 0), (float("nan"), 0, 1, 1))
    edits = load("inpaint").edit([Request(image=picture(32, 32), text="snow", seed=0, box=box) for box in boxes])
    assert [str(edit).split(":")[0].split(" (")[0] for edit in edits] == [
        "there is no box to keep",
        "its box",
        "its box covers the whole source",
        "its box",
        "its box",
    ]


def test_text2img_makes_squares_without_a_source(load: Load) -> None:
    editor = load("text2img", size_px=30)
    assert editor.output_size(640, 480) == (32, 32)
    edits = editor.edit([Request(image=image, text="snow", seed=0) for image in (None, picture(64, 32))])
    assert distance(*edits) <= TOLERANCE


def test_a_source_that_is_needed_is_asked_for(load: Load) -> None:
    assert load("img2img").edit([Request(image=None, text="snow", seed=0)]) == ["there is no source image"]


def test_auto_takes_a_newer_instruction_editor(tmp_path: Path) -> None:
    from tiny_models import build_tiny_kontext

    model = str(build_tiny_kontext(tmp_path / "kontext"))
    editor = load_editor(EditorConfig(kind="auto", model=model, steps=2, size_px=32))
    assert editor.grid_px == 8
    assert editor.batch_size == 1
    wanted = requests(((32, 32), (48, 40), (32, 32), (32, 32), (32, 32)))[:3]
    edits = editor.edit(wanted)
    assert [editor.output_size(*request.image.size) for request in wanted if request.image] == [edit.size for edit in edits]
    assert largest(edits[::-1], editor.edit(wanted[::-1])) == 0
    for options, message in (
        ({"strength": 0.5}, "has no strength: remove the option"),
        ({"image_guidance": 1.5}, "has no image_guidance_scale: remove the option"),
        ({"negative_prompt": "a drawing"}, "editor.negative_prompt has no effect on FluxKontextPipeline"),
        ({"scheduler": "DDIMScheduler"}, "use one of FlowMatchEulerDiscreteScheduler"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_editor(EditorConfig(kind="auto", model=model, steps=2, **options))


def test_auto_equals_the_kind_that_the_folder_is_of(load: Load, tiny_editor: Callable[..., Path]) -> None:
    known = load("instruct-pix2pix", guidance=6.0, image_guidance=1.4)
    auto = load_editor(
        EditorConfig(
            kind="auto", model=str(tiny_editor("instruct-pix2pix")), steps=2, size_px=32, guidance=6.0, image_guidance=1.4
        )
    )
    assert largest(known.edit(requests()), auto.edit(requests())) <= TOLERANCE


# The safety checker


@pytest.mark.parametrize("kind", ["instruct-pix2pix", "text2img"])
def test_the_safety_checker_is_used_where_there_is_one_unless_told_otherwise(kind: str, load: Load) -> None:
    expected = load(kind).edit(requests())
    assert load(kind, "blocks").edit(requests()) == ["the safety checker flagged it"] * 5
    assert largest(load(kind, "passes").edit(requests()), expected) <= TOLERANCE
    unchecked = load(kind, "blocks", safety_checker=False)
    assert unchecked._pipeline.safety_checker is None
    assert largest(unchecked.edit(requests()), expected) <= TOLERANCE


# Options that do not fit the model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DDMScheduler", "did you mean 'DDPMScheduler'"),
        ("FlowMatchEulerDiscreteScheduler", "does not fit editor.model"),
        ("DPMSolverSDEScheduler", "does not depend on the seed"),
    ],
)
def test_schedulers_that_cannot_be_used(name: str, message: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=message):
        load("instruct-pix2pix", scheduler=name)


def test_a_text_that_would_be_cut_short_is_refused(load: Load) -> None:
    long = "put the deer in the snow " * 5
    for kind in ("instruct-pix2pix", "img2img"):
        editor = load(kind)
        edits = editor.edit([Request(image=picture(32, 32), text=text, seed=0) for text in (long, "snow")])
        assert str(edits[0]).endswith("text encoder reads 64: shorten it")
        assert isinstance(edits[1], Image.Image)
        with pytest.raises(ConfigError, match=r"editor.negative_prompt: the text .* shorten it"):
            load(kind, negative_prompt=long)


@pytest.mark.parametrize("fitting", [1, 2, 3])
def test_a_batch_is_halved_until_it_fits_and_its_edits_stay_what_they_are(
    fitting: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load("img2img").edit(requests())
    editor, told, tried = load("img2img"), [], []
    monkeypatch.setattr(editor, "batch_size", 5)  # and back again: other tests have the same editor
    monkeypatch.setattr(editor, "tell", told.append)
    forward = editor._pipeline.unet.forward

    def little_memory(sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        tried.append(len(sample) // 2)  # with and without the text
        if tried[-1] > fitting:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(editor._pipeline.unet, "forward", little_memory)
    assert largest(editor.edit(requests()), expected) <= TOLERANCE
    sizes = {1: [5, 3, 2, 1], 2: [5, 3, 2, 1], 3: [5, 3, 2]}[fitting]  # the last of five is alone with batches of two
    assert [size for size, _ in itertools.groupby(tried)] == sizes
    assert editor.batch_size == {1: 1, 2: 2, 3: 3}[fitting]
    assert [line.partition(" ")[0] for line in told] == {1: ["5", "3", "2"], 2: ["5", "3"], 3: ["5"]}[fitting]
    assert told[0] == "5 edits of 32 x 32 px do not fit into the GPU's memory: going on with 3 at once"
    tried.clear()
    editor.edit(requests())
    assert max(tried) == editor.batch_size, "what did not fit is not tried again"


def test_too_little_gpu_memory_for_one_edit_is_the_users_to_mend(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = load("img2img")
    monkeypatch.setattr(editor, "batch_size", 5)
    monkeypatch.setattr(editor, "tell", lambda _: None)

    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(editor._pipeline.unet, "forward", full)
    with pytest.raises(RunError, match=r"an edit of 32 x 32 px does not fit .* lower editor.size_px"):
        editor.edit(requests())


# Weights


def test_the_identity_is_the_content_and_not_the_place(tiny_editor: Callable[..., Path], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_editor("img2img"), tmp_path / "mine"))

    def identity(folder: Path) -> dict[str, str]:
        return load_editor(EditorConfig(kind="img2img", model=str(folder))).identity

    first, copy = identity(tiny_editor("img2img")), identity(moved)
    assert first["revision"] == copy["revision"]
    assert re.fullmatch(r"sha256:[0-9a-f]{16}", copy["revision"])
    assert copy["model"] == "mine"
    settings = moved / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text(encoding="utf-8").replace("0.012", "0.013"), encoding="utf-8")
    assert identity(moved)["revision"] != first["revision"]


@pytest.mark.parametrize(
    ("kind", "folder", "message"),
    [
        ("img2img", "inpaint", "its UNet has 9 input channels, but editor.kind = img2img needs 4; use editor.kind = inpaint"),
        ("instruct-pix2pix", "text2img", "its UNet has 4 input channels, but editor.kind = instruct-pix2pix needs 8"),
        ("img2img", "instruct-pix2pix", "cannot be loaded for editor.kind = img2img"),
        ("auto", "text2img", "StableDiffusionPipeline takes no image, so it cannot be used with editor.kind = auto"),
    ],
)
def test_weights_of_another_kind_are_refused(kind: str, folder: str, message: str, tiny_editor: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_editor(EditorConfig(kind=kind, model=str(tiny_editor(folder))))
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_pipeline(tiny_editor: Callable[..., Path], tmp_path: Path) -> None:
    def message(model: str, **options: Any) -> str:
        with pytest.raises((ModelError, ConfigError)) as caught:
            load_editor(EditorConfig(model=model, **options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no such folder, and it is no hub id" in message(str(tmp_path / "nothing"))
    assert "the folder has no model_index.json" in message(str(tmp_path))
    broken = Path(shutil.copytree(tiny_editor("instruct-pix2pix"), tmp_path / "broken"))
    assert "is a folder: remove the revision" in message(str(broken), revision="main")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded for editor.kind = instruct-pix2pix" in message(str(broken))
    weights.unlink()
    assert "cannot be loaded for editor.kind = instruct-pix2pix" in message(str(broken))
    (broken / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "Mine"]}), encoding="utf-8")
    assert "code that comes with weights is not run" in message(str(broken))
    (broken / "model_index.json").write_text("{", encoding="utf-8")
    assert "model_index.json cannot be read" in message(str(broken))


def test_a_hub_id_without_a_network(tiny_editor: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier download is used, and its commit is the revision; otherwise one line says what to do."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"timbrooks/instruct-pix2pix: .* hub cannot be reached, and nothing is kept here"):
        load_editor(EditorConfig())
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "models--timbrooks--instruct-pix2pix"
    shutil.copytree(tiny_editor("instruct-pix2pix", "passes"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    for checker in (True, False):
        editor = load_editor(EditorConfig(safety_checker=checker))
        assert editor.identity == {"model": "timbrooks/instruct-pix2pix", "revision": commit}
        assert (editor._pipeline.safety_checker is not None) == checker


@pytest.mark.slow  # imports the libraries once more
def test_settings_need_no_diffusers_and_loading_is_silent(tiny_editor: Callable[..., Path]) -> None:
    """In a process of its own: warnings as errors, and whatever the libraries would print."""
    code = f"""
import sys
from flyp_saflex.offline import EditorConfig
from flyp_saflex.editing.editor import Request, load_editor
from flyp_saflex.editing.settings import resolve
from PIL import Image
resolve(EditorConfig())
assert not {{"torch", "diffusers"}} & set(sys.modules)
editor = load_editor(EditorConfig(model={str(tiny_editor("instruct-pix2pix", "blocks"))!r}, steps=2, size_px=16))
print(editor.edit([Request(image=Image.new("RGB", (16, 16)), text="snow", seed=0)]))
"""
    done = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['the safety checker flagged it']\n", "")
