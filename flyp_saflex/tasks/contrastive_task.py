"""Contrastive learning without labels as a task (`train.method = "contrastive-images"`), scored by a linear probe.

The training row of an image and its augmented row are two views of it; NT-Xent (SAFLEX, Eq. 12) tells them apart from the other
views of the batch. SAFLEX learns a weight and a soft label over those views for every augmented view, so as to lower NT-Xent on
pairs of held-out images. Labels enter in the probe alone: logistic regression on the frozen features of the training split.

Shapes: N images, K classes, F pooled width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flyp_saflex.clip.model import RANDOM
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, DataError, RunError
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.records import Dataset, Edit, Sample
from flyp_saflex.tables import UPSTREAMS
from flyp_saflex.tasks.image_classifier import ImageClassifierTask, trunk_of
from flyp_saflex.tasks.label_space import Gather, LabelSpace, Rows, ValidationSpace
from flyp_saflex.tasks.task import Over, Predictor, TaskInputs, autocast, read_tensors
from flyp_saflex.tasks.view_network import ViewNetwork, pair_space, view_space

PROBE = "probe.safetensors"
ABSENT = -100.0
"""Logit of a class that no training image has."""


class ContrastiveTask(ImageClassifierTask):
    """An image network trained on two views of each image.

    Args:
        network: trunk and projection.
        dataset: images; its labels are the probe's alone.
        config: the recipe.
    """

    files: ClassVar[tuple[str, ...]] = (*ImageClassifierTask.files, f"model/{PROBE}")
    num_views: ClassVar[int] = 2

    def __init__(self, network: ViewNetwork, dataset: Dataset, config: Config) -> None:
        super().__init__(network, dataset, config.network.image_size_px, config.model.pretrained != RANDOM)
        self.config = config
        self._probe: tuple[Tensor, Tensor] | None = None
        self._is_stored = False

    @classmethod
    def build(cls, inputs: TaskInputs) -> ContrastiveTask:
        """Return the network of a recipe, or of a run with its probe.

        Raises:
            ConfigError: augmentation that does not make pairs of views, or no such model.
            RunError: the run's probe is of another dataset.
        """
        config = inputs.config
        _check_views(config)
        trunk, width = trunk_of(inputs)
        network = ViewNetwork(trunk, width, config.network.projection, config.network.contrast_temperature)
        task = cls(network, inputs.dataset, config)
        task.take_up(inputs)
        if inputs.run is not None:
            task._load_probe(inputs.run / "model" / PROBE, width)
        return task

    def save(self, model: Path, run: Path) -> None:
        """Write the weights, and the probe on their features."""
        from safetensors.torch import save_file

        super().save(model, run)
        weight_KF, bias_K = self.probe()
        save_file({"weight": weight_KF.cpu().contiguous(), "bias": bias_K.cpu().contiguous()}, model / PROBE)

    def _load_probe(self, path: Path, width: int) -> None:
        stored, shape = read_tensors(path, "train again"), (self.dataset.num_classes, width)
        found = stored["weight"].shape if "weight" in stored else ()
        if tuple(found) != shape or "bias" not in stored:
            raise RunError(
                f"{path} is a probe of the shape {list(found)}, expected {list(shape)} (classes, features): evaluate on the data "
                "that the run was trained on"
            )
        device = next(self.network.parameters()).device
        self._probe, self._is_stored = (stored["weight"].to(device), stored["bias"].to(device)), True

    # Labels

    def label_of(self, item: Sample | Edit) -> int:
        """Return 0: training knows no classes."""
        return 0

    def label_space(self, rows: Rows, over: Over, seed: int, gather: Gather) -> LabelSpace:
        """Return every view's other views as its proxy classes."""
        return view_space(rows, gather)

    def validation_space(self, captions_V: Tensor) -> ValidationSpace:
        """Return the label space of pairs of views of held-out images."""
        return pair_space(len(captions_V), captions_V.device)

    def class_of(self, label: int, over: Over) -> int | None:
        """Return None: a view names no class."""
        return None

    # Scores

    def after_step(self) -> None:
        """Forget the probe of the former weights."""
        self.weights_changed()

    def computed(self) -> tuple[Tensor, Tensor] | None:
        """Return the probe of the weights in place; None: not fitted yet."""
        return self._probe

    def weights_changed(self, computed: Any = None) -> None:
        """Forget the probe of the former weights."""
        self._probe = computed

    def predictor(self, *, precision: str = "no", lowered: bool = False) -> Predictor:
        """Return class logits of the linear probe, in evaluation mode."""
        weight_KF, bias_K = self.probe()
        return lambda inputs: self._features(inputs, precision) @ weight_KF.T + bias_K

    def probe(self) -> tuple[Tensor, Tensor]:
        """Return weight [K, F] and bias [K] of logistic regression on the training split's features, fitted if need be.

        Raises:
            DataError: the training split has images of one class only.
        """
        if self._probe is None:
            features_NF, labels_N = self._training_features()
            weight_KF, bias_K = fit_probe(features_NF, labels_N, self.dataset.num_classes)
            device = next(self.network.parameters()).device
            self._probe = torch.from_numpy(weight_KF).to(device), torch.from_numpy(bias_K).to(device)
        return self._probe

    @torch.no_grad()
    def _features(self, images_BCHW: Tensor, precision: str = "no") -> Tensor:
        self.network.eval()
        device = next(self.network.parameters()).device
        with autocast(device, precision):
            return self.network.pool(images_BCHW.to(device, non_blocking=True)).float()

    def _training_features(self) -> tuple[np.ndarray, np.ndarray]:
        data, samples = self.config.data, self.dataset.train.samples
        loader = ImageLoader(
            self.source(data, samples),
            batch_size=self.config.evaluate.batch_size,
            workers=data.workers,
            max_unreadable=data.max_unreadable,
            box_crop=data.box_crop,
        )
        read = [(positions, self._features(images).cpu()) for positions, images in loader.batches(samples)]
        labels = [samples[position].label for positions, _ in read for position in positions]
        return torch.cat([features for _, features in read]).numpy(), np.array(labels)


def fit_probe(features_NF: np.ndarray, labels_N: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [K, F] and bias [K], float32, of logistic regression on standardised features (C = 1).

    Args:
        features_NF: frozen features.
        labels_N: classes.
        num_classes: K; a class without a row has the logit `ABSENT`.

    Raises:
        DataError: the rows are of one class.
    """
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels_N)) < 2:
        raise DataError("the linear probe needs training images of two classes or more, but all have one label: check the labels")
    features_NF = features_NF.astype(np.float64)
    mean_F, std_F = features_NF.mean(axis=0), features_NF.std(axis=0)
    std_F[std_F < 1e-6 * (1 + abs(mean_F))] = 1.0  # a feature that is always the same tells nothing
    model = LogisticRegression(C=1.0, max_iter=5000).fit((features_NF - mean_F) / std_F, labels_N)
    found_KF, found_K = model.coef_ / std_F, model.intercept_
    if len(found_KF) == 1:  # of two classes scikit-learn gives the second one's
        found_KF, found_K = np.concatenate([0 * found_KF, found_KF]), np.concatenate([0 * found_K, found_K])
    weight_KF, bias_K = np.zeros((num_classes, features_NF.shape[1])), np.full(num_classes, ABSENT)
    weight_KF[model.classes_], bias_K[model.classes_] = found_KF, found_K - found_KF @ mean_F
    return weight_KF.astype(np.float32), bias_K.astype(np.float32)


def _check_views(config: Config) -> None:
    """Refuse augmentation that does not give every image two views of its own."""
    augment, method = config.augment, config.train.method
    told = f"train.method = {method} compares two views of every image"
    if not augment.on_train or not augment.upstream:
        empty = "augment.upstream" if augment.on_train else "augment.on_train"
        raise ConfigError(f"{told}, but {empty} is empty: set it, for example {empty}=random-crop")
    if augment.per_train != 1:
        raise ConfigError(f"{told}, but augment.per_train = {augment.per_train:g}: set augment.per_train=1")
    for name in augment.upstream:
        upstream = UPSTREAMS[name]
        if upstream.is_pool or upstream.mix is not None or upstream.confidence is not None:
            raise ConfigError(
                f"{told}, but augment.upstream has '{name}', which edits, mixes or softens labels: use operations on an image, "
                "such as randaugment or translate"
            )
