"""Prediction files of WILDS' leaderboard: one class index per line, in the official order of a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.evaluation.scoring import Scored
from flyp_saflex.records import Dataset, Split
from flyp_saflex.storage.files import atomic_write

FOLDER = "wilds-submission"
SPLITS = ("val", "test", "id_val", "id_test")
"""Splits whose predictions the leaderboard asks for."""


def check_submission(config: Config, dataset: Dataset, todo: Sequence[Split], *, limit: int | None) -> None:
    """Check that a run may be submitted, before anything is computed.

    Raises:
        ConfigError: another dataset, a part of the images, training images beyond the official split, or SAFLEX's validation
            gradient from an OOD split, which the leaderboard permits for selection only.
    """
    if config.data.name != "iwildcam":
        raise ConfigError(f"--wilds-submission: data.name = {config.data.name}, expected iwildcam")
    if missing := [name for name in SPLITS if name not in {split.name for split in todo}]:
        raise ConfigError(f"--wilds-submission: {', '.join(missing)} not evaluated, expected {', '.join(SPLITS)}; drop --split")
    if limit is not None:
        raise ConfigError(f"--wilds-submission: --limit {limit} leaves images out, expected every image; drop --limit")
    if config.data.add_to_train:
        raise ConfigError(
            f"--wilds-submission: the run was trained on data.add_to_train = {', '.join(config.data.add_to_train)}, which the "
            "leaderboard does not permit; train without it"
        )
    split = dataset.splits.get(config.saflex.validation_split)
    takes_it = config.saflex.enabled and config.saflex.gradient_rows == "validation"
    if takes_it and split is not None and split.shift == "ood":
        raise ConfigError(
            f"--wilds-submission: SAFLEX took its validation gradient from the OOD split '{split.name}', which the leaderboard "
            "permits for model selection only; train with saflex.validation_split=id_val"
        )


def write_submission(run: Path, seed: int, split: Split, scored: Scored) -> None:
    """Write the predictions of one split as WILDS' `evaluate.py` reads them.

    Args:
        run: run folder.
        seed: replicate of the submission.
        split: in the official order.
        scored: predictions on all of its images.

    Raises:
        DataError: images could not be read, so that predictions are missing.
    """
    if split.name not in SPLITS:
        return
    if len(scored.samples) < len(split):
        raise DataError(
            f"--wilds-submission: {len(split) - len(scored.samples)} images of '{split.name}' cannot be read, but every image "
            "needs a prediction; copy them again"
        )
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    with atomic_write(folder / f"iwildcam_split:{split.name}_seed:{seed}_epoch:best_pred.csv") as file:
        file.writelines(f"{label}\n" for label in scored.predictions_N.tolist())
