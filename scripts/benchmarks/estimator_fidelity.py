"""Measure how well cheap estimators of SAFLEX's gains agree with the exact ones, during a real finetune.

    python scripts/benchmarks/estimator_fidelity.py
    python scripts/benchmarks/estimator_fidelity.py --mini-clip FOLDER --pacs FOLDER

Two finetunes with SAFLEX, all parameters trained: the tiny CLIP on the drawn camera-trap world, and a pretrained CLIP on PACS
photographs (folders beside this checkout if they are there, else that part is skipped). At some steps the gains of the coming
batches' augmented rows are computed in every way, for the same validation rows, and compared with the exact gains of all
parameters. "Head scope" is compared too, although it is another method, not an estimate of the same thing.

error: root mean square difference / that of the exact gains. cosine: mean over rows. sign: of the gain of the row's own label.
argmax: of the best label. TV: total variation between the soft labels (tau 0.1, beta 0, gains in units of their spread).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from flyp_saflex import recipe
from flyp_saflex.assets import TINY_CLIP
from flyp_saflex.demo.world import write_world
from flyp_saflex.saflex import jvp, losses
from flyp_saflex.saflex.closed_form import gains, soft_labels, spread
from flyp_saflex.saflex.estimators import fidelity
from flyp_saflex.step.step import StepLoss
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tasks.label_space import Rows, assignment
from flyp_saflex.training.batches import read_steps
from flyp_saflex.training.rows import RowBuilder, ValidationRows
from flyp_saflex.training.setup import Setup, prepare

SHARED = Path(__file__).resolve().parents[3] / "shared"
STEPS = (0, 20, 60)
CPU = torch.device("cpu")
TARGETS = (1e-3, 3e-3, 1e-2)
"""Root mean square changes of the logits that a finite difference may aim at; 3e-3 is what training uses."""


def ways() -> Iterator[tuple[str, str, str, float]]:
    """Yield name, scope, estimator and aim of every way of taking the gains."""
    for target in TARGETS:
        yield f"one-sided, on the step's own logits, {target:g}", "all", "one-sided", target
    for target in TARGETS:
        yield f"central, {target:g}", "all", "central", target
    yield "head scope, exact", "head", "exact", 0.0


class Point:
    """A step of a finetune: gains of its augmented rows over the class captions."""

    def __init__(self, setup: Setup, rows: Rows, validation: Validation) -> None:
        self.network, self.rows, self.validation = setup.task.network, rows, validation
        self.tokens_KL, self.labels_A = setup.task.class_tokens(), rows.labels_N[rows.num_train :]
        with torch.no_grad():
            self.own_AK = self.network(rows.inputs, self.tokens_KL).logits()[rows.num_train :]

    def gains(self, scope: str, estimator: str, target: float, previous_rms: float | None) -> tuple[Tensor, float]:
        """Return gains_AK and the derivative's root mean square."""
        parameters = self.network.parameters_in(scope)  # type: ignore[arg-type]
        direction = jvp.gradient(
            lambda p: losses.margin(self._logits(p, self.validation.inputs), self.validation.labels_V), parameters
        )
        values, tangent = jvp.directional_derivative(
            lambda p: self._logits(p, self.rows.inputs[self.rows.num_train :]),
            parameters,
            direction,
            estimator=estimator,  # type: ignore[arg-type]
            logits=self.own_AK if estimator == "one-sided" else None,
            target_rms=target,
            previous_rms=previous_rms,
        )
        return gains(values, tangent), jvp.rms(tangent)

    def _logits(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return functional_call(self.network, parameters, (inputs, self.tokens_KL), tie_weights=False).logits()


def compare(found_AK: Tensor, exact_AK: Tensor, labels_A: Tensor) -> tuple[float, ...]:
    """Return error, cosine, sign, argmax and total variation."""
    upstream_AK = assignment(labels_A, torch.arange(exact_AK.shape[1]))
    everyone = torch.ones(len(labels_A), dtype=torch.bool)
    labels = [soft_labels(values / spread(values, everyone), upstream_AK, 0.1, 0.0) for values in (found_AK, exact_AK)]
    variation = float((labels[0] - labels[1]).abs().sum(dim=1).mean() / 2)
    return (*astuple(fidelity(found_AK, exact_AK, labels_A))[1:], variation)


def finetune(setup: Setup, title: str, batches: int) -> None:
    """Finetune, stop at `STEPS`, compare, print."""
    task, network, saflex = setup.task, setup.task.network, setup.saflex
    assert saflex is not None
    task.begin_phase(only_head=False)
    options = setup.config.train
    optimizer = torch.optim.AdamW(task.parameter_groups(lr=options.lr, head_lr=options.head_lr, weight_decay=0.1))
    step_loss = StepLoss(task, setup.objective, saflex=saflex)
    builder, validation = RowBuilder(setup, CPU), ValidationRows(setup, None, CPU)
    size = f"{options.batch_size} train + {setup.num_augmented} augmented rows, lr {options.lr:g}"
    print(f"\n{title}: {size}, {batches} batches per point, {len(validation.samples)} validation rows")
    print("\n| step | gains | error | cosine | sign | argmax | TV |\n|--:|---|--:|--:|--:|--:|--:|")
    found: dict[str, list[tuple[float, ...]]] = {}
    for step, parts in enumerate(read_steps(setup, None, 0, setup.config.train.steps)):
        rows = builder.build(parts[0], step, 0)
        network.set_mode(training=True, freeze_batchnorm=True)
        at = max(point for point in STEPS if point <= step)
        if step - at < batches:
            point = Point(setup, rows, validation.at(step, saflex.settings))
            network.eval()
            exact_AK, previous_rms = point.gains("all", "exact", 0.0, None)
            for name, scope, estimator, target in ways():
                other_AK, _ = point.gains(scope, estimator, target, previous_rms)
                found.setdefault(name, []).append(compare(other_AK, exact_AK, point.labels_A))
        if step - at == batches - 1:
            for name, numbers in found.items():
                mean = [statistics.fmean(column) for column in zip(*numbers, strict=True)]
                print(
                    f"| {at} | {name} | {mean[0]:.4f} | {mean[1]:.5f} | {mean[2]:.3f} | {mean[3]:.3f} | {mean[4]:.4f} |",
                    flush=True,
                )
            found = {}
        if step >= max(STEPS):
            continue
        if saflex.due(step):
            step_loss.refresh(validation.at(step, saflex.settings))
        network.set_mode(training=True, freeze_batchnorm=True)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min((step + 1) / max(options.warmup_steps, 1), 1)
        for surrogate in step_loss(rows).surrogates:
            surrogate().backward()
        optimizer.step()
        optimizer.zero_grad()


def tiny_setup(folder: Path, steps: int, num_images: int = 800) -> Setup:
    """Return the tiny CLIP on a drawn world, for so many steps."""
    root = write_world(folder, num_images=num_images, seed=0, size_px=64)
    options = [f"data.root={root}", f"data.prompts={root / 'prompts'}", f"model.name=local-dir:{TINY_CLIP}"]
    return prepare(recipe.load("demo", [*options, *_common(32, steps), "saflex.validation_split=id_val"]))


def pacs_setup(model: Path, pacs: Path, batch_size: int, steps: int) -> Setup:
    """Return a pretrained CLIP on PACS photographs, for so many steps."""
    options = [f"data.root={pacs}", f"model.name=local-dir:{model}", "train.freeze_image_blocks=0"]
    options += ["augment.per_train=1", "saflex.validation_rows=64"]
    return prepare(recipe.load("pacs", [*options, *_common(batch_size, steps)]))


def _common(batch_size: int, steps: int) -> list[str]:
    return [
        "augment.upstream=randaugment",
        "saflex.enabled=true",
        "saflex.preset=robust",
        "saflex.validation_renewed=0",
        f"train.steps={steps}",
        f"train.batch_size={batch_size}",
    ]


def main() -> None:
    """Run both finetunes and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mini-clip", type=Path, default=SHARED / "models" / "mini_clip")
    parser.add_argument("--pacs", type=Path, default=SHARED / "data" / "pacs160")
    parser.add_argument("--batches", type=int, default=4, help="batches compared at every point")
    parser.add_argument("--batch-size", type=int, default=16, help="of the finetune on PACS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = max(STEPS) + options.batches
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, float32")
    with tempfile.TemporaryDirectory() as folder:
        finetune(tiny_setup(Path(folder), steps), "tiny CLIP on the drawn world", options.batches)
    if options.mini_clip.is_dir() and options.pacs.is_dir():
        setup = pacs_setup(options.mini_clip, options.pacs, options.batch_size, steps)
        finetune(setup, "pretrained CLIP on PACS photographs", options.batches)
    else:
        print(f"\nskipped: the pretrained CLIP on PACS ({options.mini_clip} and {options.pacs} are not both there)")


if __name__ == "__main__":
    main()
