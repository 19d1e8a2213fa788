"""What a training step costs: ours against one written plainly with open_clip, and SAFLEX against both.

    python scripts/benchmarks/step.py                                   # three models, train rows only
    python scripts/benchmarks/step.py --model ViT-B-32 --saflex         # B training and B augmented rows
    python scripts/benchmarks/step.py --model ViT-B-32 --kept 0.25,0.5  # and deciding first, training on the kept rows only
    python scripts/benchmarks/step.py --model ViT-B-16 --batch 256 --device cuda --precision bf16 --saflex --profile

The plain step is what FLYP's published code does: every row's caption encoded with its whole context of 77 tokens,
open_clip's `ClipLoss`, AdamW as torch makes it by default (one operation after another on a CPU, `foreach` on a GPU), no
clipping of gradients. Ours is the trainer's: `StepLoss`, clipping, fused AdamW. Both start from one model with random
weights, which cost what pretrained ones do; captions are iWildCam's (182 classes, two templates), images are noise.

With `--saflex` all sides take 2 B rows. SAFLEX has the default settings: the exact derivative in head scope, a validation
gradient every few steps, whose time is counted in parts: from a bank of image features, some of them renewed, and from all
182 class captions. With `--kept` a rule that keeps the first rows stands in for the verdict, after all of SAFLEX's own work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import torch
from banked import usual_validation
from interleaved import hardware, ratio, rounds, stopwatch
from made_up_task import made_up_task
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flyp_saflex.clip.model import RANDOM, Clip, load_clip
from flyp_saflex.data.class_prompts import load_prompts
from flyp_saflex.runtime import keep_freed_memory
from flyp_saflex.saflex.objectives import CONTRASTIVE
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.skip_dropped import Selecting
from flyp_saflex.step.step import StepLoss
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.tasks.task import autocast

SMALL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 6},
}
CASES = {"small": (64, None), "ViT-B-32": (32, 0.60), "ViT-B-16": (8, 0.82)}
SAFLEX_TARGETS = {"ViT-B-32": 0.70, "ViT-B-16": 0.92}
OVERHEAD_TARGET = 0.10
LR, WEIGHT_DECAY, BETAS, EPS = 1e-6, 0.1, (0.9, 0.98), 1e-6


class Judged(Saflex):
    """SAFLEX whose verdict, once it has done all of its work, is replaced by one that keeps a given part."""

    part = 1.0

    def solve(self, gains_AK: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Decide, then keep the first rows."""
        weights_A, labels_AK = super().solve(gains_AK, *arguments, **options)
        return (torch.arange(len(weights_A), device=weights_A.device) < self.part * len(weights_A)).to(weights_A), labels_AK


def small_clip() -> Clip:
    """Return a model of a few million parameters, for a quick look."""
    settings = {"model_cfg": SMALL, "preprocess_cfg": {"size": SMALL["vision_cfg"]["image_size"]}}  # type: ignore[index]
    return Clip(open_clip.CLIP(**SMALL), lambda image: torch.empty(0), open_clip.tokenize, settings)


class Bench:
    """A model, rows, and the steps that are compared on them."""

    def __init__(self, name: str, batch: int, device: str, precision: str, *, saflex: bool, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.device, self.precision, self.batch = torch.device(device), precision, batch
        clip = small_clip() if name == "small" else load_clip(name, RANDOM)
        self.model: Any = clip.model.to(self.device)
        prompts = load_prompts("iwildcam")
        num_templates, num_classes = len(prompts.templates), len(prompts.class_names)
        self.task = made_up_task(clip, prompts.class_names, prompts.templates)
        self.tokens_ML = self.task.tokens_ML.to(self.device)
        self.side_px = self.model.visual.image_size[0]
        num_rows = 2 * batch if saflex else batch
        labels_N = torch.randint(num_classes, (num_rows,))
        self.rows = Rows(
            inputs=self._images(num_rows),
            captions_N=(labels_N * num_templates + torch.randint(num_templates, (num_rows,))).to(self.device),
            labels_N=labels_N.to(self.device),
            ids_N=torch.arange(num_rows, device=self.device),
            num_train=batch,
        )
        classes_K = torch.arange(num_classes, device=self.device) * num_templates
        self.network = self.task.network
        self.network.set_mode(training=True, freeze_batchnorm=True)
        self.saflex, self.judged = Saflex(), Judged()
        self.validation = usual_validation(self.saflex, self.network, self.rows.inputs[0], classes_K)
        step_loss = partial(StepLoss, self.task, CONTRASTIVE)
        self.plain, self.with_saflex = step_loss(), step_loss(saflex=self.saflex)
        self.deciding_first = step_loss(saflex=self.judged, selecting=Selecting("always"))
        groups = self.task.parameter_groups(lr=LR, head_lr=LR, weight_decay=WEIGHT_DECAY)
        self.fused = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
        groups = self.task.parameter_groups(lr=LR, head_lr=LR, weight_decay=WEIGHT_DECAY)
        self.default = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
        self.contrast = open_clip.loss.ClipLoss()

    def _images(self, count: int) -> Tensor:
        return torch.randn(count, 3, self.side_px, self.side_px, device=self.device)

    def reference_step(self) -> None:
        """The published step: every caption, whole contexts, logits computed twice."""
        with autocast(self.device, self.precision):
            images_ND = self.model.encode_image(self.rows.inputs, normalize=True)
            texts_ND = self.model.encode_text(self.tokens_ML[self.rows.captions_N], normalize=True)
            loss = self.contrast(images_ND, texts_ND, self.model.logit_scale.exp())
        loss.backward()
        self.default.step()
        self.default.zero_grad()

    def our_step(self) -> None:
        """The trainer's step without SAFLEX."""
        self._ours(self.plain)

    def saflex_step(self) -> None:
        """The trainer's step with SAFLEX, but for the validation gradient."""
        self._ours(self.with_saflex)

    def selecting_step(self, part: float) -> None:
        """The trainer's step with SAFLEX that decides first and keeps a part, but for the validation gradient."""
        self.judged.part = part
        self._ours(self.deciding_first)

    def refresh(self) -> None:
        """A validation gradient."""
        with autocast(self.device, self.precision):
            self.with_saflex.refresh(self.validation)

    def _ours(self, step_loss: StepLoss) -> None:
        with autocast(self.device, self.precision):
            result = step_loss(self.rows)
        float(result.loss.detach())  # the trainer looks whether it is finite
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.fused.step()
        self.fused.zero_grad(set_to_none=True)


def measure(name: str, options: argparse.Namespace) -> None:
    """Print the ratios of one model."""
    batch = options.batch or CASES.get(name, (32, None))[0]
    bench = Bench(name, batch, options.device, options.precision, saflex=options.saflex)
    num_rows = len(bench.rows.inputs)
    distinct = len(bench.task.same_M.to(bench.device)[bench.rows.captions_N].unique())
    print(f"\n{name}: {num_rows} rows with {distinct} distinct captions, precision {options.precision}", flush=True)
    sides: dict[str, Callable[[], object]] = {"reference": bench.reference_step, "ours": bench.our_step}
    kept = [float(part) for part in options.kept.split(",") if part]
    if options.saflex:
        bench.refresh()
        bench.judged.update(bench.saflex.direction)
        sides |= {"saflex": bench.saflex_step, "refresh": bench.refresh}
        sides |= {f"{part:.0%} kept": partial(bench.selecting_step, part) for part in kept}
    if options.without_reference:
        del sides["reference"]
    seconds = rounds(sides, options.repetitions, clock=stopwatch(options.device))
    target = CASES.get(name, (0, None))[1]
    goal = f" (target {target:.2f})" if target and batch == CASES[name][0] and not options.saflex else ""
    if not options.without_reference:
        print(f"plain step, ours / reference: {ratio(seconds['ours'], seconds['reference'])}{goal}")
    if options.saflex:
        settings, images = bench.saflex.settings, len(bench.validation.inputs)
        every, ours = settings.refresh_every, seconds["ours"]

        def whole(side: str) -> list[float]:
            return [step + part / every for step, part in zip(seconds[side], seconds["refresh"], strict=True)]

        print(f"SAFLEX / ours, the same rows: {ratio(whole('saflex'), ours)} (target {1 + OVERHEAD_TARGET:.2f})")
        print(f"    of this the derivative: {ratio(seconds['saflex'], ours)} - 1, and every {every} steps a validation gradient")
        print(f"    ({images} images, {settings.validation_rows} rows): {ratio(seconds['refresh'], ours)} / {every}")
        for part in kept:
            side, goal = f"{part:.0%} kept", " (target 1.00)" if part <= 0.5 else ""
            print(f"SAFLEX, decided first, {side} / ours, every row trusted: {ratio(whole(side), ours)}{goal}")
        if not options.without_reference:
            goal = f" (target {SAFLEX_TARGETS[name]:.2f})" if name in SAFLEX_TARGETS else ""
            print(f"SAFLEX / reference plain: {ratio(whole('saflex'), seconds['reference'])}{goal}")
    if bench.device.type == "cuda":
        print("peak memory: " + ", ".join(f"{side} {_peak_gb(run):.2f} GB" for side, run in sides.items()))
    if options.profile:
        _operations(sides)
        for side in [name for name in sides if name != "reference"]:
            print(f"\nwhere the time of `{side}` goes:")
            _profile(sides[side], bench.device)


def _peak_gb(run: Callable[[], object]) -> float:
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 1e9


def _operations(sides: dict[str, Callable[[], object]]) -> None:
    """Print the arithmetic of every side, which no implementation of the same formulas can go below."""
    counts = {}
    for side, run in sides.items():
        with FlopCounterMode(display=False) as counter:
            run()
        counts[side] = counter.get_total_flops()
    told = ", ".join(f"{side} {count / 1e9:.1f} ({count / counts['ours']:.3f} of ours)" for side, count in counts.items())
    print(f"floating-point operations of matrix products and attention, 1e9: {told}")


def _profile(run: Callable[[], object], device: torch.device) -> None:
    """Print where a step's time goes, by operation."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    run()
    with profile(activities=activities) as found:
        run()
        stopwatch(device)()  # waits for the device
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=60))


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="", help="small, or an open_clip model; default: small, ViT-B-32 and ViT-B-16")
    parser.add_argument("--batch", type=int, default=0, help="training rows; default: 64, 32 and 8 for these three, else 32")
    parser.add_argument("--saflex", action="store_true", help="as many augmented rows beside them, and a side with SAFLEX")
    parser.add_argument("--kept", default="", help="parts of the augmented rows that are kept, deciding first; implies --saflex")
    parser.add_argument("--without-reference", action="store_true", help="leave out the reference, for large batches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--keep-freed", action="store_true", help="keep freed memory, on all sides, as `flyp-saflex` does")
    parser.add_argument("--profile", action="store_true", help="print which operations a step of ours spends its time in")
    options = parser.parse_args()
    options.saflex = options.saflex or bool(options.kept)
    if options.keep_freed:
        keep_freed_memory()
    print(hardware(options.device))
    for name in [options.model] if options.model else CASES:
        measure(name, options)


if __name__ == "__main__":
    main()
