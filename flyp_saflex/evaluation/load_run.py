"""The model of a finished run: is it there, load it (floor 3, shared by stages)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flyp_saflex.clip.model import ImageTower, load_clip, num_blocks
from flyp_saflex.config import LINEAR_METHODS, Config
from flyp_saflex.errors import RunError
from flyp_saflex.evaluation.weight_averaging import WiseModel
from flyp_saflex.records import Dataset
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tasks.feature_cache import frozen_blocks


def load_model(
    run: Path, config: Config, dataset: Dataset, *, alphas: Sequence[float] = (1.0,), device: torch.device | str = "cpu"
) -> WiseModel:
    """Load a run's model, and what it started from if one of the alphas is below 1.

    Raises:
        ModelError: weights that cannot be had, or a pretrained model of another architecture.
        RunError: a head that does not fit the dataset.
    """
    clip = load_clip(f"local-dir:{run / 'model'}", device=device)
    start = None
    if any(alpha != 1 for alpha in alphas):
        start = load_clip(config.model.name, config.model.pretrained).model.state_dict()
    head = read_head(run / "head.safetensors", dataset.num_classes) if config.train.method in LINEAR_METHODS else None
    tower = ImageTower(clip.model.visual, frozen_blocks(config, clip))
    is_cut = config.train.frozen_cache or (start is not None and _is_shared(tower, start))
    return WiseModel(
        clip,
        dataset.class_names,
        dataset.templates,
        pretrained=start,
        head=head,
        precision=config.train.precision,
        tower=tower if is_cut else None,
    )


def _is_shared(tower: ImageTower, start: Mapping[str, Tensor]) -> bool:
    """Return whether the image tower was frozen up to its pooling, so that it is one and the same for every alpha.

    Cut further down it would be the same up to there, but a thousand activations in the middle of a tower can be many times
    as large as the images.
    """
    if not tower.num_frozen or tower.num_frozen < num_blocks(tower.visual):
        return False
    frozen = {id(parameter) for parameter in tower.frozen_parameters()}
    return all(
        torch.equal(value.detach().cpu(), start[f"visual.{name}"].cpu())
        for name, value in tower.visual.state_dict(keep_vars=True).items()
        if (id(value) in frozen or not isinstance(value, torch.nn.Parameter)) and f"visual.{name}" in start
    )


def read_head(path: Path, num_classes: int) -> dict[str, Tensor]:
    """Read a linear head: weight, bias, initial_weight, initial_bias.

    Raises:
        RunError: it has other tensors, or another number of classes than the dataset.
    """
    from safetensors.torch import load_file

    tensors = load_file(path)
    missing = {"weight", "bias", "initial_weight", "initial_bias"} - tensors.keys()
    if missing:
        raise RunError(f"{path} has no tensor '{min(missing)}': it was not written by this version of `train`; train again")
    if len(tensors["weight"]) != num_classes:
        raise RunError(
            f"{path} has {len(tensors['weight'])} classes, but the dataset has {num_classes}: evaluate on the data that the run "
            "was trained on, without --set data.*"
        )
    return tensors


def check_model(folder: RunDir, config: Config) -> None:
    """Check that the run's model is there.

    Raises:
        RunError: it is not; says how to go on.
    """
    needed = ["model/open_clip_config.json", "model/open_clip_model.safetensors"]
    if config.train.method in LINEAR_METHODS:
        needed.append("head.safetensors")
    for name in needed:
        if not (folder.path / name).is_file():
            raise RunError(
                f"run {folder.path} has no {name}: its training has not finished; go on with "
                f"`flyp-saflex train {folder.path / 'config.toml'} --run-dir {folder.path} --resume`"
            )
