"""State of a run: saved in checkpoints, restored from them, and rolled back where a step diverges."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flyp_saflex.errors import RunError
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.extra_terms import Teacher
from flyp_saflex.step.skip_dropped import Selecting
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tasks.task import Task
from flyp_saflex.training import checkpoint
from flyp_saflex.training.batches import UnreadableFiles
from flyp_saflex.training.model_selection import ModelSelection


class RunState:
    """Everything that a resumed run needs, bit for bit.

    Args:
        task: the model.
        saflex: None: not enabled.
        selecting: whether steps decide before they train.
        selection: the best weights so far.
        unreadable: files that could not be read.
        run: folder of the checkpoints.
        accelerator: its main process writes; its gradient scaler belongs to the state.
        keep: newest checkpoints that stay.
        teacher: of the distillation; None: there is none.

    Attributes:
        refreshed: step of the last validation gradient; -1: none.
    """

    def __init__(
        self,
        task: Task,
        saflex: Saflex | None,
        selecting: Selecting,
        selection: ModelSelection,
        unreadable: UnreadableFiles,
        run: RunDir,
        accelerator: Accelerator,
        *,
        keep: int,
        teacher: Teacher | None = None,
    ) -> None:
        self.task, self.saflex, self.selecting, self.selection = task, saflex, selecting, selection
        self.unreadable, self.run, self.accelerator, self.keep = unreadable, run, accelerator, keep
        self.teacher = teacher
        self.refreshed = -1
        self._decided_before: dict[str, Any] = {}
        self._buffers_before: dict[str, Tensor] = {}

    def save(self, step: int, optimizer: Any, *, seconds: float) -> None:
        """Write a checkpoint of the state after `step` steps; the newest stay."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "learner": self.task.network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "teacher": self.teacher.state_dict() if self.teacher is not None else None,
                **self._decided(),
                "refreshed": self.refreshed,
                "selection": self.selection.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "unreadable": self.unreadable.reasons,
                "seconds": seconds,
            }
            checkpoint.save(self.run.checkpoints, step, state, keep=self.keep)

    def restore(self, state: dict[str, Any]) -> float:
        """Take over a checkpoint; return the seconds of training that it had taken.

        Raises:
            RunError: it holds another network's state, or is another version's.
        """
        try:
            return self._take_over(state)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"the newest checkpoint in {self.run.checkpoints} is not what this version and recipe write "
                f"({type(error).__name__}: {checkpoint.first_line(error)}): delete it to resume from the one before, or choose "
                "another --run-dir"
            ) from error

    def _take_over(self, state: dict[str, Any]) -> float:
        self.task.network.load_state_dict(state["learner"])
        self.task.weights_changed()
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        self._restore_decided(state)
        self.refreshed = state["refreshed"]
        self.selection.load_state_dict(state["selection"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.unreadable.restore(state["unreadable"])
        return float(state["seconds"])

    def remember(self, *, buffers: bool) -> None:
        """Remember the state before a step; parameters do not change before the optimiser's step.

        Args:
            buffers: whether the forward pass changes buffers (batch statistics).
        """
        self._decided_before = self._decided()
        named = self.task.network.named_buffers() if buffers else ()
        self._buffers_before = {name: value.clone() for name, value in named}

    def roll_back(self) -> None:
        """Return to the remembered state."""
        with torch.no_grad():
            for name, before in self._buffers_before.items():
                self.task.network.get_buffer(name).copy_(before)
        self._restore_decided(self._decided_before)

    def _decided(self) -> dict[str, Any]:
        """Return the state that decisions about augmented rows go on from."""
        saflex = self.saflex.state_dict() if self.saflex is not None else None
        return {"saflex": saflex, "selecting": self.selecting.state_dict()}

    def _restore_decided(self, state: dict[str, Any]) -> None:
        if self.saflex is not None:
            self.saflex.load_state_dict(checkpoint.moved(state["saflex"], self.accelerator.device))
        self.selecting.load_state_dict(state["selecting"])
