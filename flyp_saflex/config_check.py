"""Combinations of options that cannot work (floor 0; imports no torch)."""

from __future__ import annotations

from flyp_saflex.config import Config


def check(config: Config) -> list[str]:
    """Return one line per combination of options that cannot work, naming both options and the fix."""
    problems = []
    train, saflex, augment = config.train, config.saflex, config.augment
    if saflex.enabled and not augment.upstream:
        problems.append(
            "saflex.enabled is true but augment.upstream is empty, so there is nothing to weigh: set augment.upstream "
            '(["cache"], ["randaugment"], ...) or saflex.enabled=false'
        )
    if augment.filter == "scores" and "cache" not in augment.upstream:
        problems.append('augment.filter = "scores" needs edits: add "cache" to augment.upstream or set augment.filter="none"')
    if "cache" in augment.upstream[1:]:
        problems.append('augment.upstream: "cache" must come first, the operations after it are applied to its images')
    if train.batch_size % train.accumulation:
        problems.append(
            f"train.batch_size = {train.batch_size} is not a multiple of train.accumulation = {train.accumulation}: "
            "change one of them"
        )
    if train.freeze_image and train.freeze_text and train.method in ("flyp", "ce-text"):
        problems.append(
            f"train.freeze_image and train.freeze_text leave train.method = {train.method} nothing to train but logit_scale: "
            "unfreeze one or use train.method=linear-probe"
        )
    if saflex.select == "always" and not (saflex.enabled or augment.filter in ("argmax", "lowest-loss", "random")):
        problems.append(
            'saflex.select = "always", but nothing is dropped while training with saflex.enabled = false and '
            f'augment.filter = "{augment.filter}": set saflex.select="auto" or saflex.enabled=true'
        )
    if saflex.select == "always" and (train.freeze_image or train.method == "linear-probe"):
        frozen = "train.freeze_image = true" if train.freeze_image else "train.method = linear-probe"
        problems.append(
            f'saflex.select = "always" saves backward passes of images, but {frozen} leaves none: set saflex.select="auto"'
        )
    if train.frozen_cache and (augment.on_train or any(name != "cache" for name in augment.upstream)):
        problems.append(
            "train.frozen_cache holds fixed activations, but augment.on_train or augment.upstream changes images at random: "
            'set augment.on_train=[] and augment.upstream=[] or ["cache"], or train.frozen_cache=""'
        )
    if train.frozen_cache and not train.freeze_batchnorm:
        problems.append("train.frozen_cache needs train.freeze_batchnorm=true: with batch statistics nothing is fixed")
    if train.frozen_cache and not (train.freeze_image_blocks or train.freeze_image or train.method == "linear-probe"):
        problems.append("train.frozen_cache needs frozen image blocks: set train.freeze_image_blocks or train.freeze_image")
    splits = set(config.data.add_to_train)
    for option, value in (("train.select_split", train.select_split), ("saflex.validation_split", saflex.validation_split)):
        used = value and (option.startswith("train") or saflex.enabled)
        if used and value in splits:
            problems.append(f"{option} = {value} is also in data.add_to_train: a split that is trained on selects nothing")
    return problems
