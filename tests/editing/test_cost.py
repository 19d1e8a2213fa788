"""Calculated memory and hours: they add up, follow the options, and the documentation's table is theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flyp_saflex.editing.cost import cost_of, cost_table, preset_note, preset_of
from flyp_saflex.editing.settings import resolve
from flyp_saflex.offline import EditorConfig
from flyp_saflex.tables import PRESETS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "make-edits.md"
KONTEXT = resolve(EditorConfig(preset="flux-kontext", precision="bf16"))


def test_the_documentation_has_the_calculated_table() -> None:
    assert "\n".join(cost_table()) in PAGE.read_text(encoding="utf-8")


def test_memory_is_that_of_the_weights_that_are_on_the_gpu() -> None:
    preset = PRESETS["flux-kontext"]  # 11.9 + 4.9 + 0.08 billion parameters, two bytes each
    assert cost_of(KONTEXT, preset).gpu_gb == pytest.approx(33.76)
    assert cost_of(replace(KONTEXT, precision="no"), preset).gpu_gb == pytest.approx(67.52)
    assert cost_of(replace(KONTEXT, offload="model"), preset).gpu_gb == pytest.approx(23.8)
    assert cost_of(replace(KONTEXT, offload="model"), preset).weights_gb == pytest.approx(33.76)
    assert cost_of(replace(KONTEXT, offload="sequential"), preset).gpu_gb < 1
    int8 = cost_of(replace(KONTEXT, quantisation="int8"), preset)
    assert int8.gpu_gb == pytest.approx(11.9 + 4.9 + 0.13 + 0.16)  # the embedding and the autoencoder keep two bytes
    assert cost_of(replace(KONTEXT, quantisation="nf4"), preset).gpu_gb < 0.6 * int8.gpu_gb


def test_hours_follow_steps_size_passes_and_what_is_moved() -> None:
    preset = PRESETS["flux-kontext"]
    seconds = cost_of(KONTEXT, preset).seconds
    assert cost_of(replace(KONTEXT, steps=8), preset).seconds == pytest.approx(seconds * 8 / 28, rel=0.05)
    assert cost_of(replace(KONTEXT, size_px=512), preset).seconds == pytest.approx(seconds / 4)
    one_by_one = replace(KONTEXT, batch_size=1, offload="model")
    assert cost_of(one_by_one, preset).seconds == pytest.approx(seconds + 33.76 / 20)
    assert cost_of(replace(one_by_one, offload="sequential"), preset).seconds > seconds + 28 * 23.8 / 20
    guided = resolve(EditorConfig(preset="qwen-image-edit"))
    unguided = replace(guided, guidance=1.0)
    halved = cost_of(unguided, PRESETS["qwen-image-edit"]).seconds / cost_of(guided, PRESETS["qwen-image-edit"]).seconds
    assert halved == pytest.approx(0.5, abs=0.01)
    weak, strong = (resolve(EditorConfig(preset="img2img", strength=strength)) for strength in (0.5, 1.0))
    assert cost_of(weak, PRESETS["img2img"]).seconds < 0.6 * cost_of(strong, PRESETS["img2img"]).seconds


def test_a_dry_runs_line_tells_the_choice_and_what_would_take_less() -> None:
    note = preset_note(KONTEXT, 250)
    assert "33.8 GB of weights on the GPU (23.8 GB with editor.offload=model, 9.8 GB with editor.quantisation=nf4" in note
    assert "h for these 250 edits on a card of 24 GB; calculated from 16.9 billion parameters and 28 steps, not measured" in note
    assert "non-commercial" in note
    assert "references of one edit" in preset_note(resolve(EditorConfig(preset="flux2-klein")))
    small = preset_note(resolve(EditorConfig(preset="flux-kontext", precision="bf16", offload="model", quantisation="nf4")))
    assert "6.7 GB of weights on the GPU, 9.8 GB in main memory" in small
    assert "editor.kind = instruct-pix2pix: 5.4 GB" in preset_note(resolve(EditorConfig()))
    assert preset_of(resolve(EditorConfig(model="an/editor"))) is None
    assert preset_note(resolve(EditorConfig(model="an/editor"))) == ""
