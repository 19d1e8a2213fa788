"""Options of a recipe whose meaning depends on the CLIP model: frozen image blocks, training loss."""

from __future__ import annotations

from flyp_saflex.clip.image_tower import num_blocks
from flyp_saflex.clip.model import Clip
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError
from flyp_saflex.tables import METHODS, OBJECTIVES


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
