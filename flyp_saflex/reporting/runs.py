"""Files of run folders, read for the page: configuration, environment, curves, tables, decisions.

A report needs results.json only. Any other file may be missing or unreadable (an incomplete copy, an older version): it gives
an empty value and a remark, never an error.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flyp_saflex import recipe as recipe_module
from flyp_saflex.config import Config
from flyp_saflex.errors import UserError
from flyp_saflex.storage.run_folder import RunDir


@dataclass(frozen=True)
class Preface:
    """Words of a comparison above its report.

    Attributes:
        paragraphs: the answers; a text may start with a question.
        by_seed: options that are meant to differ between the seeds of a condition.
    """

    paragraphs: tuple[str, ...] = ()
    by_seed: tuple[str, ...] = ()


@dataclass
class Run:
    """One run of the report, with the content of its folder.

    Attributes:
        path: its folder.
        recipe, seed: its condition (the name of the recipe) and its seed.
        results: results.json.
        config: its configuration; None if config.toml is missing or of another version.
        config_text: config.toml as it is; the empty string if it is missing.
        environment: env.json.
        metrics: training rows of metrics.jsonl.
        details: details.json.
        remarks: files that could not be read.
    """

    path: Path
    recipe: str
    seed: int
    results: dict[str, Any]
    config: Config | None = None
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def class_names(self) -> dict[int, str]:
        """English class names by index, as far as an evaluated split has the class."""
        names: dict[int, str] = {}
        for alphas in self.details.values():
            for tables in alphas.values():
                names.update({row["class"]: str(row["name"]) for row in tables.get("per_class", ())})
        return names

    def decisions(self) -> list[dict[str, Any]]:
        """Return the rows of augmented.jsonl."""
        return _rows(self.path, "augmented.jsonl")


def read_runs(results: Mapping[Path, dict[str, Any]]) -> list[Run]:
    """Read the folders of runs.

    Args:
        results: content of results.json by folder.
    """
    runs = []
    for path, result in results.items():
        run = Run(path, str(result["recipe"]), int(result["seed"]), result)
        run.config_text = _text(path / "config.toml")
        if run.config_text:
            try:
                run.config = recipe_module.load(str(path / "config.toml"))
            except UserError as error:
                run.remarks.append(f"{path}: its config.toml does not fit this version ({error})")
        else:
            run.remarks.append(f"{path}: no config.toml, so its configuration is not shown")
        run.environment = _mapping(path / "env.json")
        run.details = _details(path / "details.json")
        rows = _rows(path, "metrics.jsonl")
        run.metrics = [row for row in rows if "split" not in row and isinstance(row.get("step"), int)]
        runs.append(run)
    return runs


def by_recipe(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs by condition, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.recipe, []).append(run)
    return groups


def mean_details(runs: Sequence[Run], split: str, table: str, key: str, value: str) -> dict[str, tuple[int, float | None]]:
    """Average a column of details.json over the seeds of one condition (finetuned model).

    Args:
        runs: the seeds.
        split: name of the split.
        table: `per_class` or `per_group`.
        key: column that names a row.
        value: column to average; None (a class without images) does not count.

    Returns:
        (number of images of the first seed, mean or None) by name of the row.
    """
    sizes: dict[str, int] = {}
    values: defaultdict[str, list[float]] = defaultdict(list)
    for run in runs:
        for row in run.details.get(split, {}).get("1", {}).get(table, ()):
            name = str(row[key])
            sizes.setdefault(name, int(row["n"]))
            if row.get(value) is not None:
                values[name].append(float(row[value]))
    return {name: (n, sum(values[name]) / len(values[name]) if values[name] else None) for name, n in sizes.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _mapping(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(_text(path) or "{}"))
    except (ValueError, TypeError):
        return {}


def _details(path: Path) -> dict[str, Any]:
    """Return details.json, or nothing if its rows lack what the tables need."""
    details = _mapping(path)
    try:
        for alphas in details.values():
            for tables in alphas.values():
                _ = [(int(row["class"]), row["name"], int(row["n"]), float(row["f1"] or 0)) for row in tables["per_class"]]
                _ = [(row["group"], int(row["n"]), float(row["accuracy"])) for row in tables["per_group"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    return details


def _rows(run: Path, name: str) -> list[dict[str, Any]]:
    try:
        return [row for row in RunDir(run, lock=False).read_rows(name) if isinstance(row, dict)]
    except (OSError, ValueError):
        return []
