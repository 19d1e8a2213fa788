"""Options of a recipe whose meaning depends on the CLIP model: frozen image blocks, training loss."""

from __future__ import annotations

from flyp_saflex.clip.image_tower import num_blocks
from flyp_saflex.clip.lora import add_lora, is_adapter
from flyp_saflex.clip.model import Clip
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError
from flyp_saflex.tables import METHODS, OBJECTIVES
from flyp_saflex.tasks.clip_network import ClipNetwork
from flyp_saflex.tasks.task import TaskInputs


def frozen_blocks(config: Config, clip: Clip) -> int:
    """Return the number of frozen image blocks: all of them where the image tower is not trained."""
    train = config.train
    whole = train.freeze_image or METHODS[train.method].only_head
    return num_blocks(clip.model.visual) if whole else train.freeze_image_blocks


def objective_name(config: Config, clip: Clip) -> str:
    """Return the name of the training loss; left open, a model with `logit_bias` keeps the loss of its pretraining.

    Raises:
        ConfigError: a loss that is no softmax of the logits, for a model without `logit_bias`.
    """
    train, has_bias = config.train, clip.model.logit_bias is not None
    usual = METHODS[train.method].objective
    name = train.objective or ("sigmoid" if usual == "contrastive" and has_bias else usual)
    if not OBJECTIVES[name].is_softmax and not has_bias:
        raise ConfigError(
            f"train.objective = {name}: expected a model with logit_bias (SigLIP), but {config.model.name} has none: set "
            "train.objective=contrastive or leave it empty"
        )
    return name


def reads_bias(config: Config, clip: Clip) -> bool:
    """Return whether the training loss sees a bias on all logits."""
    return not OBJECTIVES[objective_name(config, clip)].is_softmax


def with_adapter(network: ClipNetwork, inputs: TaskInputs) -> list[str]:
    """Add LoRA to the towers that the recipe trains, if it asks for it; a run's model has it merged.

    Args:
        network: with the weights that training starts from.
        inputs: with `train.adapter`, `train.lora_...` and `train.freeze_...`.

    Returns:
        A note on what is trained; nothing without an adapter.

    Raises:
        ModelError: a trained tower without a layer to adapt.
        ConfigError: every layer is frozen.
    """
    train, model = inputs.config.train, network.clip
    if train.adapter == "none" or inputs.run is not None:
        return []
    towers = {} if train.freeze_image else {"image": model.visual}
    if not train.freeze_text and network.head is None:
        towers["text"] = getattr(model, "text", None) or model.transformer
    fixed = frozenset(id(parameter) for parameter in network.tower.frozen_parameters())
    count = add_lora(towers, rank=train.lora_rank, alpha=train.lora_alpha, targets=train.lora_targets, fixed=fixed)
    if not count:
        raise ConfigError('train.adapter = "lora": every layer is frozen: unfreeze a tower, or set train.adapter=none')
    network.adapts = True
    trained = sum(parameter.numel() for name, parameter in network.named_parameters() if is_adapter(name))
    total = sum(parameter.numel() for parameter in network.parameters()) - trained
    return [
        f"LoRA of rank {train.lora_rank} on {count} matrices ({' and '.join(towers)} tower): {trained:,} parameters are trained "
        f"beside {total:,}"
    ]
