"""The PACS experiment's tables from its run folders (Markdown): accuracy, recovery, detection, what was kept, cost.

Everything is paired by seed. OOD is the mean over the OOD test splits of a run. What is corrupted is read here, from the
truth files beside the caches, and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from flyp_saflex import AugmentCache, recipe
from flyp_saflex.config import Config
from flyp_saflex.demo.corruption import read_truth
from flyp_saflex.evaluation.statistics import Interval, paired_difference, summarise

KINDS = ("clean", "swapped", "destroyed")
RESULTS = (
    "| condition | n | ID accuracy | ID macro-F1 | OOD accuracy | OOD macro-F1 | art | cartoon "
    "| OOD points vs trusted | vs argmax | gap recovered | cartoon points vs trusted |"
)
DECISIONS = (
    "| condition | kept: clean | swapped | destroyed | clean, lowest class | clean, highest class "
    "| AUC of corrupted rows | seconds (trusted = 1) |"
)
METRICS = ("id accuracy", "id macro_f1", "ood accuracy", "ood macro_f1", "art_painting accuracy", "cartoon accuracy")
PATTERN = re.compile(r"(?P<name>.+?)(-corruption-(?P<rate>[\d.]+))?-seed(?P<seed>\d+)")


@dataclass
class Condition:
    """What was measured of one condition at one rate, by seed."""

    numbers: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))

    def mean(self, name: str) -> float | None:
        """Return the mean over seeds; None if it was not measured."""
        values = self.numbers.get(name)
        return summarise(values.values()).mean if values else None


def read(root: Path) -> dict[tuple[str, str], Condition]:
    """Read every finished run; runs without edits stand under every rate."""
    conditions: dict[tuple[str, str], Condition] = defaultdict(Condition)
    for path in sorted(root.glob("runs/*/results.json")):
        match = PATTERN.fullmatch(path.parent.name)
        assert match, path
        config = recipe.load(str(path.parent / "config.toml"))
        seed, rows = int(match["seed"]), json.loads(path.read_text())["results"]
        if not {"id_test", *config.data.test_domains} <= {row["split"] for row in rows}:
            continue  # evaluation has not ended
        numbers = conditions[match["name"], match["rate"] or ""].numbers
        ood = [row for row in rows if (row["role"], row["shift"]) == ("test", "ood")]
        for metric in ("accuracy", "macro_f1"):
            numbers[f"id {metric}"][seed] = next(row[metric] for row in rows if row["split"] == "id_test")
            for row in ood:
                numbers[f"{row['split']} {metric}"][seed] = row[metric]
            numbers[f"ood {metric}"][seed] = float(np.mean([row[metric] for row in ood]))
        numbers["seconds"][seed] = json.loads((path.parent / "env.json").read_text())["seconds"]
        if match["rate"]:
            _decisions(path.parent, config, read_truth(root / "edits", "folder", config.cache.key), numbers, seed)
    return conditions


def _decisions(run: Path, config: Config, truth: dict[str, str], numbers: dict[str, dict[int, float]], seed: int) -> None:
    """What the run did with each kind of edit, over all steps."""
    rows = [json.loads(line) for line in (run / "augmented.jsonl").read_text().splitlines()]
    if config.augment.filter == "scores":  # it drops edits before training: one visit each, with weight zero
        scores = AugmentCache.open(config.cache.root, "folder", config.cache.key).scores(config.cache.scores)
        visits = len(rows) / sum(score["keep"] for score in scores.values())
        dropped = [aug_id for aug_id, score in scores.items() if not score["keep"]]
        rows += [{"id": aug_id, "label": int(aug_id.split("/")[1]), "weight": 0.0} for aug_id in dropped] * round(visits)
    kinds = np.array([truth[row["id"]] for row in rows])
    kept = np.array([row["weight"] > 0 for row in rows])
    labels = np.array([row["label"] for row in rows])
    for kind in KINDS:
        if (kinds == kind).any():
            numbers[f"kept {kind}"][seed] = float(kept[kinds == kind].mean())
    clean = kinds == "clean"
    per_class = [kept[clean & (labels == label)].mean() for label in np.unique(labels[clean])]
    numbers["kept clean, lowest class"][seed] = float(min(per_class))
    numbers["kept clean, highest class"][seed] = float(max(per_class))
    gains = np.array([row.get("gain", np.nan) for row in rows], dtype=float)
    if np.isfinite(gains).all() and len(set(clean)) == 2:
        numbers["auc"][seed] = float(roc_auc_score(clean, gains))


def percent(value: float | None) -> str:
    """Format a fraction."""
    return "-" if value is None else f"{100 * value:.1f}"


def points(interval: Interval | None) -> str:
    """Format a paired difference in points with its 95 % interval."""
    if interval is None:
        return "-"
    bounds = "" if interval.low is None or interval.high is None else f" [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return f"{100 * interval.mean:+.1f}{bounds}"


def tables(conditions: dict[tuple[str, str], Condition], order: list[str], seeds: set[int] | None) -> str:
    """Return one table of results and one of decisions per rate."""
    if seeds is not None:
        for condition in conditions.values():
            condition.numbers = {name: {s: v for s, v in by.items() if s in seeds} for name, by in condition.numbers.items()}
    rates = sorted({rate for _, rate in conditions if rate}, key=float)
    parts = []
    for rate in rates:
        here = {name: conditions.get((name, rate)) or conditions.get((name, "")) for name in order}
        here = {name: condition for name, condition in here.items() if condition and condition.numbers.get("ood accuracy")}
        parts.append(f"### Corruption {float(rate):g}\n")
        head = RESULTS
        parts += [head, "|" + "---|" * (head.count("|") - 1)]
        for name, condition in here.items():
            value = condition.numbers
            trusted, oracle, argmax = (here.get(other) for other in ("trusted", "oracle", "filter-argmax"))
            gap = _recovered(value["ood accuracy"], trusted, oracle)
            cells = [name, str(len(value["ood accuracy"]))]
            cells += [percent(condition.mean(key)) for key in METRICS]
            comparable = "art_painting accuracy" in value
            for other in (trusted, argmax):
                same = other is None or other is condition or not comparable
                cells.append("-" if same else points(paired_difference(value["ood accuracy"], other.numbers["ood accuracy"])))
            cells.append(gap if comparable else "-")
            base = trusted.numbers["cartoon accuracy"] if trusted is not None and trusted is not condition else {}
            cells.append(points(paired_difference(value["cartoon accuracy"], base)))
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
        head = DECISIONS
        parts += [head, "|" + "---|" * (head.count("|") - 1)]
        for name, condition in here.items():
            if condition.numbers.get("kept clean") or condition.numbers.get("kept swapped"):
                keys = ("kept clean", "kept swapped", "kept destroyed", "kept clean, lowest class", "kept clean, highest class")
                trusted = here.get("trusted")
                cost = _ratio(condition.numbers["seconds"], trusted.numbers["seconds"]) if trusted else None
                auc = condition.mean("auc")
                cells = [
                    name,
                    *(percent(condition.mean(key)) for key in keys),
                    "-" if auc is None else f"{auc:.2f}",
                    "-" if cost is None else f"{cost:.2f}",
                ]
                parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _recovered(values: dict[int, float], trusted: Condition | None, oracle: Condition | None) -> str:
    """Return the share of the gap between trusting and the oracle, of the means over shared seeds."""
    if trusted is None or oracle is None:
        return "-"
    low, high = trusted.numbers["ood accuracy"], oracle.numbers["ood accuracy"]
    shared = [seed for seed in values if seed in low and seed in high]
    gap = sum(high[seed] - low[seed] for seed in shared)
    return "-" if not shared or gap <= 0 else f"{100 * sum(values[seed] - low[seed] for seed in shared) / gap:.0f} %"


def _ratio(values: dict[int, float], base: dict[int, float]) -> float | None:
    shared = [seed for seed in values if seed in base]
    return float(np.median([values[seed] / base[seed] for seed in shared])) if shared else None


def main() -> None:
    """Print the tables."""
    from experiment import CONDITIONS, numbers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/pacs"))
    parser.add_argument("--seeds", type=numbers, help="only these seeds")
    options = parser.parse_args()
    print(tables(read(options.out), list(CONDITIONS), set(options.seeds) if options.seeds else None))


if __name__ == "__main__":
    main()
