"""`flyp-saflex train`: finetune under accelerate, keep the best, lose nothing (floor 3).

A run is a sequence of phases (one, or for LP-FT a linear probe and then finetuning). The rows of every step are a pure
function of seed and step, so the state to keep is the model, the optimiser, SAFLEX's gradient and a few counters.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from flyp_saflex import recipe
from flyp_saflex.config import Config
from flyp_saflex.data.batches import Batch, BatchReader, derived_seed
from flyp_saflex.errors import ConfigError, DataError, RunError
from flyp_saflex.method.learner import parameter_groups
from flyp_saflex.method.step import Processes, StepLoss, StepResult
from flyp_saflex.rundir import RunDir
from flyp_saflex.stages import checkpoint
from flyp_saflex.stages.job import Job, prepare
from flyp_saflex.stages.rows import RowBuilder, ValidationRows
from flyp_saflex.stages.selection import Selection, save_model


@dataclass(frozen=True)
class Phase:
    """A part of a run with its own optimiser: steps `start` .. `start + steps - 1`."""

    name: str
    start: int
    steps: int
    only_head: bool

    def rate(self, step: int, warmup_steps: int, floor: float) -> float:
        """Return the learning rate of a step as a part of the peak: linear warm-up, then a cosine down to `floor`."""
        warmup = min(warmup_steps, self.steps // 10)
        done = step - self.start
        if done < warmup:
            return (done + 1) / warmup
        progress = (done - warmup) / max(self.steps - warmup, 1)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


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
    accelerator = _accelerator(config, path)
    job = prepare(config, limit=limit)
    phases = _phases(job)
    if accelerator.is_main_process:
        for note in job.notes:
            accelerator.print(f"note: {note}")
        accelerator.print(_plan_line(job, phases, accelerator))
    if dry_run:
        accelerator.print("dry run: all checks passed")
        return {"steps": 0, "seconds": 0.0, "best": None, "unreadable": 0}
    with RunDir(path, lock=accelerator.is_main_process) as run:
        state = _open_run(run, config, resume, limit, accelerator)
        trainer = _Trainer(job, run, accelerator, phases)
        try:
            return trainer.fit(state)
        finally:
            accelerator.end_training()


class _Trainer:
    def __init__(self, job: Job, run: RunDir, accelerator: Accelerator, phases: list[Phase]) -> None:
        self.job, self.run, self.accelerator, self.phases = job, run, accelerator, phases
        self.train_config = job.config.train
        job.learner.to(accelerator.device)
        job.clip.model.to(accelerator.device)
        self.store = job.store(accelerator.device)
        if self.store is not None:
            with accelerator.main_process_first():
                self.store.ensure([*job.dataset.train.samples, *(job.edits or ())])
        self.selection = Selection(job, run, self.store, accelerator.device)
        self.validation = ValidationRows(job, self.store, accelerator.device) if job.saflex else None
        self.rows = RowBuilder(job, accelerator.device)
        self.unreadable: dict[str, str] = {}
        self.stop_signal: int | None = None
        self.seconds = 0.0

    def fit(self, state: tuple[int, dict[str, Any]] | None) -> dict[str, Any]:
        """Run every phase from where the checkpoint stands, then save the chosen model."""
        step = 0
        if state is not None:
            step = state[0]
            self._restore(state[1])
        total = self.phases[-1].start + self.phases[-1].steps
        quiet = not self.accelerator.is_main_process or None  # None: no bar when the output is not a terminal
        with self._signals(), tqdm(total=total, initial=step, unit="step", disable=quiet, desc="training") as bar:
            for phase in self.phases:
                if step < phase.start + phase.steps:
                    optimizer_state = state[1]["optimizer"] if state is not None and state[0] > phase.start else None
                    step = self._run_phase(phase, step, optimizer_state, bar)
                    if self.selection.exhausted:
                        break
        self._finish(step)
        best = self.selection.best
        return {"steps": step, "seconds": self.seconds, "best": best and best["value"], "unreadable": len(self.unreadable)}

    def _run_phase(self, phase: Phase, step: int, optimizer_state: dict[str, Any] | None, bar: tqdm) -> int:
        job, options, accelerator = self.job, self.train_config, self.accelerator
        job.learner.freeze(
            text=options.freeze_text,
            image=options.freeze_image,
            token_embedding=options.freeze_token_embedding,
            only_head=phase.only_head,
        )
        if options.gradient_checkpointing:
            job.learner.tower.checkpointing = True
            job.clip.model.set_grad_checkpointing(True)  # the text tower; the image tower's blocks are run by ours
        optimizer = torch.optim.AdamW(
            parameter_groups(job.learner, lr=options.lr, head_lr=options.head_lr, weight_decay=options.weight_decay),
            betas=options.betas,
            eps=options.eps,
        )
        model, optimizer = accelerator.prepare(job.learner, optimizer)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
        step_loss = self._step_loss(model)
        for batches in self._batches(step, phase.start + phase.steps):
            started = time.monotonic()
            rate = phase.rate(step, options.warmup_steps, options.min_lr / options.lr)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            if job.saflex is not None and job.num_augmented and job.saflex.due(step):
                step_loss.refresh(self._need_validation().at(step, job.saflex.settings))
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

    def _optimise(
        self, step: int, batches: list[Batch], model: Any, optimizer: Any, step_loss: StepLoss
    ) -> tuple[list[StepResult], float]:
        """One optimiser step over the accumulated parts; a bad loss leaves the parameters as they were."""
        job, options, accelerator = self.job, self.train_config, self.accelerator
        torch.manual_seed(derived_seed(job.config.seed, "step", step))  # dropout, if the model has any
        job.learner.set_mode(training=True, freeze_batchnorm=options.freeze_batchnorm)
        template = derived_seed(job.config.seed, "template", step) % job.captions.num_templates
        columns_K = job.class_captions(template).to(accelerator.device)
        generator = torch.Generator().manual_seed(derived_seed(job.config.seed, "filter", step))
        results = []
        for part, batch in enumerate(batches):
            rows = self.rows.build(batch, step, part)
            last = part == len(batches) - 1
            with _synchronised(accelerator, model, last):
                with accelerator.autocast():
                    result = step_loss(rows, class_columns_K=columns_K, generator=generator)
                loss = float(result.loss.detach())
                if not loss <= options.max_loss:
                    self._stop_diverged(step, loss, batches, optimizer)
                accelerator.backward(result.loss / len(batches))
            result.loss = result.loss.detach()
            results.append(result)
        norm = float("nan")
        if options.clip_norm:
            norm = float(accelerator.clip_grad_norm_(job.learner.parameters(), options.clip_norm))
            if not math.isfinite(norm) and options.precision != "fp16":  # fp16's scaler skips such a step by itself
                self._stop_diverged(step, norm, batches, optimizer)
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
        options, last = self.train_config, step == phase.start + phase.steps
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
        if self.store is None and len(self.unreadable) > self.job.config.data.max_unreadable * len(self.job.dataset.train):
            self._save(step, optimizer)
            first = next(iter(self.unreadable.values()))
            raise DataError(
                f"{len(self.unreadable)} training images cannot be read, more than data.max_unreadable = "
                f"{self.job.config.data.max_unreadable} allows (state after step {step} is saved); first: {first}"
            )
        due = options.checkpoint_every and step % options.checkpoint_every == 0
        stopping = self._stop_requested()
        if due or last or stopping or self.selection.exhausted:
            self._save(step, optimizer)
        if stopping and not (last and phase is self.phases[-1]):
            self.accelerator.print(f"interrupted: state after step {step} is saved, go on with --resume")
            raise KeyboardInterrupt

    def _log(self, step: int, phase: Phase, loss: float, norm: float, rate: float, results: list[StepResult]) -> None:
        options = self.train_config
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
        if self.job.saflex is not None and self.job.num_augmented:
            summary = self.job.saflex.diagnostics
            row |= {"label_entropy": summary.label_entropy, "mean_gain": summary.mean_gain, "invalid_rows": summary.num_invalid}
        if self.accelerator.is_main_process:
            self.run.append_metrics(row)
            self.accelerator.log({key: value for key, value in row.items() if isinstance(value, (int, float))}, step=step)

    def _batches(self, first: int, end: int) -> Iterator[list[Batch]]:
        """Yield the parts of each step from `first` to before `end`, on this process."""
        job, options, accelerator = self.job, self.train_config, self.accelerator
        parts = options.accumulation

        def schedule(number: int) -> list[Any]:
            step, part = divmod(number, parts)
            return job.plan.shard(first + step, accelerator.process_index, accelerator.num_processes, part, parts)

        reader = BatchReader(
            schedule,
            (end - first) * parts,
            job.dataset.train.samples,
            job.edits,
            job.clip.preprocess,
            on_train=job.on_train,
            on_augmented=job.on_augmented,
            box_crop=job.config.data.box_crop,
            stored=self.store.read if self.store is not None else None,
        )
        workers = job.config.data.workers if self.store is None else 0
        loader = DataLoader(reader, batch_size=None, num_workers=workers, generator=torch.Generator(), persistent_workers=False)
        collected: list[Batch] = []
        for batch in loader:
            for path, reason in batch.unreadable:
                if path not in self.unreadable:
                    self.unreadable[path] = reason
                    accelerator.print(f"skipped: {reason}")
            collected.append(batch)
            if len(collected) == parts:
                yield collected
                collected = []

    def _step_loss(self, model: Any) -> StepLoss:
        job, accelerator = self.job, self.accelerator
        processes = Processes()
        if accelerator.num_processes > 1:
            processes = Processes(
                gather=accelerator.gather, gather_features=lambda features: gather_features(features, accelerator)
            )
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
            processes=processes,
        )

    def _need_validation(self) -> ValidationRows:
        assert self.validation is not None, "SAFLEX has validation rows"
        return self.validation

    def _save(self, step: int, optimizer: Any) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "learner": self.job.learner.state_dict(),
                "optimizer": optimizer.state_dict(),
                "saflex": self.job.saflex.state_dict() if self.job.saflex is not None else None,
                "selection": self.selection.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "unreadable": self.unreadable,
                "seconds": self.seconds,
            }
            checkpoint.save(self.run.checkpoints, step, state, keep=self.train_config.keep_checkpoints)

    def _restore(self, state: dict[str, Any]) -> None:
        self.job.learner.load_state_dict(state["learner"])
        if self.job.saflex is not None:
            self.job.saflex.load_state_dict(_to(state["saflex"], self.accelerator.device))
        self.selection.load_state_dict(state["selection"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.unreadable, self.seconds = state["unreadable"], state["seconds"]

    def _finish(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self.selection.install_best()
            save_model(self.job, self.run)
            self.run.write_environment(
                seconds=self.seconds, steps=step, unreadable=self.unreadable, processes=self.accelerator.num_processes
            )
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

    def _stop_diverged(self, step: int, value: float, batches: list[Batch], optimizer: Any) -> None:
        self._save(step, optimizer)
        names = [reader_id for batch in batches for reader_id in self.rows.names(batch)]
        if self.accelerator.is_main_process:
            self.run.append_metrics({"step": step, "diverged": True, "value": str(value), "batch": names})
        raise RunError(
            f"step {step}: the loss or its gradient is {value:.4g} (train.max_loss = {self.train_config.max_loss:g}); the state before "
            f"this step is in {self.run.checkpoints}, the batch's {len(names)} images in metrics.jsonl, first {names[0]}: "
            "lower train.lr, lengthen train.warmup_steps, or look at these images"
        )

    def _stop_requested(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        flag = torch.tensor([self.stop_signal is not None], dtype=torch.long, device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and a cluster's SIGTERM end the run after the step in flight; a second one ends it at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number

        before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, handle)
        except ValueError:  # not the main thread: the caller handles signals
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def gather_features(features_ND: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the features of all processes, with gradient to this one's rows.

    Every process computes the loss of the whole batch. Text features are encoded everywhere, so their gradient is whole on
    each process; image features reach it through their own process only. The local gradient is multiplied by the number
    of processes, so that averaging over processes gives the gradient of a single process for both.
    """
    count = accelerator.num_processes
    scaled_ND = features_ND + (count - 1) * (features_ND - features_ND.detach())
    parts = list(accelerator.gather(features_ND.detach()).chunk(count))
    parts[accelerator.process_index] = scaled_ND
    return torch.cat(parts)


@contextmanager
def _synchronised(accelerator: Accelerator, model: Any, last: bool) -> Iterator[None]:
    """Average gradients over processes in the last accumulated part only."""
    if last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def _accelerator(config: Config, path: Path) -> Accelerator:
    options = config.train
    tracker = None if options.tracker == "none" else options.tracker
    try:
        accelerator = Accelerator(
            mixed_precision=options.precision,
            log_with=tracker,
            project_dir=str(path),
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        )
        if tracker:
            accelerator.init_trackers("flyp-saflex", config={"recipe": config.recipe, "seed": config.seed})
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"train.precision = {options.precision}, train.tracker = {options.tracker}: {str(error).splitlines()[0]}; "
            "choose another, or install the tracker (pip install 'flyp-saflex[tracking]')"
        ) from error
    rows = (config.train.batch_size, round(config.augment.per_train * config.train.batch_size) if config.augment.upstream else 0)
    share = accelerator.num_processes * options.accumulation
    if any(count % share for count in rows):
        raise ConfigError(
            f"{rows[0]} training and {rows[1]} augmented rows per step cannot be shared by {accelerator.num_processes} processes x "
            f"{options.accumulation} parts: change train.batch_size, augment.per_train or train.accumulation"
        )
    return accelerator


def _phases(job: Job) -> list[Phase]:
    method, steps = job.config.train.method, job.total_steps
    if method == "lp-ft":
        probe = job.config.train.probe_steps
        return [Phase("linear-probe", 0, probe, True), Phase("finetune", probe, steps, False)]
    return [Phase("train", 0, steps, method == "linear-probe")]


def _open_run(
    run: RunDir, config: Config, resume: bool, limit: int | None, accelerator: Accelerator
) -> tuple[int, dict[str, Any]] | None:
    """Check the folder, write config.toml and env.json, return the checkpoint to go on from."""
    state = None
    existing = (run.path / "config.toml").is_file()
    if existing and not resume:
        raise RunError(f"run folder {run.path} already holds a run: add --resume to go on with it, or choose another --run-dir")
    if existing:
        changed = recipe.differences(run.read_config(), config)
        if changed:
            raise RunError(
                f"run folder {run.path} was started with another recipe ({'; '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}): "
                "undo the change, or choose another --run-dir"
            )
        if run.done:
            raise RunError(
                f"run {run.path} is finished: evaluate it with flyp-saflex evaluate {run.path}, or choose another --run-dir"
            )
        state = checkpoint.load_newest(run.checkpoints)
    if accelerator.is_main_process:
        if existing:
            run.rewind(state[0] if state else 0)
        else:
            run.write_config(config)
        run.write_environment(limit=limit)
        accelerator.print(f"resuming after step {state[0]}" if state else f"run folder {run.path}")
    accelerator.wait_for_everyone()
    return state


def _plan_line(job: Job, phases: list[Phase], accelerator: Accelerator) -> str:
    rows = f"{job.config.train.batch_size} training" + (f" + {job.num_augmented} augmented" if job.num_augmented else "")
    steps = " + ".join(f"{phase.steps}" for phase in phases)
    trained = sum(parameter.numel() for parameter in job.learner.parameters()) / 1e6
    return (
        f"{job.config.train.method} on {len(job.dataset.train)} images of {job.dataset.num_classes} classes: {steps} steps of {rows} rows, "
        f"SAFLEX {'on' if job.saflex else 'off'}, {trained:.1f} M parameters in all, {accelerator.device}, "
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: _to(item, device) for key, item in value.items()} if isinstance(value, dict) else value
