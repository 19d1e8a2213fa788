"""Results of a run: results.json with one row per split and WiSE-FT alpha, tables and predictions.

    {"recipe", "seed", "results": [{"split", "role", "shift", "wise_alpha", "n", "accuracy", "macro_f1",
     "worst_group_accuracy", ...}], "select_split", "select_metric", "chosen_alpha", "forgetting"}

Metrics are fractions in 0..1. `chosen_alpha` is null unless several alphas were evaluated on the select split. `forgetting` is
there if `evaluate --on` limited it: `limit`, `sets`, and the largest loss of accuracy `by_alpha`.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flyp_saflex.errors import RunError
from flyp_saflex.storage.files import atomic_write, write_json
from flyp_saflex.tables import METRICS, Metric
from flyp_saflex.user_text import quoted

Row = dict[str, Any]


def read_results(run: Path, name: str = "results.json") -> dict[str, Any]:
    """Read results.json of a run, or its results on other data.

    Raises:
        RunError: the file is missing or invalid; the message names the command that writes it.
    """
    path = run / name
    command = f"run `flyp-saflex evaluate {run}`"
    if not path.is_file():
        raise RunError(f"run {run} has no {name}: {command} first")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for row in results["results"]:
            _ = str.strip(row["split"]), str.strip(row["role"]), str.strip(row["shift"]), operator.index(row["n"])
            _ = [math.floor(row[name]) for name in ("wise_alpha", "accuracy", "macro_f1")]  # refuses infinity and NaN
        _ = str(results["recipe"]), operator.index(results["seed"]), results.get("chosen_alpha")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RunError(
            f"{path} is not what evaluate writes ({type(error).__name__}: {quoted(str(error))}): delete it and {command} again"
        ) from None
    return dict(results)


class Results:
    """Results of one run, including rows of earlier evaluations.

    Args:
        run: run folder; an existing results.json is read.
        recipe: name of the recipe.
        seed: seed of the run.
        order: split names in reporting order.
        select_split: split that chooses alpha; empty: none, and an earlier choice remains.
        select_metric: metric that chooses alpha; larger is better.
        other: other data than the run's own: `on` (name), `fingerprint`, and what else is to be told. Its results, details and
            predictions lie beside the run's own, under that name.
    """

    def __init__(
        self,
        run: Path,
        *,
        recipe: str,
        seed: int,
        order: Sequence[str],
        select_split: str,
        select_metric: str,
        other: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.suffix = f"-on-{other['on']}" if other else ""
        self.values: dict[str, Any] = {"recipe": recipe, "seed": seed, **({"data": dict(other)} if other else {})}
        self.order = list(order)
        self.rows: list[Row] = []
        self._select = (select_split, select_metric)
        self._earlier: tuple[str, str] = ("", "")
        if self.path.is_file():
            old = read_results(run, self.path.name)
            self.rows = old["results"]
            self._earlier = (old.get("select_split") or "", old.get("select_metric") or select_metric)
            if isinstance(old.get("forgetting"), dict):
                self.values["forgetting"] = old["forgetting"]

    @property
    def path(self) -> Path:
        """File of the results."""
        return self.run / f"results{self.suffix}.json"

    def add(self, rows: Iterable[Row]) -> None:
        """Merge rows into the results.

        A row replaces the row of the same split and alpha. Rows of the same split at other alphas stay only if they were
        evaluated on the same images (equal `n`, `limit`, `overrides`), because alpha is chosen among them. Rows of other
        splits stay.
        """
        for new in rows:
            kept = [
                old for old in self.rows if old["split"] != new["split"] or (_images(old) == _images(new) and not _same(old, new))
            ]
            self.rows = [*kept, new]
        rank = {name: index for index, name in enumerate(self.order)}
        self.rows.sort(
            key=lambda row: (
                rank.get(row["split"], len(rank)),
                row["split"] if row["split"] not in rank else "",
                row["wise_alpha"],
            )
        )

    @property
    def chosen_alpha(self) -> float | None:
        """Alpha with the best metric on the select split, the larger one of a tie; None without a choice.

        Alphas that forget more than the limit are left out, and so are those whose forgetting was not measured.
        """
        split, metric = self._select if self._select[0] else self._earlier
        rows = [row for row in self.rows if row["split"] == split and row.get(metric) is not None]
        if len(rows) < 2 or rows[0]["role"] != "select":
            return None
        if forgetting := self.values.get("forgetting"):
            lost = {float(alpha): loss for alpha, loss in forgetting["by_alpha"].items()}
            rows = [row for row in rows if lost.get(row["wise_alpha"], math.inf) <= forgetting["limit"]]
            if not rows:
                return None
        sign = 1 if METRICS[metric].larger_is_better else -1
        return float(max(rows, key=lambda row: (sign * row[metric], row["wise_alpha"]))["wise_alpha"])

    def temperatures(self, split: str) -> dict[float, float]:
        """Return the temperatures that were fitted on a split, by alpha."""
        return {
            float(row["wise_alpha"]): float(row["temperature"])
            for row in self.rows
            if row["split"] == split and row.get("temperature")
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the content of results.json."""
        split, metric = self._select if self._select[0] else self._earlier
        return self.values | {
            "results": self.rows,
            "select_split": split,
            "select_metric": metric if split else "",
            "chosen_alpha": self.chosen_alpha,
        }

    def write(self) -> None:
        """Write results.json atomically."""
        write_json(self.path, self.as_dict())

    def write_details(self, split: str, details: Mapping[str, Any]) -> None:
        """Replace the part of one split in details.json: tables per class and per group, by alpha."""
        path = self.run / f"details{self.suffix}.json"
        try:
            everything = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError:
            everything = {}  # derived data: an unreadable file is written anew
        everything[split] = dict(details)
        write_json(path, everything)

    def write_predictions(self, split: str, columns: Mapping[str, Any]) -> None:
        """Write predictions/<split>.parquet with one row per image and alpha."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = self.run / f"predictions{self.suffix}"
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / f"{split.replace('/', '%2F')}.parquet", "wb") as file:
            pq.write_table(pa.table(dict(columns)), file)

    def table(self, splits: Sequence[str]) -> str:
        """Return the rows of the given splits as a text table; fractions in percent."""
        shown = [row for row in self.rows if row["split"] in splits]
        with_interval = {name for name in METRICS if any(f"{name}_interval" in row for row in shown)}
        head = ["split", "role", "shift", "alpha", "images"]
        for name in METRICS:
            head += [METRICS[name].short, *(["95 %"] if name in with_interval else [])]
        lines = [head]
        for row in shown:
            mark = "*" if row["wise_alpha"] == self.chosen_alpha else ""
            line = [row["split"], row["role"], row["shift"], f"{row['wise_alpha']:g}{mark}", str(row["n"])]
            for name in METRICS:
                line.append(METRICS[name].text(row.get(name)))
                if name in with_interval:
                    line.append(_interval(row.get(f"{name}_interval"), METRICS[name]))
            lines.append(line)
        text = align(lines)
        unreadable = {row["split"]: row["unreadable"] for row in self.rows if row["split"] in splits and row.get("unreadable")}
        if self.chosen_alpha is not None:
            text += f"\n* alpha chosen on {self.as_dict()['select_split']} by {self.as_dict()['select_metric']}"
            if forgetting := self.values.get("forgetting"):
                text += f", losing at most {percent(forgetting['limit'])} points on {', '.join(forgetting['sets'])}"
        for row in shown:
            if row.get("sequences") and row["wise_alpha"] in (1, self.chosen_alpha):
                bursts = row["sequences"]
                text += (
                    f"\nper burst on {row['split']} (alpha {row['wise_alpha']:g}): accuracy {percent(bursts['accuracy'])}, "
                    f"macro-F1 {percent(bursts['macro_f1'])}, {bursts['n']} bursts, {bursts['mixed']} with several labels"
                )
            if row.get("official") and row["wise_alpha"] in (1, self.chosen_alpha):
                numbers = ", ".join(f"{name} {percent(value)}" for name, value in row["official"].items())
                text += f"\nofficial evaluator on {row['split']} (alpha {row['wise_alpha']:g}): {numbers}"
            if row.get("temperature") and row["wise_alpha"] in (1, self.chosen_alpha):
                text += (
                    f"\ncalibration error on {row['split']} (alpha {row['wise_alpha']:g}): {percent(row['ece'])}, "
                    f"with temperature {row['temperature']:.3g} {percent(row['ece_calibrated'])}"
                )
        if unreadable:
            text += "\nunreadable images left out: " + ", ".join(f"{split} {n}" for split, n in unreadable.items())
        return text


def free_name(run: Path, name: str, fingerprint: str) -> str:
    """Return a name for the results on other data, longer than the given one where further data has that.

    Args:
        run: run folder.
        name: of the data, for example its folder.
        fingerprint: digest of the data.
    """
    short = re.sub(r"[^\w.-]+", "_", name)[:60].strip("._") or "other"
    if (run / f"results-on-{short}.json").is_file():
        known = read_results(run, f"results-on-{short}.json").get("data")
        if not isinstance(known, dict) or known.get("fingerprint") != fingerprint:
            return f"{short}-{fingerprint[:8]}"
    return short


def results_on_other_data(run: Path) -> list[str]:
    """Return the names of the files with results on other data than the run's own."""
    return sorted(path.name for path in run.glob("results-on-*.json"))


def percent(fraction: float | None) -> str:
    """Format a fraction as percent with one decimal; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def align(lines: Sequence[Sequence[str]], *, left: int = 3, separator: str = "  ") -> str:
    """Format rows of cells as aligned text: the first `left` columns left-aligned, the others right-aligned."""
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = (cell.ljust(w) if c < left else cell.rjust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True)))
        text.append(separator.join(cells))
    return "\n".join(text)


def _interval(interval: Sequence[float] | None, metric: Metric) -> str:
    return "-" if interval is None else f"{metric.text(interval[0])}..{metric.text(interval[1])}"


def _same(old: Row, new: Row) -> bool:
    return bool(old["wise_alpha"] == new["wise_alpha"])


def _images(row: Row) -> tuple[Any, ...]:
    return row.get("n"), row.get("limit"), row.get("overrides")
