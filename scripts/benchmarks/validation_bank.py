"""Measure how few validation images a refresh may renew: SAFLEX's gains against those of the whole validation split.

    python scripts/benchmarks/validation_bank.py
    python scripts/benchmarks/validation_bank.py --mini-clip FOLDER --pacs FOLDER

The two finetunes of `estimator_fidelity.py` with the default settings (head scope, a refresh every fourth step), whose gains
come from the whole split at every refresh. Beside them other ways of taking the validation gradient are followed: fewer
images in all, and a bank of features (`saflex.validation_renewed`) of which a refresh renews some. Before each step of the
last of every four, when gradients are oldest, the augmented rows' gains along each averaged gradient are compared with
those along the gradient of the whole split, taken at this very step.

images: run through the image tower per refresh. direction: cosine of the gradients. rows: mean cosine of the rows' gains.
sign: of the gain of the row's own label. Means over steps, in the first and in the second half of the finetune.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from estimator_fidelity import SHARED, pacs_setup, tiny_setup
from torch import Tensor
from torch.func import functional_call

from flyp_saflex.presets import SaflexSettings
from flyp_saflex.saflex import jvp
from flyp_saflex.saflex.closed_form import gains
from flyp_saflex.saflex.estimators import fidelity
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.step import StepLoss
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.training.batches import read_steps
from flyp_saflex.training.rows import RowBuilder, ValidationRows
from flyp_saflex.training.setup import Setup

CPU = torch.device("cpu")
ROWS = (256, 64, 32, 16)
"""Validation rows without a bank."""
RENEWED = (64, 32, 16, 8)
"""Rows of a bank of 256 that a refresh renews."""


@dataclass
class Way:
    """A way of taking the validation gradient, with its own running average."""

    name: str
    images: int
    saflex: Saflex
    step_loss: StepLoss
    validation: ValidationRows

    @classmethod
    def of(cls, setup: Setup, rows: int, renewed: int, average: float) -> Way:
        """Return it for a finetune."""
        settings = SaflexSettings(validation_rows=rows, validation_renewed=renewed, average=average)
        own = copy.copy(setup)
        own.saflex = saflex = Saflex(settings)
        step_loss = StepLoss(setup.task, setup.objective, saflex=saflex)
        name = f"{rows or 'all'} rows" + (f", {renewed} renewed" if renewed else "") + f", average {average:g}"
        validation = ValidationRows(own, None, CPU)
        return cls(name, renewed or min(rows or len(validation.samples), len(validation.samples)), saflex, step_loss, validation)

    def refresh(self, step: int) -> None:
        """Take its gradient before a step."""
        self.step_loss.refresh(self.validation.at(step, self.saflex.settings))


def gains_along(setup: Setup, direction: jvp.Parameters, rows: Rows, tokens_KL: Tensor) -> Tensor:
    """Return the augmented rows' gains_AK over the class captions."""

    def logits_fn(parameters: dict[str, Tensor]) -> Tensor:
        inputs = rows.inputs[rows.num_train :]
        return functional_call(setup.task.network, parameters, (inputs, tokens_KL), tie_weights=False).logits()

    values, tangent = jvp.directional_derivative(logits_fn, setup.task.network.parameters_in("head"), direction)
    return gains(values, tangent)


def cosine(one: jvp.Parameters, other: jvp.Parameters) -> float:
    """Return the cosine between two gradients."""
    product = sum(float((one[name].double() * other[name].double()).sum()) for name in one)
    return product / float(jvp.norm(one) * jvp.norm(other))


def finetune(setup: Setup, title: str, steps: int) -> None:
    """Finetune with the whole split's gradient, follow the other ways, print what they give."""
    setup.task.begin_phase(only_head=False)
    options = setup.config.train
    optimizer = torch.optim.AdamW(setup.task.parameter_groups(lr=options.lr, head_lr=options.head_lr, weight_decay=0.1))
    builder, every = RowBuilder(setup, CPU), SaflexSettings().refresh_every
    leading, fresh = Way.of(setup, 0, 0, 0.5), Way.of(setup, 0, 0, 0.0)
    ways = [Way.of(setup, rows, 0, 0.5) for rows in ROWS] + [Way.of(setup, 32, 0, 0.9)]
    ways += [Way.of(setup, 256, renewed, 0.5) for renewed in RENEWED]
    rows_in_split = len(leading.validation.samples)
    print(f"\n{title}: batch {options.batch_size}, lr {options.lr:g}, {steps} steps, {rows_in_split} validation rows")
    tokens_KL = setup.task.class_tokens()
    found: dict[str, list[tuple[int, float, float, float]]] = {way.name: [] for way in ways}
    for step, parts in enumerate(read_steps(setup, None, 0, steps)):
        rows = builder.build(parts[0], step, 0)
        setup.task.network.set_mode(training=True, freeze_batchnorm=True)
        if step % every == 0:
            for way in (leading, *ways):
                way.refresh(step)
        if step % every == every - 1:
            fresh.refresh(step)
            setup.task.network.eval()
            whole_AK = gains_along(setup, fresh.saflex.direction, rows, tokens_KL)
            for way in ways:
                own_AK = gains_along(setup, way.saflex.direction, rows, tokens_KL)
                agreement = fidelity(own_AK, whole_AK, rows.labels_N[rows.num_train :])
                along = cosine(way.saflex.direction, fresh.saflex.direction)
                found[way.name].append((step, along, agreement.row_cosine, agreement.sign_agreement))
            setup.task.network.set_mode(training=True, freeze_batchnorm=True)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min((step + 1) / max(options.warmup_steps, 1), 1)
        for surrogate in leading.step_loss(rows).surrogates:
            surrogate().backward()
        optimizer.step()
        optimizer.zero_grad()
    print("\n| validation gradient | images | direction | rows | sign | direction | rows | sign |\n|---" + "|--:" * 7 + "|")
    for way in ways:
        halves = [[row[1:] for row in found[way.name] if (row[0] >= steps // 2) == late] for late in (False, True)]
        cells = [f"{statistics.fmean(column):.3f}" for half in halves for column in zip(*half, strict=True)]
        print(f"| {way.name} | {way.images} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run both finetunes and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mini-clip", type=Path, default=SHARED / "models" / "mini_clip")
    parser.add_argument("--pacs", type=Path, default=SHARED / "data" / "pacs160")
    parser.add_argument("--batch-size", type=int, default=16, help="of the finetune on PACS")
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        finetune(tiny_setup(Path(folder), options.steps, num_images=2400), "tiny CLIP on the drawn world", options.steps)
    if options.mini_clip.is_dir() and options.pacs.is_dir():
        setup = pacs_setup(options.mini_clip, options.pacs, options.batch_size, options.steps)
        finetune(setup, "pretrained CLIP on PACS photographs", options.steps)
    else:
        print(f"\nskipped: the pretrained CLIP on PACS ({options.mini_clip} and {options.pacs} are not both there)")


if __name__ == "__main__":
    main()
