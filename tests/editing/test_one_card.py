"""One card: LoRA adapters, offloading, VAE tiling, attention backends, quantisation; what changes edits is told."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flyp_saflex.editing import adapters, one_card
from flyp_saflex.editing.adapters import Adapter, named
from flyp_saflex.editing.diffusers_editor import DiffusersEditor
from flyp_saflex.editing.editor import Request, load_editor
from flyp_saflex.editing.pipeline_files import locate
from flyp_saflex.editing.plan import stated_settings
from flyp_saflex.editing.settings import resolve
from flyp_saflex.errors import ConfigError, ModelError, UserError
from flyp_saflex.offline import EditorConfig
from flyp_saflex.recipe import load as load_recipe


def requests(size: int = 32) -> list[Request]:
    pictures = [np.random.default_rng(row).integers(0, 256, (size, size, 3), dtype=np.uint8) for row in range(2)]
    return [
        Request(image=Image.fromarray(picture), text=text, seed=row)
        for row, (picture, text) in enumerate(zip(pictures, ("put the deer in the snow", "lake"), strict=True))
    ]


def distance(some: list[Any], others: list[Any]) -> int:
    pairs = [(np.asarray(one).astype(int), np.asarray(other)) for one, other in zip(some, others, strict=True)]
    return max(int(np.abs(one - other).max()) for one, other in pairs)


def line(config: EditorConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_editor(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def config(tiny_editor: Callable[..., Path]) -> Callable[..., EditorConfig]:
    return lambda **options: EditorConfig(
        **{"kind": "instruct-pix2pix", "model": str(tiny_editor("instruct-pix2pix")), "steps": 2, "size_px": 32} | options
    )


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import build_tiny_kontext

    return build_tiny_kontext(tmp_path_factory.mktemp("kontext") / "kontext")


def write_lora(folder: Path, model: Path, part: str, name: str, seed: int = 0) -> Path:
    """Write an adapter for a part of a pipeline, with random updates."""
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    network = getattr(pipeline, part)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = {f"{part}_lora_layers": get_peft_model_state_dict(network)}
    type(pipeline).save_lora_weights(folder, **weights, weight_name=name)
    return folder / name


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_editor: Callable[..., Path]) -> Path:
    return write_lora(tmp_path_factory.mktemp("lora"), tiny_editor("instruct-pix2pix"), "unet", "turbo.safetensors")


# Adapters


def test_an_adapter_changes_edits_by_its_scale_and_is_told_with_its_hash(config: Callable[..., EditorConfig], lora: Path) -> None:
    plain = load_editor(config()).edit(requests())
    editors = {scale: load_editor(config(lora=(f"{lora}:{scale}",))) for scale in (1e-9, 0.5, 1.0)}
    edits = {scale: editor.edit(requests()) for scale, editor in editors.items()}
    assert distance(plain, edits[1e-9]) <= 1
    assert distance(plain, edits[1.0]) > 5
    assert distance(edits[0.5], edits[1.0]) > 5
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert editors[0.5].identity["lora"] == [{"name": "turbo.safetensors", "scale": 0.5, "sha256": digest}]
    assert "lora" not in load_editor(config()).identity
    assert distance(load_editor(config(lora=(str(lora),))).edit(requests()), edits[1.0]) == 0
    assert load_editor(config(lora=(str(lora.parent),))).identity["lora"][0]["name"] == f"{lora.parent.name}/turbo.safetensors"


def test_several_adapters_add_up(config: Callable[..., EditorConfig], lora: Path, tmp_path: Path, kontext: Path) -> None:
    twice = load_editor(config(lora=(f"{lora}:0.25", f"{lora}:0.75")))
    assert distance(twice.edit(requests()), load_editor(config(lora=(str(lora),))).edit(requests())) <= 1
    own = write_lora(tmp_path, kontext, "transformer", "kontext.safetensors")
    flux = EditorConfig(preset="flux-kontext", model=str(kontext), steps=2, size_px=32)
    changed = load_editor(EditorConfig(**{**vars(flux), "lora": (str(own),)}))
    assert distance(load_editor(flux).edit(requests()), changed.edit(requests())) > 2
    assert "editor.lora: " in line(EditorConfig(**{**vars(flux), "lora": (str(lora),)}))  # of another architecture


def test_adapters_that_cannot_be_used_are_one_line(
    config: Callable[..., EditorConfig],
    lora: Path,
    tmp_path: Path,
    tiny_editor: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import load_file, save_file

    wide = {name: torch.cat([tensor, tensor], -1) for name, tensor in load_file(lora).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    save_file({"nothing.known": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(lora.read_bytes()[:50])
    (tmp_path / "pickle.bin").write_bytes(b"x")
    for file in ("wide", "other", "broken"):
        told = line(config(lora=(f"{tmp_path / file}.safetensors",)))
        assert "does not fit StableDiffusionInstructPix2PixPipeline" in told
        assert "take an adapter that was made for this model" in told
    assert "is no .safetensors file" in line(config(lora=(str(tmp_path / "pickle.bin"),)))
    assert "should hold one .safetensors file, found 3: broken.safetensors" in line(config(lora=(str(tmp_path),)))
    assert "no such file or folder, and it is no hub id" in line(config(lora=(str(tmp_path / "none.safetensors"),)))
    assert "neither a file or folder here nor to be had from the hub" in line(config(lora=("no/where-at-all/a.safetensors:0.5",)))
    for scale in ("x", "0", "nan", "inf", ""):
        assert f"has the scale '{scale}', expected a number other than 0" in line(config(lora=(f"{lora}:{scale}",)))
    monkeypatch.setattr("flyp_saflex.extras.is_installed", lambda package: package != "peft")
    assert "editor.lora needs peft, which is not installed; pip install 'flyp-saflex[edits]'" in line(config(lora=(str(lora),)))


def test_the_entry_states_adapters_without_this_machines_path(lora: Path, tiny_images_dir: Path) -> None:
    assert named(f"{lora}:0.80") == "turbo.safetensors:0.8"
    assert named("lightx2v/Qwen-Image-Lightning/a.safetensors") == "lightx2v/Qwen-Image-Lightning/a.safetensors:1"
    assert Adapter.of("owner/name:1e-1") == Adapter("owner/name", 0.1)
    recipe = load_recipe("folder", [f"data.root={tiny_images_dir}", f"editor.lora={lora}:0.5", "editor.offload=model"])
    stated = stated_settings(recipe, resolve(recipe.editor), ())
    assert stated["lora"] == ["turbo.safetensors:0.5"]
    assert "offload" not in stated, "it changes no edit, so an entry may be continued with it"
    for option in ("quantisation=nf4", "tiling=true", "attention=native"):
        name, _, value = option.partition("=")
        recipe = load_recipe("folder", [f"data.root={tiny_images_dir}", f"editor.{option}"])
        assert str(stated_settings(recipe, resolve(recipe.editor), ())[name]).lower() == value


def test_files_of_the_hub_are_fetched_by_name(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    listed = ["README.md", "turbo.safetensors"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file: str(lora.parent / file))
    assert adapters._locate("a/b") == (lora, "a/b/turbo.safetensors")
    assert adapters._locate("a/b/turbo.safetensors") == (lora, "a/b/turbo.safetensors")
    listed.append("more.safetensors")
    with pytest.raises(ModelError, match=r"found 2: more.safetensors, turbo.safetensors; name the file itself"):
        adapters._locate("a/b")


# Memory


@pytest.mark.parametrize("kind", ["instruct-pix2pix", "img2img"])
def test_offloading_part_by_part_changes_no_edit(kind: str, tiny_editor: Callable[..., Path]) -> None:
    """Without a GPU diffusers' hooks move weights from main memory to main memory; accelerate cannot do that layer by layer."""
    config = EditorConfig(kind=kind, model=str(tiny_editor(kind)), steps=2, size_px=32)
    editor = load_editor(config)
    assert isinstance(editor, DiffusersEditor)
    before, pipeline = editor.edit(requests()), editor._pipeline
    one_card.offload(pipeline, "model", torch.device("cpu"))
    assert len(pipeline._all_hooks) >= 3
    offloaded = DiffusersEditor(pipeline, editor.settings, editor.identity)
    assert distance(before, offloaded.edit(requests())) == 0


def test_offloading_without_a_gpu_is_told_and_harmless(config: Callable[..., EditorConfig]) -> None:
    settings = resolve(config(offload="sequential"))
    note = "editor.offload = sequential has no effect without a GPU: weights are in main memory anyway"
    assert one_card.offload_note(settings, torch.device("cpu")) == note
    assert one_card.offload_note(settings, torch.device("cuda")) == ""
    assert one_card.offload_note(resolve(config()), torch.device("cpu")) == ""
    assert distance(load_editor(settings).edit(requests()), load_editor(config()).edit(requests())) == 0


def test_pipelines_go_to_the_gpu_as_a_whole_or_by_diffusers_offloading(config: Callable[..., EditorConfig]) -> None:
    calls: list[tuple[Any, ...]] = []

    class Pipeline:
        dtype = torch.float32

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: calls.append((name, *args, *kwargs.values()))

    gpu, half = torch.device("cuda"), torch.float16
    for options in ({}, {"offload": "model"}, {"offload": "sequential"}, {"quantisation": "nf4"}):
        one_card.place(Pipeline(), resolve(config(**options)), gpu, half)
    assert calls == [
        ("to", gpu, half),
        ("enable_model_cpu_offload", gpu),
        ("enable_sequential_cpu_offload", gpu),
        ("to", gpu),  # bitsandbytes refuses another type of numbers
    ]


def test_tiling_is_seen_only_where_an_image_is_larger_than_a_tile(config: Callable[..., EditorConfig], tmp_path: Path) -> None:
    assert distance(load_editor(config(tiling=True)).edit(requests()), load_editor(config()).edit(requests())) == 0
    large = [load_editor(config(size_px=64, tiling=tiling)).edit(requests(64)) for tiling in (True, False)]
    assert distance(*large) > 0


def test_an_attention_backend_is_set_where_the_denoiser_knows_it(config: Callable[..., EditorConfig], kontext: Path) -> None:
    flux = EditorConfig(preset="flux-kontext", model=str(kontext), steps=2, size_px=32, attention="native")
    editor = load_editor(flux)
    assert isinstance(editor, DiffusersEditor)
    used = {processor._attention_backend for processor in editor._pipeline.transformer.attn_processors.values()}
    assert {str(getattr(backend, "value", backend)) for backend in used} == {"native"}
    assert "editor.attention = native has no effect on UNet2DConditionModel" in line(config(attention="native"))
    told = line(EditorConfig(**{**vars(flux), "attention": "xformers"}))
    assert "editor.attention = xformers cannot be used here" in told


def test_quantisation_without_a_gpu_or_bitsandbytes_is_one_line(
    config: Callable[..., EditorConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "editor.quantisation = nf4 needs an NVIDIA GPU, and the editor would run on the cpu" in line(
        config(quantisation="nf4")
    )
    monkeypatch.setattr("flyp_saflex.extras.is_installed", lambda package: package != "bitsandbytes")
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, .* pip install 'flyp-saflex\[quantisation\]'"):
        one_card.check_quantisation(resolve(config(quantisation="int8")), torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"cannot be offloaded layer by layer: set editor\.offload=model"):
        one_card.check_quantisation(resolve(config(quantisation="nf4", offload="sequential")), torch.device("cuda"))


def test_a_model_that_is_gated_or_too_large_says_what_to_do(
    config: Callable[..., EditorConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import GatedRepoError

    response: Any = SimpleNamespace(headers={}, status_code=401, request=None)

    class Gated:
        @staticmethod
        def load_config(name: str, revision: str | None) -> None:
            raise GatedRepoError("401 Client Error.\n\nAccess is restricted", response=response)

    with pytest.raises(ModelError, match=r"its weights are gated: accept their licence on .*log in with `hf auth login`"):
        locate(EditorConfig(preset="flux-kontext", model="a/gated"), Gated)

    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("diffusers.DiffusionPipeline.to", full)
    told = line(config())
    assert "does not fit into the GPU's memory: set editor.offload=model" in told
    assert "editor.quantisation=nf4" in told
