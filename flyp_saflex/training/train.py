"""`flyp-saflex train`: finetune under accelerate, keep the best, lose nothing (floor 3).

A run is a sequence of phases (one, or for LP-FT a linear probe and then finetuning). The rows of every step are a pure
function of seed and step, so the state to keep is the model, the optimiser, SAFLEX's gradient and a few counters.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from flyp_saflex.config import Config
from flyp_saflex.errors import DataError, RunError
from flyp_saflex.images.decode import read_image
from flyp_saflex.step.gradcache import Selecting, obstacle
from flyp_saflex.step.step import StepLoss, StepResult
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tasks.clip_task import parameter_groups
from flyp_saflex.training import checkpoint
from flyp_saflex.training.distributed import processes_of, synchronised
from flyp_saflex.training.model_selection import Selection, save_model
from flyp_saflex.training.rows import RowBuilder, ValidationRows, read_steps
from flyp_saflex.training.sampling import Batch, derived_seed
from flyp_saflex.training.schedule import Phase, check_folder, device_name, make_accelerator, open_run, phases_of, plan_line
from flyp_saflex.training.setup import Job, prepare
from flyp_saflex.training.signals import StopSignals


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
    check_folder(path, config, resume=resume, limit=limit)
    accelerator.wait_for_everyone()  # before one of them writes what the others check
    job = prepare(config, limit=limit)
    phases = phases_of(job)
    for note in job.notes:
        accelerator.print(f"note: {note}")
    accelerator.print(plan_line(job, phases, accelerator))
    if dry_run:
        accelerator.print("dry run: all checks passed")
        return {"steps": 0, "seconds": 0.0, "best": None, "unreadable": 0}
    with RunDir(path, lock=accelerator.is_main_process) as run:
        try:
            state = open_run(run, config, accelerator, limit=limit)
            return _Trainer(job, run, accelerator, phases, {"limit": limit}).fit(state)
        finally:
            for tracker in accelerator.trackers:  # not `end_training`, which parts the processes: they may train again
                tracker.finish()


class _Trainer:
    def __init__(self, job: Job, run: RunDir, accelerator: Accelerator, phases: list[Phase], environment: dict[str, Any]) -> None:
        self.job, self.run, self.accelerator, self.phases, self.environment = job, run, accelerator, phases, environment
        self.options = job.config.train
        job.learner.to(accelerator.device)
        self.store = job.store(accelerator.device)
        if self.store is not None:
            with accelerator.main_process_first():
                self.store.ensure([*job.dataset.train.samples, *(job.edits or ())])
        self.selection = Selection(job, run, self.store, accelerator.device)
        self.validation = ValidationRows(job, self.store, accelerator.device) if job.saflex else None
        if job.saflex is not None:
            job.saflex.watch.tell = accelerator.print
        self.rows = RowBuilder(job, accelerator.device)
        apart = not obstacle(job.learner, freeze_batchnorm=self.options.freeze_batchnorm)
        self.selecting = Selecting(job.config.saflex.select if apart else "never")
        self.signals = StopSignals()
        self.unreadable: dict[str, str] = {}
        self.new_unreadable: dict[str, str] = {}
        self.decided_before: dict[str, Any] = {}
        self.buffers_before: dict[str, Tensor] = {}
        self.refreshed = -1
        self.seconds = 0.0

    def fit(self, state: tuple[int, dict[str, Any]] | None) -> dict[str, Any]:
        """Run every phase from where the checkpoint stands, then save the chosen model."""
        step = 0
        if state is not None:
            step = state[0]
            self._restore(state[1])
        quiet = not self.accelerator.is_main_process or None  # None: no bar when the output is not a terminal
        with self.signals, tqdm(total=self.phases[-1].end, initial=step, unit="step", disable=quiet, desc="training") as bar:
            for phase in self.phases:
                if step < phase.end and not self.selection.exhausted:
                    optimizer_state = state[1]["optimizer"] if state is not None and state[0] > phase.start else None
                    step = self._run_phase(phase, step, optimizer_state, bar)
            self._finish(step)
        best = self.selection.best
        return {"steps": step, "seconds": self.seconds, "best": best and best["value"], "unreadable": len(self.unreadable)}

    def _run_phase(self, phase: Phase, step: int, optimizer_state: dict[str, Any] | None, bar: tqdm) -> int:
        job, options, accelerator = self.job, self.options, self.accelerator
        job.learner.freeze(
            text=options.freeze_text,
            image=options.freeze_image,
            token_embedding=options.freeze_token_embedding,
            only_head=phase.only_head,
        )
        if options.gradient_checkpointing:
            job.learner.tower.checkpointing = True
            job.clip.model.set_grad_checkpointing(True)  # the text tower; the image tower's blocks are run by ours
        if job.saflex is not None and step == phase.start:  # the gradient of the phase before has other parameters
            job.saflex.reset()
            self.refreshed = -1
        if step == phase.start:
            self.selecting.reset()
        optimizer = torch.optim.AdamW(
            parameter_groups(job.learner, lr=options.lr, head_lr=options.head_lr, weight_decay=options.weight_decay),
            betas=options.betas,
            eps=options.eps,
            fused=True,  # on a CPU nine times as fast as one operation after another
        )
        model, optimizer = accelerator.prepare(job.learner, optimizer)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
        step_loss = self._step_loss(model)
        for batches in read_steps(job, self.store, step, phase.end, accelerator.process_index, accelerator.num_processes):
            started = time.monotonic()
            self._note_unreadable(batches)
            rate = phase.rate(step, options.warmup_steps, options.min_lr / options.lr)
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

    def _refresh(self, step: int, step_loss: StepLoss) -> None:
        """Take SAFLEX's validation gradient if it is due; once per step, also where a run that diverged is resumed."""
        saflex = self.job.saflex
        if saflex is None or self.validation is None or not self.job.num_augmented:
            return
        if saflex.due(step) and self.refreshed != step:
            step_loss.refresh(self.validation.at(step, saflex.settings))
            self.refreshed = step

    def _optimise(
        self, step: int, batches: list[Batch], model: Any, optimizer: Any, step_loss: StepLoss
    ) -> tuple[list[StepResult], float]:
        """One optimiser step over the accumulated parts; a bad loss leaves parameters and buffers as they were."""
        job, options, accelerator = self.job, self.options, self.accelerator
        torch.manual_seed(derived_seed(job.config.seed, "step", step))  # dropout, if the model has any
        job.learner.set_mode(training=True, freeze_batchnorm=options.freeze_batchnorm)
        self.decided_before = self._decided()
        self.buffers_before = {} if options.freeze_batchnorm else {k: value.clone() for k, value in job.learner.named_buffers()}
        template = derived_seed(job.config.seed, "template", step) % job.captions.num_templates
        columns_K = job.class_captions(template).to(accelerator.device)
        generator = torch.Generator().manual_seed(derived_seed(job.config.seed, "filter", step))
        results = []
        for part, batch in enumerate(batches):
            rows = self.rows.build(batch, step, part)
            with synchronised(accelerator, model, last=part == len(batches) - 1):
                with accelerator.autocast():
                    result = step_loss(rows, class_columns_K=columns_K, generator=generator)
                loss = float(result.loss.detach())
                if not loss <= options.max_loss:
                    self._stop_diverged(step, "loss", loss, batches, optimizer)
                for number, surrogate in enumerate(result.surrogates, start=1):
                    with synchronised(accelerator, model, last=number == len(result.surrogates)):
                        with accelerator.autocast():
                            value = surrogate()
                        accelerator.backward(value / len(batches))
            result.loss, result.surrogates = result.loss.detach(), []
            results.append(result)
        norm = float("nan")
        if options.clip_norm:
            norm = float(accelerator.clip_grad_norm_(job.learner.parameters(), options.clip_norm))
            if not math.isfinite(norm) and options.precision != "fp16":  # fp16's scaler skips such a step by itself
                self._stop_diverged(step, "gradient norm", norm, batches, optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if options.method in ("flyp", "ce-text"):
            with torch.no_grad():
                job.clip.model.logit_scale.clamp_(max=math.log(100))  # as CLIP was trained
        return results, norm

    def _after(
        self, step: int, phase: Phase, results: list[StepResult], norm: float, rate: float, optimizer: Any, bar: tqdm
    ) -> None:
        """Log, evaluate, save and obey signals after `step` steps."""
        options, last = self.options, step == phase.end
        loss = sum(float(result.loss) for result in results) / len(results)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if step % options.log_every == 0 or last:
            self._log(step, phase, loss, norm, rate, results)
        if options.log_augmented and self.accelerator.is_main_process:
            self.run.append_rows(self.rows.describe(step, results))
        if (options.evaluate_every and step % options.evaluate_every == 0) or last:
            final = phase is self.phases[-1]
            row = self.selection.evaluate(step, candidate=final, keeper=self.accelerator.is_main_process)
            if row and self.accelerator.is_main_process:
                self.run.append_metrics(row)
        stopping = self._agree()
        too_many = len(self.unreadable) > self.job.config.data.max_unreadable * len(self.job.dataset.train)
        due = options.checkpoint_every and step % options.checkpoint_every == 0
        if due or last or stopping or too_many or self.selection.exhausted:
            self._save(step, optimizer)
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
            "logit_scale": float(self.job.clip.model.logit_scale.detach().exp()),
            "seconds": self.seconds,
        }
        if self.job.num_augmented:
            weights_A = torch.cat([result.weights_A for result in results])
            row["kept_fraction"] = float((weights_A > 0).float().mean())
            row["selected"] = any(result.selected for result in results)
        if self.job.saflex is not None and self.job.num_augmented:
            row |= self.job.saflex.log_row()
        if self.accelerator.is_main_process:
            self.run.append_metrics(row)
            self.accelerator.log({key: value for key, value in row.items() if isinstance(value, (int, float))}, step=step)

    def _step_loss(self, model: Any) -> StepLoss:
        job, accelerator = self.job, self.accelerator
        return StepLoss(
            job.learner,
            model,
            caption_tokens_ML=job.tokens_ML.to(accelerator.device),
            class_captions_K=job.class_captions().to(accelerator.device),
            contrastive=job.config.train.method == "flyp",
            proxies=job.config.train.proxies,
            saflex=job.saflex,
            upstream_filter=job.config.augment.filter,
            keep_fraction=job.config.augment.keep_fraction,
            processes=processes_of(accelerator),
            rows_at_once=job.config.train.rows_at_once,
            selecting=self.selecting,
        )

    def _save(self, step: int, optimizer: Any) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "learner": self.job.learner.state_dict(),
                "optimizer": optimizer.state_dict(),
                **self._decided(),
                "refreshed": self.refreshed,
                "selection": self.selection.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "unreadable": self.unreadable,
                "seconds": self.seconds,
            }
            checkpoint.save(self.run.checkpoints, step, state, keep=self.options.keep_checkpoints)

    def _decided(self) -> dict[str, Any]:
        """Return what deciding about augmented rows goes on from."""
        saflex = self.job.saflex.state_dict() if self.job.saflex is not None else None
        return {"saflex": saflex, "selecting": self.selecting.state_dict()}

    def _restore_decided(self, state: dict[str, Any]) -> None:
        if self.job.saflex is not None:
            self.job.saflex.load_state_dict(_to(state["saflex"], self.accelerator.device))
        self.selecting.load_state_dict(state["selecting"])

    def _restore(self, state: dict[str, Any]) -> None:
        self.job.learner.load_state_dict(state["learner"])
        self._restore_decided(state)
        self.refreshed = state["refreshed"]
        self.selection.load_state_dict(state["selection"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.unreadable = {path: reason for path, reason in state["unreadable"].items() if not _readable(path)}
        self.seconds = state["seconds"]

    def _finish(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self.selection.install_best()
            save_model(self.job, self.run)
            self._write_environment(step)
            self.run.mark_done()
            best = self.selection.best
            chosen = (
                f"best {best['metric']} on {best['split']} {best['value']:.4f} after step {best['step']}"
                if best
                else "last weights kept"
            )
            self.accelerator.print(f"done: {step} steps in {self.seconds:.0f} s, {chosen}; model in {self.run.model}")
            if self.unreadable:
                self.accelerator.print(
                    f"{len(self.unreadable)} images could not be read and were replaced: see {self.run.path / 'env.json'}"
                )
        self.accelerator.wait_for_everyone()

    def _write_environment(self, step: int) -> None:
        self.run.write_environment(
            seconds=self.seconds,
            steps=step,
            unreadable=self.unreadable,
            processes=self.accelerator.num_processes,
            device=device_name(self.accelerator.device),
            **self.environment,
        )

    def _stop_diverged(self, step: int, what: str, value: float, batches: list[Batch], optimizer: Any) -> None:
        for name, before in self.buffers_before.items():
            self.job.learner.get_buffer(name).copy_(before)
        self._restore_decided(self.decided_before)
        self._save(step, optimizer)
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
        first = next(iter(self.unreadable.values()))
        raise DataError(
            f"{len(self.unreadable)} training images cannot be read, more than data.max_unreadable = "
            f"{self.job.config.data.max_unreadable} allows; the state after step {step} is saved: mend them or raise "
            f"data.max_unreadable and go on with --resume; first: {first}"
        )

    def _note_unreadable(self, batches: list[Batch]) -> None:
        for batch in batches:
            for path, reason in batch.unreadable:
                if path not in self.unreadable and path not in self.new_unreadable:
                    self.new_unreadable[path] = reason
                    tqdm.write(f"skipped: {reason}")

    def _agree(self) -> bool:
        """Share unreadable files among processes; return whether one of them was told to stop."""
        stopping = self.signals.requested
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([[stopping, bool(self.new_unreadable)]], dtype=torch.long, device=self.accelerator.device)
            stopping, any_new = (bool(flag) for flag in self.accelerator.gather(flags).any(dim=0))
            for news in gather_object([self.new_unreadable]) if any_new else ():
                self.unreadable |= news
        self.unreadable |= self.new_unreadable
        self.new_unreadable = {}
        return stopping


def _readable(path: str) -> bool:
    try:
        read_image(Path(path))
    except DataError:
        return False
    return True


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: _to(item, device) for key, item in value.items()} if isinstance(value, dict) else value
