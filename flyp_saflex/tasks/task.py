"""Task: everything that training, evaluation and saving ask of a model.

`Task` is the whole interface with the answers of a plain classifier (a network with a linear head, the dataset's classes as
labels). A new kind of model is a subclass that overrides what differs, and one line in `tables.TASKS`.

Shapes: N rows, V validation rows, K classes, U texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flyp_saflex.config import Config, DataConfig
from flyp_saflex.errors import RunError
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.images.reader import RowReader, Source
from flyp_saflex.records import Dataset, Edit, Sample
from flyp_saflex.tables import METHODS
from flyp_saflex.tasks.feature_cache import FeatureCache, LoweredImages
from flyp_saflex.tasks.label_space import Gather, LabelSpace, Rows, ValidationSpace, class_space
from flyp_saflex.tasks.network import Network, parameter_groups
from flyp_saflex.user_text import quoted

Predictor = Callable[[Tensor], Tensor]
"""A batch of inputs to float32 logits over the dataset's classes."""
Loader = ImageLoader | FeatureCache | LoweredImages
Over = Literal["captions", "views", "classes"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """Inputs that a task is built from.

    Attributes:
        config: the recipe.
        dataset: class names, templates, splits.
        run: folder of a run whose weights are loaded; None: the weights that training starts from.
        device: where the model goes.
    """

    config: Config
    dataset: Dataset
    run: Path | None = None
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Processes:
    """Communication of tensors among processes; the defaults serve a single one.

    Attributes:
        gather: concatenation of every process's tensor, without gradient.
        gather_features: the same with gradient to every process.
        rank: whose part of a concatenation is this process's own.
        count: number of processes.
    """

    gather: Gather = lambda tensor: tensor
    gather_features: Gather = lambda tensor: tensor
    rank: int = 0
    count: int = 1

    def gather_in_order(self, tensor_A: Tensor) -> Tensor:
        """Return every process's rows in the order of a single process.

        Row i of process r is row i * count + r.
        """
        return self.gather(tensor_A).unflatten(0, (self.count, -1)).transpose(0, 1).flatten(0, 1)

    def as_gathered(self, tensor_A: Tensor) -> Tensor:
        """Return rows in the order of a single process in that of `gather`: process after process."""
        return tensor_A.unflatten(0, (-1, self.count)).transpose(0, 1).flatten(0, 1)


class Task:
    """A classifier on whatever the dataset's rows are.

    Args:
        network: the module that is trained.
        dataset: its classes are the labels.

    Attributes:
        notes: what a person should know about the model on this dataset.
        files: files of a finished run that the task is loaded from.
        has_captions: whether objectives over captions (proxy classes) can be used.
        gives_evidence: whether its pretrained weights can judge edits (`edit_evidence`).
        has_fixed_classes: whether its columns stand for the classes it was trained on, so that no other class can be scored.
        num_views: views of a validation row; 2: made by the operations of the training rows, with seeds of their own.
        input_size_px: side of the square images that the model takes; 0: it takes no images.
    """

    files: ClassVar[tuple[str, ...]] = (f"model/{WEIGHTS}",)
    has_captions: ClassVar[bool] = False
    gives_evidence: ClassVar[bool] = False
    has_fixed_classes: ClassVar[bool] = True
    num_views: ClassVar[int] = 1
    input_size_px: int = 0

    def __init__(self, network: Network, dataset: Dataset) -> None:
        self.network, self.dataset = network, dataset
        self.notes: list[str] = []

    # Building, saving, loading

    @classmethod
    def build(cls, inputs: TaskInputs) -> Task:
        """Return the task of a recipe, with the weights that training starts from or those of a run.

        Raises:
            UserError: weights that cannot be had, or that do not fit the dataset.
        """
        raise NotImplementedError  # every task has its own

    def save(self, model: Path, run: Path) -> None:
        """Write the weights.

        Args:
            model: new, empty folder that becomes RUN/model.
            run: the run's folder.
        """
        from safetensors.torch import save_file

        model.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.network.state_dict().items()}
        save_file(state, model / WEIGHTS)

    def load_weights(self, run: Path) -> None:
        """Put the weights of a finished run into the network.

        Raises:
            RunError: they are another network's.
        """
        tensors = read_tensors(run / "model" / WEIGHTS, "train again")
        try:
            self.network.load_state_dict(tensors)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise RunError(
                f"{run / 'model' / WEIGHTS} does not fit the task of its config.toml ({reason}): train again"
            ) from None

    def initial_state(self) -> dict[str, Tensor] | None:
        """Return the network's state at the start of training, for averaging with it (WiSE-FT); None: there is none to keep."""
        return None

    # Inputs

    def source(self, data: DataConfig, samples: Sequence[Sample]) -> Source:
        """Return the reader of rows as the model takes them.

        Args:
            data: the recipe's `[data]` section.
            samples: all that may be read.
        """
        return RowReader(self.dataset.rows)

    def feature_cache(self, config: Config, loader: ImageLoader, device: torch.device) -> FeatureCache | None:
        """Return the cache of activations behind the frozen part, if the recipe asks for one and the task has one."""
        return None

    def evaluation_inputs(
        self, config: Config, loader: ImageLoader, device: torch.device, start: dict[str, Tensor] | None = None
    ) -> tuple[Loader, bool]:
        """Return the loader of evaluation, and whether it gives activations behind the frozen part.

        Args:
            config: the recipe.
            loader: of the inputs.
            device: where the model is.
            start: state that weights are averaged with; None: they are not.
        """
        return loader, False

    # Labels

    def label_of(self, item: Sample | Edit) -> int:
        """Return the class of a row that training may know."""
        return item.label

    def caption_of(self, item: Sample | Edit, seed: int) -> int:
        """Return the caption id of a row: its class, where a task has no captions."""
        return item.label

    def caption_of_class(self, label: int, seed: int) -> int:
        """Return a caption id of a class, in a template that the seed picks."""
        return label

    def class_caption(self, labels_V: Tensor) -> Tensor:
        """Return the caption ids of classes, for validation rows."""
        return labels_V

    def label_space(self, rows: Rows, over: Over, seed: int, gather: Gather) -> LabelSpace:
        """Return the label space of a batch.

        Args:
            rows: this process's rows.
            over: the batch's captions or views (proxy classes), or the dataset's classes.
            seed: of the step, for a random template.
            gather: concatenation over processes.
        """
        assert over == "classes", "checked in training/setup.py"
        return class_space(rows, self.dataset.num_classes, self.class_tokens(), gather)

    def class_tokens(self) -> Tensor:
        """Return the tokens [K, L] of the classes' captions; without rows where columns are parameters."""
        return torch.empty(0, 0, dtype=torch.long)

    def validation_space(self, captions_V: Tensor) -> ValidationSpace:
        """Return the label space of validation rows over their own captions or views (for such objectives)."""
        raise NotImplementedError  # asked of tasks whose method's objective compares captions or views

    def class_of(self, label: int, over: Over) -> int | None:
        """Return the class of a label of the batch's label space; None where it names no class."""
        return label

    def edit_evidence(
        self, kinds: Sequence[str], edits: Sequence[Edit], loader: ImageLoader, *, rank: int = 0, num_processes: int = 1
    ) -> dict[str, Tensor]:
        """Return scores [N, K] of cached edits by kind of evidence, from the weights in place.

        Args:
            kinds: names in `tables.EVIDENCE`.
            edits: N of them, made from training samples.
            loader: of the model's inputs.
            rank: this process, which reads its share of the images.
            num_processes: how many there are.
        """
        raise NotImplementedError  # asked of tasks with `gives_evidence` alone

    # Training

    def objective_name(self, config: Config) -> str:
        """Return the training loss of a recipe, a name in `tables.OBJECTIVES`."""
        return config.train.objective or METHODS[config.train.method].objective

    def begin_phase(self, *, only_head: bool) -> None:
        """Set which parameters are trained from now on."""
        self.network.requires_grad_(not only_head)
        if self.network.head is not None:
            self.network.head.requires_grad_(True)

    def parameter_groups(self, *, lr: float, head_lr: float, weight_decay: float, decays_all: bool) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups, each with its `peak_lr`."""
        return parameter_groups(self.network, lr=lr, head_lr=head_lr, weight_decay=weight_decay, decays_all=decays_all)

    def after_step(self) -> None:
        """Do what follows every optimiser step (constraints on parameters)."""

    def log_row(self) -> dict[str, float]:
        """Return numbers of the model for a row of metrics.jsonl."""
        return {}

    # Scores

    def computed(self) -> Any:
        """Return what was computed from the weights in place and can be used with them again."""

    def weights_changed(self, computed: Any = None) -> None:
        """Forget what was computed from the former weights.

        Args:
            computed: of the weights that are in place now, as `computed()` returned it then.
        """

    def predictor(self, *, precision: str = "no", lowered: bool = False) -> Predictor:
        """Return class logits of the network as it is, in evaluation mode.

        Args:
            precision: `no`, `bf16` or `fp16`, of the network before its columns; logits are always float32.
            lowered: whether the inputs are activations behind the frozen part already.
        """
        self.network.eval()
        device = next(self.network.parameters()).device

        @torch.no_grad()
        def predict_batch(inputs: Tensor) -> Tensor:
            with autocast(device, precision):
                hidden = inputs.to(device, non_blocking=True)
                outputs = self.network(hidden if lowered else self.network.lower(hidden))
            return outputs.logits()

        return predict_batch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision.

    Float32 for `no`, and for `fp16` on a CPU, where half precision only loses digits.
    """
    if precision == "no" or (precision == "fp16" and device.type == "cpu"):
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def read_tensors(path: Path, fix: str) -> dict[str, Tensor]:
    """Read a safetensors file of a run.

    Args:
        path: the file.
        fix: what the user can do where it cannot be read.

    Raises:
        RunError: it is missing, damaged or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({quoted(str(error))}), expected tensors as `train` writes them: {fix}") from None
