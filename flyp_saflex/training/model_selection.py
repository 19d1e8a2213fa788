"""Model selection: the best weights on a select split are kept, or the last ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from safetensors import SafetensorError
from safetensors.torch import save_file

from flyp_saflex.errors import RunError
from flyp_saflex.evaluation.metrics import metric_row
from flyp_saflex.evaluation.predict import predict_split
from flyp_saflex.evaluation.scoring import split_scores
from flyp_saflex.records import Split
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tables import METRICS
from flyp_saflex.tasks.task import Loader, Task, read_tensors
from flyp_saflex.training.checkpoint import first_line


class ModelSelection:
    """Evaluates on one split of role `select` and keeps the best weights in checkpoints/best.safetensors.

    Args:
        task: the model under training.
        split: images that select; None: the last weights are kept.
        loader: reads them.
        lowered: whether it reads activations behind the frozen part.
        metric: name in `tables.METRICS`.
        patience: evaluations without a better one after which training stops; 0: never.
        folder: of the checkpoints.
        state: processes that share the images; None: this process reads all of them.

    Attributes:
        best: step, split, metric and value of the best evaluation so far; None before the first.
        waited: evaluations since then.
    """

    def __init__(
        self,
        task: Task,
        split: Split | None,
        loader: Loader,
        *,
        lowered: bool,
        metric: str,
        patience: int,
        folder: Path,
        state: PartialState | None = None,
    ) -> None:
        self.task, self.split, self.loader, self.lowered, self.state = task, split, loader, lowered, state
        self.metric, self.patience, self.folder = metric, patience, folder
        self.best: dict[str, Any] | None = None
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        """True if early stopping has waited long enough."""
        return self.patience > 0 and self.waited >= self.patience

    @property
    def _file(self) -> Path:
        return self.folder / "best.safetensors"

    def evaluate(self, step: int, *, candidate: bool, keeper: bool) -> dict[str, Any] | None:
        """Evaluate the weights as they are, and keep them if they are the best.

        Args:
            step: steps taken.
            candidate: may these weights be chosen (a linear probe before finetuning may not).
            keeper: whether this process writes the file.

        Returns:
            A row for metrics.jsonl; None without a split.
        """
        if self.split is None:
            return None
        variant = lambda: self.task.predictor(lowered=self.lowered)  # noqa: E731
        positions_N, (logits_NK,) = predict_split([variant], self.split, self.loader, state=self.state)
        row = metric_row(split_scores(self.split, positions_N, logits_NK))
        value = row[self.metric]
        if value is None:
            raise RunError(
                f"train.select_metric = {self.metric} has no value on {self.split.name}: choose another metric or split"
            )
        if candidate and (self.best is None or METRICS[self.metric].better(value, self.best["value"])):
            self.best = {"step": step, "split": self.split.name, "metric": self.metric, "value": value}
            self.waited = 0
            if keeper:
                self._keep()
        elif candidate:
            self.waited += 1
        return {"step": step, "split": self.split.name, **row}

    def line(self, row: dict[str, Any]) -> str:
        """Return an evaluation's row as a line of a log: the metric that selects, and the best so far."""
        best = self.best and f"; best {self.best['value']:.4f} after step {self.best['step']}"
        return f"after step {row['step']} {self.metric} {row[self.metric]:.4f} on {row['split']}{best or ''}"

    def install_best(self) -> None:
        """Put the best weights into the model; the last ones stay if nothing was evaluated."""
        if self.best is not None:
            tensors = read_tensors(self._file, "it holds the best weights; copy it back, or train again in another --run-dir")
            try:
                self.task.network.load_state_dict(tensors)
            except RuntimeError as error:
                raise RunError(f"{self._file} holds another network's weights ({first_line(error)}): copy it back") from None
            self.task.weights_changed()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best, self.waited = state["best"], state["waited"]

    def _keep(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_name(".best.safetensors.tmp")
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.task.network.state_dict().items()}
        try:
            save_file(state, temporary)
            temporary.replace(self._file)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"cannot write {self._file}: {error}; free disk space and go on with --resume") from error


def save_model(task: Task, run: RunDir) -> None:
    """Write RUN/model, and files beside it that the task needs, replacing the folder whole.

    Raises:
        RunError: the disk is full or the folder read-only.
    """
    temporary = run.path / ".model.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        task.save(temporary, run.path)
        shutil.rmtree(run.model, ignore_errors=True)
        temporary.rename(run.model)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"cannot write {run.model}: {error}; free disk space and go on with --resume") from error
