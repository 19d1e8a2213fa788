"""CLIP as a task: captions as columns (FLYP and cross entropy over captions), or a linear head on its embeddings.

Shapes: M captions that can occur, L tokens, K classes, V validation rows, U texts, N images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from flyp_saflex.clip.cut_texts import note_on_cut_texts
from flyp_saflex.clip.image_tower import num_blocks
from flyp_saflex.clip.model import RANDOM, Clip, load_clip, save_clip
from flyp_saflex.clip.zero_shot import text_digest, zero_shot_head
from flyp_saflex.config import Config, DataConfig
from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.images.reader import Source, open_reader
from flyp_saflex.records import Dataset, Edit, Sample
from flyp_saflex.tasks.captions import Captions
from flyp_saflex.tasks.clip_choices import frozen_blocks, objective_name, reads_bias, with_adapter
from flyp_saflex.tasks.clip_evidence import edit_evidence
from flyp_saflex.tasks.clip_network import ClipNetwork
from flyp_saflex.tasks.feature_cache import FeatureCache, LoweredImages, open_feature_cache
from flyp_saflex.tasks.label_space import Gather, LabelSpace, Rows, ValidationSpace, class_space
from flyp_saflex.tasks.network import Outputs
from flyp_saflex.tasks.proxy_classes import Proxies, first_with_equal_tokens, proxy_columns, proxy_space
from flyp_saflex.tasks.task import Loader, Over, Predictor, Task, TaskInputs, autocast, read_tensors

MAX_LOGIT_SCALE = math.log(100)
"""CLIP's bound on log logit_scale."""
HEAD = "head.safetensors"


class ClipTask(Task):
    """CLIP with captions as columns.

    Args:
        clip: model, tokenizer, preprocessing.
        network: the same model, cut and perhaps with a linear head.
        dataset: classes, templates, captions of training samples.
        config: of the run.
    """

    files: ClassVar[tuple[str, ...]] = ("model/open_clip_config.json", "model/open_clip_model.safetensors")
    has_captions = True
    gives_evidence = True
    has_fixed_classes = False
    network: ClipNetwork

    def __init__(self, clip: Clip, network: ClipNetwork, dataset: Dataset, config: Config) -> None:
        super().__init__(network, dataset)
        self.clip, self.config = clip, config
        self.input_size_px = clip.image_size_px
        self.proxies: Proxies = config.train.proxies
        self.captions = Captions.of(dataset, dataset.train.samples if "train" in dataset.splits else ())
        self.tokens_ML = clip.tokenizer(self.captions.texts)
        self.same_M = first_with_equal_tokens(self.tokens_ML)
        self.notes += clip.notes
        if cut := note_on_cut_texts(clip.tokenizer, self.captions.texts, self.tokens_ML):
            self.notes.append(cut)
        self._class_columns: Tensor | None = None
        self._head: tuple[str, Tensor] | None = None  # of the text tower with this digest
        self._max_logit_scale = max(MAX_LOGIT_SCALE, float(clip.model.logit_scale.detach()))

    def objective_name(self, config: Config) -> str:
        """Return the training loss of a recipe: the sigmoid loss where the model was pretrained with it."""
        return objective_name(config, self.clip)

    @classmethod
    def build(cls, inputs: TaskInputs) -> ClipTask:
        """Return CLIP as the recipe names it, or as a run left it."""
        clip = cls._load(inputs)
        frozen, biased = frozen_blocks(inputs.config, clip), reads_bias(inputs.config, clip)
        network = ClipNetwork(clip.model, num_frozen=frozen, fixed=clip.fixed, with_bias=biased)
        task = cls(clip, network, inputs.dataset, inputs.config)
        task.notes += with_adapter(network, inputs)
        return task

    @staticmethod
    def _load(inputs: TaskInputs) -> Clip:
        if inputs.run is not None:
            return load_clip(f"local-dir:{inputs.run / 'model'}", device=inputs.device)
        return load_clip(inputs.config.model.name, inputs.config.model.pretrained, device=inputs.device)

    def save(self, model: Path, run: Path) -> None:
        """Write RUN/model in open_clip's layout."""
        save_clip(self.clip, model)

    def initial_state(self) -> dict[str, Tensor] | None:
        """Load the pretrained weights that the run started from.

        Raises:
            ConfigError: the run started from random weights.
        """
        model = self.config.model
        if model.pretrained == RANDOM:
            raise ConfigError(
                f"model.pretrained = {RANDOM}: the run started from random weights, there is nothing to average with"
            )
        state = load_clip(model.name, model.pretrained).model.state_dict()
        return {f"clip.{name}": value for name, value in state.items()}

    def source(self, data: DataConfig, samples: Sequence[Sample]) -> Source:
        """Return the reader of images with the model's preprocessing."""
        return open_reader(data, self.clip.preprocess, self.clip.config["preprocess_cfg"], samples, rows=self.dataset.rows)

    def feature_cache(self, config: Config, loader: ImageLoader, device: torch.device) -> FeatureCache | None:
        """Return the cache of activations behind the frozen image blocks, if `train.frozen_cache` names a folder."""
        return open_feature_cache(config, self.clip, self.network.tower, loader, device)

    def evaluation_inputs(
        self, config: Config, loader: ImageLoader, device: torch.device, start: dict[str, Tensor] | None = None
    ) -> tuple[Loader, bool]:
        """Return the images, or activations behind blocks that are the same for every average of weights."""
        cache = self.feature_cache(config, loader, device)
        if cache is not None:
            return cache, True
        tower, precision = self.network.tower, config.train.precision
        if start is None or not self._is_shared(start):
            return loader, False

        def lower(images_BCHW: Tensor) -> Tensor:
            with autocast(device, precision):
                return tower.lower(images_BCHW.to(device, non_blocking=True))

        return LoweredImages(loader, lower), True

    def _is_shared(self, start: Mapping[str, Tensor]) -> bool:
        """Return whether the image tower was frozen up to its pooling, so that it is one and the same for every alpha.

        Cut further down it would be the same up to there, but a thousand activations in the middle of a tower can be many
        times as large as the images.
        """
        tower = self.network.tower
        if not tower.num_frozen or tower.num_frozen < num_blocks(tower.visual):
            return False
        frozen = {id(parameter) for parameter in tower.frozen_parameters()}
        return all(
            torch.equal(value.detach().cpu(), start[f"clip.visual.{name}"].cpu())
            for name, value in tower.visual.state_dict(keep_vars=True).items()
            if (id(value) in frozen or not isinstance(value, nn.Parameter)) and f"clip.visual.{name}" in start
        )

    def caption_of(self, item: Sample | Edit, seed: int) -> int:
        """Return the caption id of a row: the sample's own caption, or its class in a random template."""
        return self.captions.of_row(item, seed)

    def caption_of_class(self, label: int, seed: int) -> int:
        """Return the caption id of a class in a template that the seed picks."""
        return self.captions.of_class(label, seed)

    def class_caption(self, labels_V: Tensor) -> Tensor:
        """Return the caption ids of classes in the first template."""
        return labels_V * self.captions.num_templates

    def class_captions(self, seed: int = 0) -> Tensor:
        """Return the caption ids [K] of all classes in one template."""
        return torch.arange(self.dataset.num_classes) * self.captions.num_templates + seed % self.captions.num_templates

    def label_space(self, rows: Rows, over: Over, seed: int, gather: Gather) -> LabelSpace:
        """Return the batch's captions, or the classes in a template that the seed picks, as label space."""
        self._follow(rows.labels_N.device)
        if over == "captions":
            return proxy_space(rows, self.tokens_ML, self.same_M, self.proxies, gather)
        tokens_KL = self.tokens_ML[self.class_captions(seed).to(rows.labels_N.device)]
        return class_space(rows, self.dataset.num_classes, tokens_KL, gather)

    def class_tokens(self) -> Tensor:
        """Return the tokens [K, L] of the classes' captions in the first template."""
        self._follow(next(self.network.parameters()).device)
        return self.tokens_ML[self.class_captions().to(self.tokens_ML.device)]

    def validation_space(self, captions_V: Tensor) -> ValidationSpace:
        """Return the captions of validation rows as their label space."""
        self._follow(captions_V.device)
        captions_V = self.same_M[captions_V]
        labels_K = torch.unique(captions_V)
        columns_C, assignment_VC = proxy_columns(captions_V, self.proxies)
        return ValidationSpace(self.tokens_ML[labels_K], torch.searchsorted(labels_K, columns_C), assignment_VC)

    def class_of(self, label: int, over: Over) -> int | None:
        """Return the class of a caption id; None for a sample's own caption, which names no class."""
        if over == "classes":
            return label
        templates = self.captions.num_templates
        return label // templates if label < self.dataset.num_classes * templates else None

    def edit_evidence(
        self, kinds: Sequence[str], edits: Sequence[Edit], loader: ImageLoader, *, rank: int = 0, num_processes: int = 1
    ) -> dict[str, Tensor]:
        """Return scores [N, K] of cached edits by kind of evidence, from the weights in place."""
        self.network.eval()
        return edit_evidence(self.clip, kinds, self.dataset, edits, loader, rank=rank, num_processes=num_processes)

    def _follow(self, device: torch.device) -> None:
        """Keep the tokens where the rows are."""
        if self.tokens_ML.device != device:
            self.tokens_ML, self.same_M = self.tokens_ML.to(device), self.same_M.to(device)

    def begin_phase(self, *, only_head: bool) -> None:
        """Freeze what the recipe freezes, and what a phase of the head alone leaves alone."""
        train = self.config.train
        self.network.freeze(
            text=train.freeze_text,
            image=train.freeze_image,
            token_embedding=train.freeze_token_embedding,
            only_head=only_head,
        )
        if train.gradient_checkpointing:
            self.network.recompute()

    def after_step(self) -> None:
        """Keep logit_scale within the bound that CLIP was trained with; SigLIP was trained without."""
        self.weights_changed()
        if self.network.head is None and not self.network.with_bias:
            with torch.no_grad():
                self.clip.model.logit_scale.clamp_(max=self._max_logit_scale)

    def log_row(self) -> dict[str, float]:
        """Return the temperature of the logits, and their bias."""
        bias = {"logit_bias": float(self.clip.model.logit_bias.detach())} if self.network.with_bias else {}
        return {"logit_scale": float(self.clip.model.logit_scale.detach().exp())} | bias

    def computed(self) -> Tensor | None:
        """Return the zero-shot head of the weights in place; None: not computed yet."""
        return self._class_columns

    def weights_changed(self, computed: Tensor | None = None) -> None:
        """Forget the zero-shot head of the former weights."""
        self._class_columns = computed

    def predictor(self, *, precision: str = "no", lowered: bool = False) -> Predictor:
        """Return class logits: over the classes' captions in all templates (zero-shot head), or of the linear head."""
        embed, logits = self.embedder(precision=precision, lowered=lowered), self.class_logits()
        return lambda inputs: logits(embed(inputs))

    def embedder(self, *, precision: str = "no", lowered: bool = False) -> Predictor:
        """Return image embeddings [N, D] of length one, float32, in evaluation mode (arguments as of `predictor`)."""
        network = self.network
        network.eval()
        device = next(network.parameters()).device

        @torch.no_grad()
        def embed_batch(inputs: Tensor) -> Tensor:
            with autocast(device, precision):
                hidden = inputs.to(device, non_blocking=True)
                features_BD = network.tower(hidden if lowered else network.lower(hidden))
            return normalize(features_BD.float(), dim=-1)

        return embed_batch

    def class_logits(self) -> Predictor:
        """Return class logits [N, K] of embeddings [N, D] with the weights in place."""
        columns_KD, scale, bias = self.class_head()

        @torch.no_grad()
        def logits_of(features_BD: Tensor) -> Tensor:
            features_BD = features_BD.to(columns_KD.device)
            return Outputs(features_BD, features_BD, columns_KD, scale, bias).logits()

        return logits_of

    def class_head(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return columns [K, D], scale and bias of the classes."""
        head, model = self.network.head, self.clip.model
        if head is not None:
            weight = head.weight.detach().float()
            return weight, weight.new_ones(()), head.bias.detach().float()
        if self._class_columns is None:
            key = text_digest(self.clip.model)
            if self._head is None or self._head[0] != key:
                self._head = key, zero_shot_head(self.clip, self.dataset.class_names, self.dataset.templates)
            self._class_columns = self._head[1]
        columns_KD = self._class_columns
        return columns_KD, model.logit_scale.detach().float().exp(), columns_KD.new_zeros(())


class LinearClipTask(ClipTask):
    """CLIP's image tower with a linear head, which starts as the zero-shot classifier."""

    files: ClassVar[tuple[str, ...]] = (*ClipTask.files, HEAD)
    has_fixed_classes = True

    def __init__(self, clip: Clip, network: ClipNetwork, dataset: Dataset, config: Config) -> None:
        super().__init__(clip, network, dataset, config)
        self._initial: dict[str, Tensor] = {}

    @classmethod
    def build(cls, inputs: TaskInputs) -> LinearClipTask:
        """Return CLIP with a linear head, new or as a run left it.

        Raises:
            RunError: the run's head has other tensors, or another number of classes than the dataset.
        """
        clip, dataset = cls._load(inputs), inputs.dataset
        width = clip.model.encode_text(clip.tokenizer(["a"]).to(inputs.device)).shape[1]
        head = nn.Linear(width, dataset.num_classes).to(inputs.device)
        network = ClipNetwork(clip.model, num_frozen=frozen_blocks(inputs.config, clip), head=head, fixed=clip.fixed)
        task = cls(clip, network, dataset, inputs.config)
        with torch.no_grad():
            if inputs.run is None:
                head.weight.copy_(clip.model.logit_scale.exp() * zero_shot_head(clip, dataset.class_names, dataset.templates))
                head.bias.zero_()
                task._initial = {"weight": head.weight.clone(), "bias": head.bias.clone()}
            else:
                stored = read_head(inputs.run / HEAD, dataset.num_classes)
                head.weight.copy_(stored["weight"])
                head.bias.copy_(stored["bias"])
                task._initial = {name: stored[f"initial_{name}"] for name in ("weight", "bias")}
        task.notes += with_adapter(network, inputs)
        return task

    def save(self, model: Path, run: Path) -> None:
        """Write RUN/model and RUN/head.safetensors, which also holds the head as it started."""
        from safetensors.torch import save_file

        super().save(model, run)
        head = self.network.head
        assert head is not None
        tensors = {"weight": head.weight, "bias": head.bias, **{f"initial_{name}": v for name, v in self._initial.items()}}
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, run / HEAD)

    def initial_state(self) -> dict[str, Tensor] | None:
        """Load the pretrained weights, and the zero-shot classifier as the head's start."""
        return (super().initial_state() or {}) | {f"head.{name}": value for name, value in self._initial.items()}


def read_head(path: Path, num_classes: int) -> dict[str, Any]:
    """Read a linear head: weight, bias, initial_weight, initial_bias.

    Raises:
        RunError: it has other tensors, or another number of classes than the dataset.
    """
    tensors = read_tensors(path, "copy the run again, or train again")
    missing = {"weight", "bias", "initial_weight", "initial_bias"} - tensors.keys()
    if missing:
        raise RunError(f"{path} has no tensor '{min(missing)}': it was not written by this version of `train`; train again")
    if len(tensors["weight"]) != num_classes:
        raise RunError(
            f"{path} has {len(tensors['weight'])} classes, but the dataset has {num_classes}: evaluate on the data that the run "
            "was trained on, without --set data.*"
        )
    return tensors
