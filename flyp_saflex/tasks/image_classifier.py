"""Image classifiers of torchvision and timm as a task (`train.method = "image-classifier"`), from scratch or pretrained.

The last linear layer becomes the head; everything before it is the trunk. A ResNet may have a 3x3 stem without pooling, for
images of 28 px, and fewer channels.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchvision import models, transforms
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from flyp_saflex.clip.model import RANDOM
from flyp_saflex.config import Config, DataConfig
from flyp_saflex.errors import ConfigError, ModelError, nearest
from flyp_saflex.images.reader import Source, open_reader
from flyp_saflex.network_options import NetworkConfig
from flyp_saflex.records import Dataset, Sample
from flyp_saflex.tasks.clip_options import notes_without_clip
from flyp_saflex.tasks.network import Network
from flyp_saflex.tasks.task import Task, TaskInputs
from flyp_saflex.user_text import quoted

TIMM = "timm:"
USUAL_WIDTH = 64
PLAIN = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of pixels for a network from scratch, medmnist's own."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageClassifierTask(Task):
    """A convolutional network or transformer with a linear head.

    Args:
        network: trunk and head.
        dataset: classes; its rows may be images.
        image_size_px: S.
        is_pretrained: whether pixels are normalised as for ImageNet.
    """

    def __init__(self, network: Network, dataset: Dataset, image_size_px: int, is_pretrained: bool) -> None:
        super().__init__(network, dataset)
        self.input_size_px = image_size_px
        self.mean, self.std = IMAGENET if is_pretrained else PLAIN

    @classmethod
    def build(cls, inputs: TaskInputs) -> ImageClassifierTask:
        """Return the network of a recipe, or of a run.

        Raises:
            ConfigError: no such model, options that it does not have, or a dataset without images.
            ModelError: pretrained weights that cannot be had.
        """
        config, dataset, is_pretrained = inputs.config, inputs.dataset, inputs.config.model.pretrained != RANDOM
        trunk, width = trunk_of(inputs)
        network = Network(trunk, head=nn.Linear(width, dataset.num_classes))
        task = cls(network, dataset, config.network.image_size_px, is_pretrained)
        task.take_up(inputs)
        return task

    def take_up(self, inputs: TaskInputs) -> None:
        """Load a run's weights if there is a run, note what a person should know, go to the device."""
        config = inputs.config
        if inputs.run is not None:
            self.load_weights(inputs.run)
        elif (
            config.model.pretrained == RANDOM
            and config.train.freeze_batchnorm
            and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.network.modules())
        ):
            self.notes.append(
                "train.freeze_batchnorm = true leaves BatchNorm's untrained statistics as they are: set it to false from scratch"
            )
        self.notes += notes_without_clip(config.train)
        self.network.to(inputs.device)

    def source(self, data: DataConfig, samples: Sequence[Sample]) -> Source:
        """Return the reader of images: resized, cut to a square, normalised."""
        size = self.input_size_px
        transform = transforms.Compose(
            [
                transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )
        settings = {"size": size, "mode": "RGB", "mean": self.mean, "std": self.std, "interpolation": "bicubic"}
        return open_reader(data, transform, settings, samples, rows=self.dataset.rows)


def trunk_of(inputs: TaskInputs) -> tuple[nn.Module, int]:
    """Return the recipe's model without its head, and the width of its pooled features.

    Raises:
        ConfigError: no such model, options that it does not have, or a dataset without images.
        ModelError: pretrained weights that cannot be had.
    """
    config, is_pretrained = inputs.config, inputs.config.model.pretrained != RANDOM
    _check_images(inputs.dataset.rows, config)
    model = _with_options(_model(config, load=is_pretrained and inputs.run is None), config.network, is_pretrained)
    return without_head(model, config.model.name)


def _check_images(rows: Sequence[Any] | None, config: Config) -> None:
    if rows is not None and len(rows) and getattr(rows[0], "ndim", 0) < 2:
        raise ConfigError(
            f"train.method = {config.train.method} takes images, but data.name = {config.data.name} has rows of numbers: use mlp"
        )


def _model(config: Config, *, load: bool) -> nn.Module:
    """Return a model with its own head; pretrained weights are loaded where asked for."""
    name, weights = config.model.name, config.model.pretrained if load else None
    if name.startswith(TIMM):
        import timm

        known, plain = timm.list_models(), name.removeprefix(TIMM)
        if plain.partition(".")[0] not in known:
            raise ConfigError(f"model.name = {quoted(name)}: timm has no such model{nearest(plain, known)}")
        try:
            return timm.create_model(plain, pretrained=load, num_classes=1)
        except (RuntimeError, OSError, ValueError) as error:
            raise ModelError(_lost(name, error)) from None
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(
            f"model.name = {quoted(name)}: expected a classifier of torchvision, or timm:NAME{nearest(name, known)} (for example "
            "resnet18)"
        )
    try:
        return models.get_model(name, weights=weights or None)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ModelError(_lost(name, error)) from None


def _lost(name: str, error: Exception) -> str:
    return (
        f"model.pretrained: weights of {quoted(name)} cannot be had ({quoted(str(error))}): correct the tag, or set "
        f"model.pretrained={RANDOM}"
    )


def _with_options(model: nn.Module, options: NetworkConfig, is_pretrained: bool) -> nn.Module:
    """Give a ResNet its stem and width; refuse a width that another model does not have."""
    if not isinstance(model, ResNet):
        if options.width != USUAL_WIDTH:
            raise ConfigError(
                f"network.width = {options.width} is an option of torchvision's ResNets alone: leave it at {USUAL_WIDTH}"
            )
        return model
    if options.width != USUAL_WIDTH:
        if is_pretrained:
            raise ConfigError(
                f"network.width = {options.width}: there are no pretrained weights of this width: set "
                f"network.width={USUAL_WIDTH} or model.pretrained={RANDOM}"
            )
        _rebuild(model, options.width)
    if options.stem == "small":
        channels = model.conv1.out_channels
        model.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def _rebuild(model: ResNet, width: int) -> None:
    """Replace a ResNet's layers by ones of another width, initialised as torchvision does."""
    block: type[BasicBlock | Bottleneck] = type(model.layer1[0])
    depths = [len(layer) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
    model.inplanes = width
    model.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    for number, depth in enumerate(depths):
        layer = model._make_layer(block, width * 2**number, depth, stride=1 if number == 0 else 2)
        setattr(model, f"layer{number + 1}", layer)
    model.fc = nn.Linear(8 * width * block.expansion, 1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def without_head(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    """Return the model without its last linear layer, and that layer's input width.

    Raises:
        ConfigError: the model does not end in a linear layer.
    """
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if linear:
        path, head = linear[-1]
        owner, _, last = path.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Identity())
        return model, head.in_features
    raise ConfigError(f"model.name = {quoted(name)} does not end in a linear layer: use another model, such as resnet18")
