"""Memory and hours of an editor, calculated from parameter counts, operations and steps; nothing is measured.

    seconds per edit = (steps x passes x operations of the denoiser + operations of the autoencoder) / speed
                       + bytes that offloading moves / bandwidth

Operations of one forward pass were counted on diffusers' classes without weights (`scripts/benchmarks/edit_cost.py`). Speed and
bandwidth are assumptions about one card; a `--dry-run` measures a batch as well. Text encoders are left out of the hours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flyp_saflex.editing.presets import EditorPreset
from flyp_saflex.editing.settings import resolve
from flyp_saflex.offline import EditorConfig
from flyp_saflex.tables import EDITORS, PRESETS

BYTES_PER_WEIGHT = {"no": 4.0, "bf16": 2.0, "fp16": 2.0}
QUANTISED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Per weight of a linear layer; `nf4` has one float32 scale per 64 weights."""
WHOLE = ("vae", "safety checker", "controlnet")
"""Parts that are not quantised."""
TERAFLOPS_PER_S = {"no": 37.0, "bf16": 75.0, "fp16": 75.0}
"""Assumed: 45 % of the peak of a card of 24 GB (RTX 4090)."""
MOVED_GB_PER_S = 20.0
"""Assumed: main memory to GPU, PCIe 4.0."""
AUTOENCODER_TERAFLOPS = 3.6
"""Encoding and decoding at 512 px by Stable Diffusion's autoencoder, counted; taken for all."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Calculated cost of an editor.

    Attributes:
        weights_gb: all weights, in main memory or on the GPU.
        gpu_gb: weights on the GPU at one time, without activations.
        seconds: time per edit.
    """

    weights_gb: float
    gpu_gb: float
    seconds: float


def preset_of(settings: EditorConfig) -> EditorPreset | None:
    """Return the preset whose figures hold for resolved settings; None: unknown."""
    name = settings.preset or settings.kind
    usual = settings.preset or settings.model == EDITORS[settings.kind].usual.get("model")
    return PRESETS[name] if name in PRESETS and usual else None


def cost_of(settings: EditorConfig, preset: EditorPreset) -> Cost:
    """Calculate the cost of resolved settings with a preset's figures."""
    sizes = part_sizes_gb(settings, preset)
    whole = sum(sizes.values())
    on_gpu = {"none": whole, "model": max(sizes.values()), "sequential": preset.layer * BYTES_PER_WEIGHT[settings.precision]}
    steps = max(1, round((settings.steps or 0) * (settings.strength or 1.0)))
    passes = preset.passes if settings.guidance is None or settings.guidance > 1 else 1
    area = ((settings.size_px or preset.size_px) / preset.size_px) ** 2
    work = steps * passes * preset.teraflops * area + AUTOENCODER_TERAFLOPS * (preset.size_px / 512) ** 2 * area
    calls = passes if settings.kind == "auto" else 1  # Stable Diffusion makes its passes as one batch
    moved = {"none": 0.0, "model": whole, "sequential": whole + (steps * calls - 1) * sizes[preset.denoiser]}[settings.offload]
    shared = settings.batch_size if preset.batched else 1
    seconds = work / TERAFLOPS_PER_S[settings.precision] + moved / MOVED_GB_PER_S / shared
    return Cost(whole, on_gpu[settings.offload], seconds)


def part_sizes_gb(settings: EditorConfig, preset: EditorPreset) -> dict[str, float]:
    """Return GB (1e9 bytes) of the weights of every part; a quantised one keeps its largest embedding and convolutions."""
    plain = BYTES_PER_WEIGHT[settings.precision]
    sizes = {name: billions * plain for name, billions in preset.parameters.items()}
    if settings.quantisation != "none":
        saved = plain - QUANTISED_BYTES[settings.quantisation]
        for name, billions in preset.parameters.items():
            if name == preset.denoiser:
                sizes[name] -= billions * preset.linear * saved
            elif name not in WHOLE:
                sizes[name] -= max(0.0, billions - preset.layer) * saved
    return sizes


def preset_note(settings: EditorConfig, num_edits: int = 0) -> str:
    """Return a line about memory, hours and licence of resolved settings; the empty string where they are unknown.

    Args:
        settings: the editor's.
        num_edits: edits to make; 0: hours are told per 1,000.
    """
    preset = preset_of(settings)
    if preset is None:
        return ""
    cost = cost_of(settings, preset)
    other = [
        f"{cost_of(less, preset).gpu_gb:.1f} GB with {name}"
        for name, less in _smaller(settings).items()
        if cost_of(less, preset).gpu_gb < 0.95 * cost.gpu_gb
    ]
    number, many = num_edits or 1000, f"these {num_edits:,}" if num_edits else "1,000"
    way = "a batch" if preset.batched else "references of one edit: edits are made one at a time"
    name = f"editor.preset = {settings.preset}" if settings.preset else f"editor.kind = {settings.kind}"
    memory = f"{cost.gpu_gb:.1f} GB of weights on the GPU" + (f" ({', '.join(other)})" if other else "")
    moved = f", {cost.weights_gb:.1f} GB in main memory" if settings.offload != "none" else ""
    return (
        f"{name}: {memory}{moved}, activations come on top; about {cost.seconds:.1f} s per edit, "
        f"{number * cost.seconds / 3600:.1f} h for {many} edits on a card of 24 GB; calculated from "
        f"{sum(preset.parameters.values()):.1f} billion parameters and {settings.steps} steps, not measured; a list of images is "
        f"{way}; licence of the weights as noted here, to be read on the model's card: {preset.licence}"
    )


def cost_table() -> list[str]:
    """Return the table of all presets with their own sizes and steps, in Markdown."""
    lines = [
        "| preset | steps | weights | `offload=model` | `nf4` | `nf4` and `model` | `sequential` | 1,000 edits | with `model` | "
        "`sequential` |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]

    for name, preset in PRESETS.items():
        plain = resolve(EditorConfig(preset=name, precision="bf16"))
        ways = {
            "none": plain,
            "model": replace(plain, offload="model"),
            "nf4": replace(plain, quantisation="nf4"),
            "both": replace(plain, quantisation="nf4", offload="model"),
            "sequential": replace(plain, offload="sequential"),
        }
        costs = {way: cost_of(settings, preset) for way, settings in ways.items()}
        memory = " | ".join(f"{cost.gpu_gb:.1f} GB" for cost in costs.values())
        hours = " | ".join(f"{costs[way].seconds / 3.6:.1f} h" for way in ("none", "model", "sequential"))
        lines.append(f"| `{name}` | {plain.steps} | {memory} | {hours} |")
    return lines


def _smaller(settings: EditorConfig) -> dict[str, EditorConfig]:
    """Return settings that take less memory, by the options that they change."""
    found = {}
    if settings.precision == "no":
        found["editor.precision=bf16"] = replace(settings, precision="bf16")
    if settings.offload == "none":
        found["editor.offload=model"] = replace(settings, offload="model")
    if settings.quantisation == "none" and settings.offload != "sequential":
        found["editor.quantisation=nf4"] = replace(settings, quantisation="nf4")
    if settings.offload == "none" and settings.quantisation == "none":
        found["the last two"] = replace(settings, quantisation="nf4", offload="model")
    return found
