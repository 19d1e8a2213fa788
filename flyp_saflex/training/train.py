"""`flyp-saflex train`: finetune under accelerate, keep the best weights, lose nothing.

A run is a sequence of phases (one, or for LP-FT a linear probe and then finetuning). The rows of every step are a pure
function of seed and step, so the state to keep is the model, the optimiser, SAFLEX's gradient and a few counters.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from tqdm import tqdm

from flyp_saflex.config import Config
from flyp_saflex.data.registry import split_for
from flyp_saflex.errors import DataError, RunError
from flyp_saflex.runtime import ProgressLines, StopSignals, telling_lost_processes
from flyp_saflex.step.augmented_rows import StepResult
from flyp_saflex.step.gradcache import obstacle
from flyp_saflex.step.skip_dropped import Selecting
from flyp_saflex.step.step import StepLoss
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tables import METHODS
from flyp_saflex.training import checkpoint
from flyp_saflex.training.anchor import Anchor
from flyp_saflex.training.batch_statistics import share_statistics
from flyp_saflex.training.batches import Batch, UnreadableFiles, read_steps
from flyp_saflex.training.decisions import decide_about_edits
from flyp_saflex.training.distributed import device_name, make_accelerator, processes_of, statistics_note, synchronised
from flyp_saflex.training.model_selection import ModelSelection, save_model
from flyp_saflex.training.optimizers import optimizer_of
from flyp_saflex.training.rows import RowBuilder, ValidationRows
from flyp_saflex.training.sampling import derived_seed
from flyp_saflex.training.schedule import Phase, phases_of, plan_line
from flyp_saflex.training.setup import Setup, prepare
from flyp_saflex.training.state import RunState


@telling_lost_processes("go on with --resume, from the newest checkpoint")
def train(config: Config, path: Path, *, resume: bool = False, limit: int | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Finetune as the recipe says, into the run folder `path`.

    Args:
        config: the recipe.
        path: run folder; must be new, or hold this run when resuming.
        resume: go on from the newest checkpoint; bit for bit as if never stopped, on a CPU.
        limit: at most this many images of each split.
        dry_run: check everything, do nothing.

    Returns:
        `steps`, `seconds`, `best` (metric on the select split, or None), `unreadable` (number of files).

    Raises:
        UserError: bad input; a run that had to stop says where its state is.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    accelerator = make_accelerator(config, path)
    checkpoint.check_folder(path, config, resume=resume, limit=limit)
    accelerator.wait_for_everyone()  # before one of them writes what the others check
    setup = prepare(config, limit=limit)
    phases = phases_of(METHODS[config.train.method].phases, steps=setup.total_steps, probe_steps=config.train.probe_steps)
    statistics = statistics_note(setup.task.network, config, accelerator.num_processes)
    for note in (*setup.notes, *statistics, *checkpoint.check_data(path, setup.dataset)):
        accelerator.print(f"note: {note}")
    accelerator.print(plan_line(setup, phases, accelerator))
    if dry_run:
        accelerator.print("dry run: all checks passed")
        return {"steps": 0, "seconds": 0.0, "best": None, "unreadable": 0}
    with RunDir(path, lock=accelerator.is_main_process) as run:
        try:
            state = checkpoint.open_run(run, config, setup.dataset, accelerator, limit=limit)
            return _Trainer(setup, run, accelerator, phases, {"limit": limit}).fit(state)
        finally:
            for tracker in accelerator.trackers:  # not `end_training`, which parts the processes: they may train again
                tracker.finish()


class _Trainer:
    """The loop over phases and steps."""

    def __init__(
        self, setup: Setup, run: RunDir, accelerator: Accelerator, phases: list[Phase], environment: dict[str, Any]
    ) -> None:
        self.setup, self.run, self.accelerator, self.phases, self.environment = setup, run, accelerator, phases, environment
        self.task, self.saflex, self.options = setup.task, setup.saflex, setup.config.train
        self.network = self.task.network
        self.network.to(accelerator.device)
        processes = processes_of(accelerator)
        share_statistics(self.network, processes, freeze_batchnorm=self.options.freeze_batchnorm)
        self.teacher = setup.terms.teacher
        if self.teacher is not None:
            self.teacher.network.to(accelerator.device)
        self.anchor = Anchor(self.network, self.options.l2_sp) if self.options.l2_sp else None
        self.cache = self.task.feature_cache(setup.config, setup.loader(progress=True), accelerator.device)
        if self.cache is not None:
            with accelerator.main_process_first():
                self.cache.ensure([*setup.dataset.train.samples, *(setup.edits or ())])
        self.selection = ModelSelection(
            self.task,
            split_for(setup.dataset, self.options.select_split, "select") if self.options.select_split else None,
            self.cache or setup.loader(),
            lowered=self.cache is not None,
            metric=self.options.select_metric,
            patience=self.options.patience,
            folder=run.checkpoints,
            state=PartialState(),
        )
        self.validation = ValidationRows(setup, self.cache, accelerator.device) if self.saflex else None
        if self.saflex is not None:
            self.saflex.watch.tell = accelerator.print
            self.saflex.mean_of = lambda value: processes.gather(value[None]).mean()
        self.decisions = decide_about_edits(setup, accelerator, run.path)
        if self.decisions is not None and self.decisions.seconds:
            self.environment["evidence_seconds"] = self.decisions.seconds
        self.rows = RowBuilder(setup, accelerator.device, self.decisions, processes)
        apart = not obstacle(self.network, freeze_batchnorm=self.options.freeze_batchnorm)
        self.selecting = Selecting(setup.config.saflex.select if apart else "never")
        self.signals = StopSignals()
        self.unreadable = UnreadableFiles(accelerator)
        parts = (self.task, self.saflex, self.selecting, self.selection, self.unreadable)
        self.state = RunState(*parts, run, accelerator, keep=self.options.keep_checkpoints, teacher=self.teacher)
        self.seconds = 0.0

    def fit(self, state: tuple[int, dict[str, Any]] | None) -> dict[str, Any]:
        """Run every phase from where the checkpoint stands, then save the chosen model."""
        step = 0
        if state is not None:
            step = state[0]
            self.seconds = self.state.restore(state[1])
        total, is_main = self.phases[-1].end, self.accelerator.is_main_process
        self.lines = ProgressLines("training", total=total, done=step, unit="steps", shown=is_main)
        quiet = not is_main or None  # None: no bar when the output is not a terminal
        with self.signals, tqdm(total=total, initial=step, unit="step", disable=quiet, desc="training") as bar:
            for phase in self.phases:
                if step < phase.end and not self.selection.exhausted:
                    optimizer_state = state[1]["optimizer"] if state is not None and state[0] > phase.start else None
                    step = self._run_phase(phase, step, optimizer_state, bar)
            self._finish(step)
        best = self.selection.best
        return {
            "steps": step,
            "seconds": self.seconds,
            "best": best and best["value"],
            "unreadable": len(self.unreadable.reasons),
        }

    def _run_phase(self, phase: Phase, step: int, optimizer_state: dict[str, Any] | None, bar: tqdm) -> int:
        setup, options, accelerator = self.setup, self.options, self.accelerator
        self.task.begin_phase(only_head=phase.only_head)
        if step == phase.start:  # the gradient of the phase before has other parameters
            self.selecting.reset()
            if self.saflex is not None:
                self.saflex.reset()
                self.state.refreshed = -1
        groups = self.task.parameter_groups(
            lr=options.lr,
            head_lr=options.head_lr,
            weight_decay=options.weight_decay,
            decays_all=options.decayed == "all",
        )
        model, optimizer = accelerator.prepare(self.network, optimizer_of(groups, options))
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
        step_loss = self._step_loss(model)
        for batches in read_steps(setup, self.cache, step, phase.end, accelerator.process_index, accelerator.num_processes):
            started = time.monotonic()
            self.unreadable.note(batches)
            rate = phase.rate(step, options.warmup_steps, options.min_lr / options.lr, options.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            self._refresh(step, step_loss)
            results, norm = self._optimise(step, batches, model, optimizer, step_loss)
            step += 1
            self.seconds += time.monotonic() - started
            bar.update()
            self._after(step, phase, results, norm, rate, optimizer, bar)
            if self.selection.exhausted:
                accelerator.print(f"stopped early after step {step}: {self.selection.waited} evaluations without a better one")
                break
        accelerator.free_memory(optimizer)
        return step

    def _step_loss(self, model: Any) -> StepLoss:
        config = self.setup.config
        return StepLoss(
            self.task,
            self.setup.objective,
            model,
            saflex=self.saflex,
            upstream_filter=config.augment.filter,
            keep_fraction=config.augment.keep_fraction,
            processes=processes_of(self.accelerator),
            rows_at_once=config.train.rows_at_once,
            selecting=self.selecting,
            terms=self.setup.terms,
        )

    def _refresh(self, step: int, step_loss: StepLoss) -> None:
        """Take SAFLEX's validation gradient if it is due; once per step, also where a run that diverged is resumed."""
        if self.saflex is None or self.validation is None or not self.setup.num_augmented or not self.saflex.settings.needs_gains:
            return
        if self.saflex.due(step) and self.state.refreshed != step:
            step_loss.refresh(self.validation.at(step, self.saflex.settings))
            self.state.refreshed = step

    def _optimise(
        self, step: int, batches: list[Batch], model: Any, optimizer: Any, step_loss: StepLoss
    ) -> tuple[list[StepResult], float]:
        """Take one optimiser step over the accumulated parts; a bad loss leaves parameters and buffers as they were."""
        seed, options, accelerator = self.setup.config.seed, self.options, self.accelerator
        torch.manual_seed(derived_seed(seed, "step", step))  # dropout, if the model has any
        self.network.set_mode(training=True, freeze_batchnorm=options.freeze_batchnorm)
        self.state.remember(buffers=not options.freeze_batchnorm)
        generator = torch.Generator().manual_seed(derived_seed(seed, "filter", step))
        results = []
        for part, batch in enumerate(batches):
            rows = self.rows.build(batch, step, part)
            with synchronised(accelerator, model, last=part == len(batches) - 1):
                with accelerator.autocast():
                    result = step_loss(rows, seed=derived_seed(seed, "template", step), generator=generator)
                loss = float(result.loss.detach())
                if not loss <= options.max_loss:
                    self._stop_diverged(step, "loss", loss, batches, optimizer)
                for number, surrogate in enumerate(result.surrogates, start=1):
                    with synchronised(accelerator, model, last=number == len(result.surrogates)):
                        with accelerator.autocast():
                            value = surrogate()
                            if self.anchor is not None and number == len(result.surrogates):
                                value = value + self.anchor.penalty()
                        accelerator.backward(value / len(batches))
            result.loss, result.surrogates = result.loss.detach(), []
            results.append(result)
        norm = float("nan")
        if options.clip_norm:
            norm = float(accelerator.clip_grad_norm_(self.network.parameters(), options.clip_norm))
            if not math.isfinite(norm) and options.precision != "fp16":  # fp16's scaler skips such a step by itself
                self._stop_diverged(step, "gradient norm", norm, batches, optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.task.after_step()
        if self.teacher is not None:
            self.teacher.follow(self.network)
        return results, norm

    def _after(
        self, step: int, phase: Phase, results: list[StepResult], norm: float, rate: float, optimizer: Any, bar: tqdm
    ) -> None:
        """Log, evaluate, save and obey signals after `step` steps."""
        options, last = self.options, step == phase.end
        loss = sum(float(result.loss) for result in results) / len(results)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.lines.update(step, f"loss {loss:.3f}")
        if step % options.log_every == 0 or last:
            self._log(step, phase, loss, norm, rate, results)
        if options.log_augmented and self.accelerator.is_main_process:
            self.run.append_rows(self.rows.describe(step, results))
        if (options.evaluate_every and step % options.evaluate_every == 0) or last:
            final = phase is self.phases[-1]
            row = self.selection.evaluate(step, candidate=final, keeper=self.accelerator.is_main_process)
            if row and self.accelerator.is_main_process:
                self.run.append_metrics(row)
                self.lines.say(self.selection.line(row))
        stopping = self.unreadable.agree(self.signals.requested)
        too_many = len(self.unreadable.reasons) > self.setup.config.data.max_unreadable * len(self.setup.dataset.train)
        due = options.checkpoint_every and step % options.checkpoint_every == 0
        if due or last or stopping or too_many or self.selection.exhausted:
            self.state.save(step, optimizer, seconds=self.seconds)
        if too_many:
            self._stop_unreadable(step)
        if stopping and not (last and phase is self.phases[-1]):
            self.accelerator.print(f"interrupted: state after step {step} is saved, go on with --resume")
            raise KeyboardInterrupt

    def _log(self, step: int, phase: Phase, loss: float, norm: float, rate: float, results: list[StepResult]) -> None:
        options = self.options
        row: dict[str, Any] = {
            "step": step,
            "phase": phase.name,
            "loss": loss,
            "lr": (options.head_lr if phase.only_head else options.lr) * rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            **self.task.log_row(),
            "seconds": self.seconds,
        }
        if self.anchor is not None:
            row["l2_sp"] = float(self.anchor.penalty().detach())
        if self.setup.num_augmented:
            weights_A = torch.cat([result.weights_A for result in results])
            row["kept_fraction"] = float((weights_A > 0).float().mean())
            row["selected"] = any(result.selected for result in results)
        if self.saflex is not None and self.setup.num_augmented:
            row |= self.saflex.log_row()
        if self.accelerator.is_main_process:
            self.run.append_metrics(row)
            self.accelerator.log({key: value for key, value in row.items() if isinstance(value, (int, float))}, step=step)

    def _finish(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self.selection.install_best()
            save_model(self.task, self.run)
            self._write_environment(step)
            self.run.mark_done()
            best = self.selection.best
            chosen = (
                f"best {best['metric']} on {best['split']} {best['value']:.4f} after step {best['step']}"
                if best
                else "last weights kept"
            )
            self.accelerator.print(f"done: {step} steps in {self.seconds:.0f} s, {chosen}; model in {self.run.model}")
            if self.unreadable.reasons:
                self.accelerator.print(
                    f"{len(self.unreadable.reasons)} images could not be read and were replaced: see {self.run.path / 'env.json'}"
                )
        self.accelerator.wait_for_everyone()

    def _write_environment(self, step: int) -> None:
        self.run.write_environment(
            seconds=self.seconds,
            steps=step,
            unreadable=self.unreadable.reasons,
            processes=self.accelerator.num_processes,
            device=device_name(self.accelerator.device),
            **self.environment,
        )

    def _stop_diverged(self, step: int, what: str, value: float, batches: list[Batch], optimizer: Any) -> None:
        self.state.roll_back()
        self.state.save(step, optimizer, seconds=self.seconds)
        names = [identity for batch in batches for identity in self.rows.names(batch)]
        if self.accelerator.is_main_process:
            self.run.append_metrics({"step": step + 1, "diverged": True, "value": str(value), "batch": names})
        raise RunError(
            f"step {step + 1}: the {what} is {value:.4g} (train.max_loss = {self.options.max_loss:g}); the state before this "
            f"step is in {self.run.checkpoints}, the batch's {len(names)} images are in metrics.jsonl, first {names[0]}: look at "
            "these images, or start again with a lower train.lr or longer train.warmup_steps"
        )

    def _stop_unreadable(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self._write_environment(step)
        reasons = self.unreadable.reasons
        raise DataError(
            f"{len(reasons)} training images cannot be read, more than data.max_unreadable = "
            f"{self.setup.config.data.max_unreadable} allows; the state after step {step} is saved: mend them or raise "
            f"data.max_unreadable and go on with --resume; first: {next(iter(reasons.values()))}"
        )
