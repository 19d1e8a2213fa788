"""Hardness of training images, from the predictions of a run on its own training split (`editor.plan = "hard"`).

    hardness = confidence of a wrong prediction, or minus the confidence of a right one: -1 .. 1

`flyp-saflex evaluate RUN --split train` writes the predictions. A run knows the images that it was trained on, so few of them are
hard for it: a zero-shot run (no steps) or a linear probe tells more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flyp_saflex.errors import ConfigError, DataError, RunError
from flyp_saflex.records import Dataset
from flyp_saflex.storage.data_record import difference, read_record, record_of
from flyp_saflex.user_text import quoted


@dataclass(frozen=True, slots=True)
class Hardness:
    """Hardness by `sample_id`, -1 .. 1, and a digest of it."""

    scores: Mapping[str, float]
    digest: str


def read_hardness(run: Path, dataset: Dataset) -> Hardness:
    """Return the hardness of the training images by a run.

    Args:
        run: `editor.hard_run`.
        dataset: of the recipe.

    Raises:
        ConfigError: no run is given.
        RunError: the folder is no run, or has no predictions of the training split.
        DataError: the run was trained on other data.
    """
    if run == Path():
        raise ConfigError(
            "editor.plan = hard needs editor.hard_run, the folder of a run whose predictions tell hard images: train one on the "
            "clean images, or use editor.plan=quota"
        )
    record, path = read_record(run), run / "predictions" / "train.parquet"
    if record is None:
        raise RunError(f"editor.hard_run = {run} has no data.json: give the folder of a run that `flyp-saflex train` wrote")
    if changed := difference(record, record_of(dataset), ("train",), sizes=False):
        raise DataError(
            f"editor.hard_run = {run} was trained on other data ({changed}): give a run on this data, or correct data.root"
        )
    if not path.is_file():
        raise RunError(
            f"editor.hard_run = {run} has no predictions of the training images: run `flyp-saflex evaluate {run} --split train`"
        )
    rows = _predictions(path)
    scores = {name: confidence if label != found else -confidence for name, label, found, confidence in rows}
    missing = [name for name in dataset.train.sample_ids if name not in scores]
    if len(missing) > len(dataset.train) / 2:  # predictions of a quick look
        raise RunError(
            f"{path} has predictions of only {len(scores)} training images, and none of '{quoted(missing[0])}': run "
            f"`flyp-saflex evaluate {run} --split train` without --limit"
        )
    lines = "\n".join(f"{name}\0{score:.6f}" for name, score in sorted(scores.items()))
    return Hardness(scores, hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:16])


def _predictions(path: Path) -> list[tuple[str, int, int, float]]:
    """Return image, class, predicted class and its confidence of every row of the finetuned model (alpha 1)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("sample_id", "label", "prediction", "confidence", "alpha")
    try:
        table = pq.read_table(path, columns=list(names))
        rows = zip(*(table.column(name).to_pylist() for name in names), strict=True)
        return [(str(name), int(a), int(b), float(part)) for name, a, b, part, alpha in rows if alpha == 1]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} is not what evaluate writes ({quoted(str(error))}): delete it and evaluate the run again"
        ) from None
