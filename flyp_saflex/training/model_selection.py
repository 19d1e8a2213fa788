"""Which weights a run keeps: the best on a select split, or the last (floor 3, shared by stages)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flyp_saflex.clip.model import save_clip
from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.data.registry import split_for
from flyp_saflex.errors import RunError
from flyp_saflex.evaluation import metrics
from flyp_saflex.evaluation.predict import Head, Predictor, clip_predictor, predict
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tasks.feature_cache import ActivationStore
from flyp_saflex.training.setup import Job

METRICS = ("accuracy", "macro_f1", "worst_group_accuracy", "ece")


class Selection:
    """Evaluates on `train.select_split` and keeps the best weights in checkpoints/best.safetensors.

    Attributes:
        best: step, split, metric and value of the best evaluation so far; None before the first.
        waited: evaluations since then.
    """

    def __init__(self, job: Job, run: RunDir, store: ActivationStore | None, device: torch.device) -> None:
        self.job, self.run, self.store, self.device = job, run, store, device
        self.best: dict[str, Any] | None = None
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        """Whether early stopping has waited long enough."""
        patience = self.job.config.train.patience
        return patience > 0 and self.waited >= patience

    @property
    def _file(self) -> Path:
        return self.run.checkpoints / "best.safetensors"

    def evaluate(self, step: int, *, candidate: bool, keeper: bool) -> dict[str, Any] | None:
        """Return a metrics row of the weights as they are, and keep them if they are the best; None without a split.

        Args:
            step: steps taken.
            candidate: may these weights be chosen (a linear probe before finetuning may not).
            keeper: whether this process writes the file.
        """
        options = self.job.config.train
        if not options.select_split:
            return None
        split = split_for(self.job.dataset, options.select_split, "select")
        batches = (self.store or self.job.loader()).batches(split.samples)
        positions, (logits_NK,) = predict([self._predictor], batches)
        chosen = [split.samples[position] for position in positions.tolist()]
        score = metrics.score(logits_NK, [sample.label for sample in chosen], [sample.domain for sample in chosen])
        value = score[options.select_metric]
        if candidate and (self.best is None or value > self.best["value"]):
            self.best = {"step": step, "split": split.name, "metric": options.select_metric, "value": value}
            self.waited = 0
            if keeper:
                self._keep()
        elif candidate:
            self.waited += 1
        return {"step": step, "split": split.name, **{name: score[name] for name in METRICS}}

    def install_best(self) -> None:
        """Put the best weights into the model; the last ones stay if nothing was evaluated."""
        if self.best is not None:
            self.job.learner.load_state_dict(load_file(self._file))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best, self.waited = state["best"], state["waited"]

    def _predictor(self) -> Predictor:
        job, learner = self.job, self.job.learner
        learner.eval()
        if learner.head is not None:
            head = Head(learner.head.weight.detach(), learner.head.bias.detach())
        else:
            captions = zero_shot_head(job.clip, job.dataset.class_names, job.dataset.templates)
            head = Head(captions, scale=float(job.clip.model.logit_scale.detach().exp()))

        predictor = clip_predictor(job.clip.model, head, tower=learner.tower)
        if self.store is not None:  # its batches are activations behind the frozen blocks already
            return predictor

        def predict_images(images_BCHW: Tensor) -> Tensor:
            with torch.no_grad():
                return predictor(learner.tower.lower(images_BCHW.to(self.device)))

        return predict_images

    def _keep(self) -> None:
        self.run.checkpoints.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_name(".best.safetensors.tmp")
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.job.learner.state_dict().items()}
        try:
            save_file(state, temporary)
            temporary.replace(self._file)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"cannot write {self._file}: {error}; free disk space and go on with --resume") from error


def save_model(job: Job, run: RunDir) -> None:
    """Write RUN/model in open_clip's layout, and RUN/head.safetensors of a linear head, replacing them whole.

    Raises:
        RunError: the disk is full or the folder read-only.
    """
    temporary = run.path / ".model.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        save_clip(job.clip, temporary)
        head = job.learner.head
        if head is not None and job.initial_head is not None:
            weight, bias = job.initial_head
            tensors = {"weight": head.weight, "bias": head.bias, "initial_weight": weight, "initial_bias": bias}
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, run.path / "head.safetensors")
        shutil.rmtree(run.model, ignore_errors=True)
        temporary.rename(run.model)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"cannot write {run.model}: {error}; free disk space and go on with --resume") from error
