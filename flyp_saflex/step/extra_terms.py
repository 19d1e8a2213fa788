"""Terms of a step's loss beside its objective: distillation from a teacher, and a further loss of the classes.

Distillation is over training rows alone: the mass of an augmented row enters the objective only, so its gain (Eq. 9) stays what
it is. A further loss of the classes weighs augmented rows as well; SAFLEX does not see it and is refused beside it (`setup.py`).

Shapes: N rows of all processes, S of them in the pass, T training rows, C columns, K classes, U texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flyp_saflex.saflex.extra_losses import ExtraLoss, divergence, feature_distance
from flyp_saflex.step.gradcache import features
from flyp_saflex.tasks.label_space import LabelSpace, Rows, class_space
from flyp_saflex.tasks.network import Network, Outputs
from flyp_saflex.tasks.task import Processes, Task

Distill = Literal["none", "features", "logits"]


class Teacher:
    """Frozen twin of the network under training: as it started, or the running average of its weights (EMA).

    Args:
        network: the twin, with the weights that training starts from.
        decay: of the running average, per optimiser step; None: the twin stays as it started.
    """

    def __init__(self, network: Network, decay: float | None = None) -> None:
        self.network, self.decay = network.requires_grad_(False).eval(), decay

    @torch.no_grad()
    def follow(self, student: Network) -> None:
        """Take in the weights after an optimiser step: teacher = decay * teacher + (1 - decay) * student."""
        if self.decay is None:
            return
        newest = student.state_dict()
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                value.lerp_(newest[name], 1 - self.decay)
            else:
                value.copy_(newest[name])

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return what a resumed run needs; None for a teacher that stays."""
        return None if self.decay is None else dict(self.network.state_dict())

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over what `state_dict` returned."""
        if state is not None:
            self.network.load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class ExtraTerms:
    """Terms beside the objective; the defaults add nothing.

    Attributes:
        distill: features or logits that are drawn to the teacher's.
        distill_weight: factor of that term.
        teacher: None: no distillation.
        extra: further loss of the classes.
        extra_weight: its factor.
    """

    distill: Distill = "none"
    distill_weight: float = 1.0
    teacher: Teacher | None = None
    extra: ExtraLoss | None = None
    extra_weight: float = 1.0

    def widened(self, space: LabelSpace, task: Task) -> LabelSpace:
        """Return the label space with the class captions behind its texts, if a term reads them."""
        if self.extra is None or not self.extra.reads_classes:
            return space
        return replace(space, tokens_UL=torch.cat([space.tokens_UL, task.class_tokens()]))

    def added(
        self,
        loss: Tensor,
        out: Outputs,
        images_SD: Tensor,
        logits_SC: Tensor,
        weights_S: Tensor,
        *,
        task: Task,
        rows: Rows,
        space: LabelSpace,
        processes: Processes,
        among_S: Tensor | None = None,
        rows_at_once: int = 0,
    ) -> Tensor:
        """Return a step's loss with these terms added.

        Args:
            loss: the objective's.
            out: of this process's pass; its columns are those of `space.tokens_UL`.
            images_SD: embeddings of the passes of all processes.
            logits_SC: their logits over the columns of `space`.
            weights_S: their weights.
            task: the model.
            rows: this process's rows, all of them.
            space: label space, `widened`.
            processes: how tensors meet.
            among_S: places of the S rows among all N; None: all of them.
            rows_at_once: rows per pass of the teacher; 0: all.
        """
        if self.teacher is not None:
            augmented_S = space.augmented_N if among_S is None else space.augmented_N[among_S]
            parts = (out, images_SD[~augmented_S], logits_SC[~augmented_S])
            loss = loss + self.distill_weight * self._distillation(self.teacher, *parts, rows, space, processes, rows_at_once)
        if self.extra is not None:
            labels_NK = class_space(rows, task.dataset.num_classes, task.class_tokens(), processes.gather).upstream_NK
            labels_SK = labels_NK if among_S is None else labels_NK[among_S]
            logits_SK = None
            if self.extra.reads_classes:
                count = len(out.columns_CD)
                classes_K = torch.arange(count - task.dataset.num_classes, count, device=images_SD.device)
                logits_SK = out.logits(images_SD, classes_K)
            loss = loss + self.extra_weight * self.extra.loss(images_SD, logits_SK, labels_SK, weights_S)
        return loss

    def _distillation(
        self,
        teacher: Teacher,
        out: Outputs,
        images_TD: Tensor,
        logits_TC: Tensor,
        rows: Rows,
        space: LabelSpace,
        processes: Processes,
        rows_at_once: int,
    ) -> Tensor:
        network = teacher.network
        taught = features(network, network, rows.inputs[: rows.num_train], space.tokens_UL, rows_at_once)
        taught_TD = processes.gather(taught.images_ND)
        has_texts = network.head is None
        if self.distill == "features":
            distance = feature_distance(images_TD, taught_TD)
            return distance + feature_distance(out.columns_CD, taught.columns_CD) if has_texts else distance
        taught_TC = taught.logits(taught_TD, space.inverse_C)
        of_images = divergence(logits_TC, taught_TC)
        return (of_images + divergence(logits_TC.T, taught_TC.T)) / 2 if has_texts else of_images
