"""Points of extension by name: a new dataset, metric or loss is one module, one line here, one test.

    table            option                  an entry is
    DATASETS         data.name               reader: DataConfig -> Dataset
    TEST_SETS        evaluate --on           reader of a dataset that is only tested on
    METHODS          train.method            Method: task, objective and phases by name
    TASKS            (of the method)         subclass of Task (tasks/task.py)
    OBJECTIVES       train.objective         Objective (saflex/objectives.py)
    EXTRA_LOSSES     train.extra_loss        ExtraLoss, added to the objective (saflex/extra_losses.py)
    UPSTREAMS        augment.upstream        Upstream: a pool of edits, an operation per item, or a mix over the batch
    WEIGHT_RULES     saflex.weight_rule      function: gains, labels, upstream labels, penalty -> weights
    EVIDENCE         saflex.evidence         function: EditFeatures -> scores of every label (tasks/clip_evidence.py)
    AVERAGES         evaluate --average      Average of the weights of several runs (evaluation/averages.py)
    METRICS          train.select_metric     Metric: title, unit, direction, function of Scores
    EDITORS          editor.kind             EditorKind: usual values, inputs, loader (editing/settings.py)
    PRESETS          editor.preset           EditorPreset: kind, advised options, licence, memory (editing/presets.py)

An entry may be the object itself or "module:attribute" within the package, imported when it is first used: the ground stays
free of torch, and a name is checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from flyp_saflex.errors import ConfigError, nearest
from flyp_saflex.user_text import quoted

if TYPE_CHECKING:
    from torch import Tensor

    from flyp_saflex.config import DataConfig
    from flyp_saflex.editing.presets import EditorPreset
    from flyp_saflex.editing.settings import EditorKind
    from flyp_saflex.evaluation.averages import Average
    from flyp_saflex.evaluation.metrics import Scores
    from flyp_saflex.records import Dataset
    from flyp_saflex.saflex.extra_losses import ExtraLoss
    from flyp_saflex.saflex.objectives import Objective
    from flyp_saflex.tasks.clip_evidence import EditFeatures
    from flyp_saflex.tasks.task import Task
    from flyp_saflex.training.upstreams import Upstream

Entry = TypeVar("Entry")


class Table(MutableMapping[str, Entry], Generic[Entry]):
    """Names of one kind of thing, in the order in which they are told.

    Args:
        option: the option whose value is a name of this table; or a word for the kind of thing.
        entries: objects, or "module:attribute" below `flyp_saflex`.
        may_be_empty: whether the option may be the empty string, which names nothing.
    """

    def __init__(self, option: str, entries: Mapping[str, Entry | str], *, may_be_empty: bool = False) -> None:
        self.option, self._may_be_empty = option, may_be_empty
        self._entries: dict[str, Entry | str] = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        """Return an entry, imported if need be.

        Raises:
            ConfigError: there is no such name; says the nearest.
        """
        self.check(name)
        entry = self._entries[name]
        return _imported(entry) if isinstance(entry, str) else entry

    def check(self, name: str, option: str = "") -> None:
        """Check that a name is in the table; import nothing.

        Args:
            name: looked up.
            option: another option with names of this table; empty: its own.

        Raises:
            ConfigError: it is not; says the nearest.
        """
        if name not in self._entries and not (self._may_be_empty and name == ""):
            raise ConfigError(
                f"{option or self.option} = {quoted(repr(name))}: expected one of {', '.join(self)}{nearest(name, self)}"
            )

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry, or the default where there is no such name."""
        if name not in self:  # the inherited one expects a KeyError
            return default
        return self[name]

    def __setitem__(self, name: str, entry: Entry | str) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _imported(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(f"flyp_saflex.{module}"), attribute)


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One part of a run with an optimiser of its own."""

    name: str
    only_head: bool = False
    """Whether the linear head alone is trained."""
    steps: Literal["steps", "probe_steps"] = "steps"
    """The option of `[train]` that says how long."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A value of `train.method`: names in `TASKS` and `OBJECTIVES`, and the phases of a run."""

    task: str
    objective: str
    phases: tuple[PhasePlan, ...] = (PhasePlan(name="train"),)

    @property
    def only_head(self) -> bool:
        """True if nothing but a linear head is ever trained."""
        return all(phase.only_head for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number about a model on a split."""

    title: str
    short: str
    """Head of its column in the table that `evaluate` prints."""
    compute: Callable[[Scores], float | None] | str
    """Function of the scores, or "module:attribute"; None: it has no value there."""
    is_fraction: bool = True
    """Whether reports print it in percent, and differences in points."""
    larger_is_better: bool = True
    in_report: bool = True
    """Whether it has a table of its own in reports."""

    def of(self, scores: Scores) -> float | None:
        """Return the metric's value."""
        compute = _imported(self.compute) if isinstance(self.compute, str) else self.compute
        return compute(scores)

    def text(self, value: float | None, *, sign: bool = False) -> str:
        """Format a value or a difference: percent with one decimal, or three digits behind the point; `-` for None."""
        if value is None:
            return "-"
        plus = "+" if sign else ""
        return f"{100 * value:{plus}.1f}" if self.is_fraction else f"{value:{plus}.3f}"

    def better(self, value: float, than: float) -> bool:
        """Return whether a value is better than another one."""
        return value > than if self.larger_is_better else value < than


DATASETS: Table[Callable[[DataConfig], Dataset]] = Table(
    "data.name",
    {
        "folder": "data.folder:read_folder",
        "table": "data.table:read_table",
        "hf": "data.hf:read_hf",
        "pacs": "data.domainbed:PACS",
        "vlcs": "data.domainbed:VLCS",
        "office-home": "data.domainbed:OFFICE_HOME",
        "terra-incognita": "data.domainbed:TERRA_INCOGNITA",
        "domain-net": "data.domainbed:DOMAIN_NET",
        "iwildcam": "data.wilds:read_iwildcam",
        "iwildcam-mini": "data.wilds:read_iwildcam_mini",
        "cub": "data.cub:read_cub",
        "waterbirds": "data.wilds_sets:WATERBIRDS",
        "fmow": "data.wilds_sets:FMOW",
        "camelyon17": "data.wilds_sets:CAMELYON17",
        "tabular": "data.tabular:read_tabular",
        "medmnist": "data.medmnist:read_medmnist",
    },
)
TEST_SETS: Table[Callable[[DataConfig], Dataset]] = Table(
    "--on",
    {
        "imagenet-val": "data.evaluation_sets:IMAGENET_VAL",
        "imagenet-v2": "data.evaluation_sets:IMAGENET_V2",
        "imagenet-sketch": "data.evaluation_sets:IMAGENET_SKETCH",
        "imagenet-r": "data.evaluation_sets:IMAGENET_R",
        "imagenet-a": "data.evaluation_sets:IMAGENET_A",
        "objectnet": "data.objectnet:read_objectnet",
        "class-folders": "data.evaluation_sets:read_class_folders",
    },
)
TASKS: Table[type[Task]] = Table(
    "task",
    {
        "clip": "tasks.clip_task:ClipTask",
        "clip-linear": "tasks.clip_task:LinearClipTask",
        "mlp": "tasks.mlp_task:MlpTask",
        "image-classifier": "tasks.image_classifier:ImageClassifierTask",
        "contrastive": "tasks.contrastive_task:ContrastiveTask",
    },
)
OBJECTIVES: Table[Objective] = Table(
    "train.objective",
    {
        "contrastive": "saflex.objectives:CONTRASTIVE",
        "sigmoid": "saflex.objectives:SIGMOID",
        "nt-xent": "saflex.objectives:NT_XENT",
        "cross-entropy": "saflex.objectives:CROSS_ENTROPY",
    },
)
EXTRA_LOSSES: Table[ExtraLoss] = Table(
    "train.extra_loss",
    {
        "cross-entropy": "saflex.extra_losses:CROSS_ENTROPY",
        "supcon": "saflex.extra_losses:SUPCON",
    },
    may_be_empty=True,
)
_PROBE = PhasePlan(name="linear-probe", only_head=True, steps="probe_steps")
METHODS: Table[Method] = Table(
    "train.method",
    {
        "flyp": Method(task="clip", objective="contrastive"),
        "ce-text": Method(task="clip", objective="cross-entropy"),
        "ce-linear": Method(task="clip-linear", objective="cross-entropy"),
        "linear-probe": Method(task="clip-linear", objective="cross-entropy", phases=(PhasePlan(name="train", only_head=True),)),
        "lp-ft": Method(task="clip-linear", objective="cross-entropy", phases=(_PROBE, PhasePlan(name="finetune"))),
        "mlp": Method(task="mlp", objective="cross-entropy"),
        "image-classifier": Method(task="image-classifier", objective="cross-entropy"),
        "contrastive-images": Method(task="contrastive", objective="nt-xent"),
    },
)
UPSTREAMS: Table[Upstream] = Table(
    "augment.upstream",
    {
        "cache": "training.upstreams:CACHE",
        "copy-paste": "training.upstreams:COPY_PASTE",
        "randaugment": "training.upstreams:RANDAUGMENT",
        "autoaugment": "training.upstreams:AUTOAUGMENT",
        "autoaugment-cifar10": "training.upstreams:AUTOAUGMENT_CIFAR10",
        "autoaugment-svhn": "training.upstreams:AUTOAUGMENT_SVHN",
        "augmix": "training.upstreams:AUGMIX",
        "trivialaugment": "training.upstreams:TRIVIALAUGMENT",
        "random-crop": "training.upstreams:RANDOM_CROP",
        "flip": "training.upstreams:FLIP",
        "translate": "training.upstreams:TRANSLATE",
        "soft-crop": "training.upstreams:SOFT_CROP",
        "mixup": "training.upstreams:MIXUP",
        "cutmix": "training.upstreams:CUTMIX",
    },
)
WeightRule = Callable[["Tensor", "Tensor", "Tensor", float], "Tensor"]
WEIGHT_RULES: Table[WeightRule] = Table(
    "saflex.weight_rule",
    {
        "upstream": "saflex.closed_form:keep_upstream",
        "sum": "saflex.closed_form:keep_sum",
        "label": "saflex.closed_form:keep_label",
        "soft": "saflex.closed_form:weigh_soft",
        "all": "saflex.closed_form:keep_all",
        "evidence": "saflex.closed_form:keep_all",  # rows come with weights that evidence decided beforehand
    },
)
EVIDENCE: Table[Callable[[EditFeatures], Tensor]] = Table(
    "saflex.evidence",
    {
        "zero-shot": "tasks.clip_evidence:zero_shot",
        "source": "tasks.clip_evidence:source_final",
        "source-middle": "tasks.clip_evidence:source_middle",
    },
)
AVERAGES: Table[Average] = Table(
    "--average",
    {
        "model-stock": "evaluation.averages:MODEL_STOCK",
        "soup": "evaluation.averages:SOUP",
        "greedy": "evaluation.averages:GREEDY",
        "lines": "evaluation.averages:LINES",
        "wise": "evaluation.averages:WISE",
    },
)
METRICS: Table[Metric] = Table(
    "train.select_metric",
    {
        "accuracy": Metric(title="Accuracy", short="accuracy", compute="evaluation.metrics:accuracy_of"),
        "macro_f1": Metric(title="Macro-F1", short="macro-F1", compute="evaluation.metrics:macro_f1_of"),
        "worst_group_accuracy": Metric(
            title="Worst-group accuracy", short="worst group", compute="evaluation.metrics:worst_group_of"
        ),
        "auroc": Metric(title="AUROC", short="AUROC", compute="evaluation.ranking:auroc_of"),
        "average_precision": Metric(
            title="Average precision", short="AP", compute="evaluation.ranking:average_precision_of", in_report=False
        ),
        "ece": Metric(
            title="Calibration error",
            short="ECE",
            compute="evaluation.metrics:ece_of",
            larger_is_better=False,
            in_report=False,
        ),
    },
)
EDITORS: Table[EditorKind] = Table(
    "editor.kind",
    {
        "instruct-pix2pix": "editing.settings:INSTRUCT_PIX2PIX",
        "img2img": "editing.settings:IMG2IMG",
        "text2img": "editing.settings:TEXT2IMG",
        "inpaint": "editing.settings:INPAINT",
        "controlnet-canny": "editing.settings:CONTROLNET_CANNY",
        "auto": "editing.settings:AUTO",
    },
)
PRESETS: Table[EditorPreset] = Table(
    "editor.preset",
    {
        "instruct-pix2pix": "editing.presets:INSTRUCT_PIX2PIX",
        "sdxl-instruct-pix2pix": "editing.presets:SDXL_INSTRUCT_PIX2PIX",
        "flux-kontext": "editing.presets:FLUX_KONTEXT",
        "flux2-klein": "editing.presets:FLUX2_KLEIN",
        "qwen-image-edit": "editing.presets:QWEN_IMAGE_EDIT",
        "img2img": "editing.presets:IMG2IMG",
        "text2img": "editing.presets:TEXT2IMG",
        "inpaint": "editing.presets:INPAINT",
        "controlnet-canny": "editing.presets:CONTROLNET_CANNY",
    },
    may_be_empty=True,
)
CHOICES: tuple[Table[Any], ...] = (
    *(DATASETS, METHODS, OBJECTIVES, EXTRA_LOSSES, UPSTREAMS, WEIGHT_RULES, EVIDENCE, METRICS, EDITORS, PRESETS),
)
"""Tables whose names are values of an option: `recipe.py` checks these options."""
