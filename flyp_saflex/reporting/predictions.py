"""Predictions of runs, read from predictions/<split>.parquet for the page: confusions, reliability, confident mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flyp_saflex.evaluation.calibration import Bin, reliability
from flyp_saflex.reporting.runs import Run

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction of one model.

    Attributes:
        sample_id: the image.
        label: name of its class.
        prediction: name of the predicted class.
        confidence: probability of the prediction, 0..1.
    """

    sample_id: str
    label: str
    prediction: str
    confidence: float


def confusions(run: Run, split: str, alpha: float = 1.0) -> Counter[tuple[str, str]]:
    """Count the mistakes on one split as (class, predicted class); empty without predictions."""
    table = _read(run, split, ["label", "prediction", "label_name", "prediction_name"], alpha)
    if table is None:
        return Counter()
    counts = _wrong(table).group_by(["label_name", "prediction_name"]).aggregate([([], "count_all")]).to_pydict()
    pairs = zip(counts["label_name"], counts["prediction_name"], strict=True)
    return Counter(dict(zip(pairs, counts["count_all"], strict=True)))


def reliability_of(runs: Sequence[Run], split: str) -> list[Bin]:
    """Return the reliability of the finetuned models on a split, all seeds' images together; empty without predictions."""
    confidences: list[float] = []
    correct: list[bool] = []
    for run in runs:
        table = _read(run, split, ["label", "prediction", "confidence"], 1.0)
        if table is not None:
            confidences += table["confidence"].to_pylist()
            correct += [a == b for a, b in zip(table["label"].to_pylist(), table["prediction"].to_pylist(), strict=True)]
    return reliability(confidences, correct) if confidences else []


def confident_mistakes(run: Run, split: str, *, per_class: int, most_classes: int) -> list[Mistake]:
    """Return the most confident wrong predictions of the finetuned model, class after class.

    Args:
        run: its predictions are read.
        split: name of the split.
        per_class: most mistakes of one class (the image's own).
        most_classes: most classes: those with the most mistakes first.
    """
    columns = ["sample_id", "label", "prediction", "label_name", "prediction_name", "confidence"]
    table = _read(run, split, columns, 1.0)
    if table is None:
        return []
    rows = sorted(_wrong(table).to_pylist(), key=lambda row: (-row["confidence"], row["sample_id"]))
    counts = Counter(row["label"] for row in rows)
    classes = sorted(counts, key=lambda label: (-counts[label], label))[:most_classes]
    chosen = [row for label in classes for row in [row for row in rows if row["label"] == label][:per_class]]
    return [Mistake(row["sample_id"], row["label_name"], row["prediction_name"], float(row["confidence"])) for row in chosen]


def predicted_names(run: Run, split: str, sample_ids: Collection[str]) -> dict[str, str]:
    """Return the finetuned model's prediction of some images, by sample_id; those that it was not evaluated on are left out."""
    table = _read(run, split, ["sample_id", "prediction_name"], 1.0)
    if table is None:
        return {}
    import pyarrow as pa
    import pyarrow.compute as pc

    found = table.filter(pc.is_in(table["sample_id"], value_set=pa.array(sorted(sample_ids), type=pa.string()))).to_pydict()
    return dict(zip(found["sample_id"], found["prediction_name"], strict=True))


def _read(run: Run, split: str, columns: Sequence[str], alpha: float) -> pa.Table | None:
    """Return complete rows at one alpha; None where the file or a column is missing, or the file cannot be read."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = run.path / "predictions" / f"{split.replace('/', '%2F')}.parquet"
    try:
        table = pq.read_table(path, columns=[*columns, "alpha"])
    except (OSError, KeyError, pa.ArrowException):
        return None
    if not set(columns) < set(table.column_names):
        return None
    table = table.filter(pc.equal(table["alpha"], alpha)).drop_null()
    return table.filter(pc.is_finite(table["confidence"])) if "confidence" in columns else table


def _wrong(table: pa.Table) -> pa.Table:
    import pyarrow.compute as pc

    return table.filter(pc.not_equal(table["label"], table["prediction"]))
