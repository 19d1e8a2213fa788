"""The PACS experiment: every condition, seed and corruption rate, resumable; see scripts/reproduce_pacs.sh.

A condition is a recipe name with overrides, so each run could as well be started from the command line; here they share a
process to save start-up. What is corrupted is known to table.py only (and to the `oracle` condition).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flyp_saflex import AugmentCache, recipe, runtime
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.filtering.alia import confidence_filter, confident_thresholds
from flyp_saflex.storage.files import write_json
from flyp_saflex.storage.run_folder import environment
from flyp_saflex.training.setup import prepare
from flyp_saflex.training.train import train

sys.path.append(str(Path(__file__).resolve().parents[1] / "beds"))
from number_lists import numbers
from styles import write_style_edits

SAFLEX = ("saflex.enabled=true",)
ROBUST = (*SAFLEX, "saflex.preset=robust")
OOD_SELECT = ("data.select_domains=art_painting", "data.test_domains=cartoon")


@dataclass(frozen=True)
class Condition:
    """One row of the table.

    Attributes:
        overrides: of the recipe `pacs`.
        edits: whether it trains on edits; those without do not depend on the rate.
        shots: photographs per class; 0: all of them.
        needs: a condition that has to be there first (ALIA's filter asks its model).
    """

    overrides: tuple[str, ...] = ()
    edits: bool = True
    shots: int = 20
    needs: str = ""


CONDITIONS = {
    "zero-shot": Condition(("train.epochs=0", "train.steps=0"), edits=False),
    "no-edits": Condition(edits=False),
    "trusted": Condition(),
    "oracle": Condition(("augment.filter=scores", "cache.scores=oracle.jsonl")),
    "random-half": Condition(("augment.filter=random", "augment.keep_fraction=0.5")),
    "lowest-loss-told": Condition(("augment.filter=lowest-loss",)),  # keep_fraction = 1 - rate
    "argmax": Condition(("augment.filter=argmax",)),
    "alia": Condition(("augment.filter=scores", "cache.scores=alia.jsonl"), needs="no-edits"),
    "alia-corrupted-only": Condition(("augment.filter=scores", "cache.scores=alia-corrupted.jsonl"), needs="no-edits"),
    # The paper names no estimator; the exact tangent of all parameters costs minutes per run on a CPU, its difference 0.2 %.
    "saflex-paper": Condition((*SAFLEX, "saflex.preset=paper", "saflex.estimator=one-sided")),
    "saflex-robust": Condition(ROBUST),
    "validation-added": Condition(("data.add_to_train=id_val", "train.select_split=")),
    "saflex-robust-ood-select": Condition((*ROBUST, *OOD_SELECT, "saflex.validation_split=art_painting")),
    "ood-select-added": Condition((*OOD_SELECT, "data.add_to_train=art_painting")),
    "all-photos-no-edits": Condition(edits=False, shots=0),
    "all-photos-trusted": Condition(shots=0),
    "all-photos-oracle": Condition(("augment.filter=scores", "cache.scores=oracle.jsonl"), shots=0),
    "all-photos-argmax": Condition(("augment.filter=argmax",), shots=0),
    "all-photos-saflex-robust": Condition(ROBUST, shots=0),
}


def overrides(options: argparse.Namespace, name: str, condition: Condition, seed: int, rate: float) -> list[str]:
    """Return everything that sets this run apart from the recipe."""
    result = [
        f"recipe={name}" + (f"-rate{rate:g}" if condition.edits else ""),
        f"seed={seed}",
        f"data.shots={condition.shots}",
        f"data.root={options.data}",
        f"model.name=local-dir:{options.model}",
        f"train.frozen_cache={options.out / 'activations'}",
        "train.log_augmented=true",
        "train.checkpoint_every=0",
        "evaluate.bootstrap=0",
        "evaluate.save_predictions=false",
        *options.set,
    ]
    if condition.edits:
        result += [
            "augment.upstream=cache",
            f"cache.root={options.out / 'edits'}",
            f"cache.key={cache_key(condition, seed, rate)}",
        ]
    if name == "lowest-loss-told":
        result.append(f"augment.keep_fraction={1 - rate:g}")
    return result + list(condition.overrides)


def cache_key(condition: Condition, seed: int, rate: float) -> str:
    """Return the cache entry of a condition's edits; with all photographs every seed has the same edits, in another order."""
    return f"seed{seed}-rate{rate:g}" if condition.shots else f"all-rate{rate:g}"


def run_path(options: argparse.Namespace, name: str, seed: int, rate: float) -> Path:
    """Return the folder of a run."""
    return (
        options.out / "runs" / f"{name}-rate{rate:g}-seed{seed}"
        if CONDITIONS[name].edits
        else options.out / "runs" / f"{name}-seed{seed}"
    )


def run_one(options: argparse.Namespace, name: str, seed: int, rate: float) -> None:
    """Train and evaluate one condition, unless its results are there."""
    condition = CONDITIONS[name]
    path = run_path(options, name, seed, rate)
    if (path / "EVALUATED").is_file():
        return
    config = recipe.load("pacs", overrides(options, name, condition, seed, rate))
    if condition.edits:
        edit_seed = seed if condition.shots else 0
        dataset = load_dataset(config.data, seed=seed)
        write_style_edits(dataset, Path(config.cache.root), config.cache.key, seed=edit_seed, rate=rate)
    if condition.needs:
        run_one(options, condition.needs, seed, rate)
        alia_scores(options, seed, rate)
    if not (path / "DONE").is_file():
        shutil.rmtree(path, ignore_errors=True)
        train(config, path)
    evaluate(path)
    (path / "EVALUATED").touch()  # results.json grows split by split
    for heavy in ("checkpoints", "model") if name != "no-edits" else ("checkpoints",):
        shutil.rmtree(path / heavy, ignore_errors=True)


def alia_scores(options: argparse.Namespace, seed: int, rate: float) -> None:
    """Score the edits with the model trained without edits: ALIA's confidence filter, whole and without its "unchanged" half."""
    path = run_path(options, "no-edits", seed, rate)
    ours = overrides(options, "alia", CONDITIONS["alia"], seed, rate)
    asked = [f"model.name=local-dir:{path / 'model'}", "augment.filter=none", "train.frozen_cache="]
    config = recipe.load("pacs", [*ours, *asked])
    cache = AugmentCache.open(config.cache.root, "folder", config.cache.key)
    if (cache.folder / "alia.jsonl").is_file():
        return
    setup = prepare(config)
    network, columns = setup.task.network.eval(), setup.task.class_tokens()

    @torch.no_grad()
    def probabilities(items: object) -> np.ndarray:
        parts = [network(network.lower(images), columns).logits() for _, images in setup.loader().batches(items)]
        return torch.cat(parts).softmax(dim=1).numpy()

    held_out = setup.dataset.splits["id_val"].samples
    thresholds = confident_thresholds(probabilities(held_out), [sample.label for sample in held_out])
    flags = confidence_filter(probabilities(cache.edits), [edit.label for edit in cache.edits], thresholds)
    for file, drop in (("alia.jsonl", flags.unchanged_N | flags.corrupted_N), ("alia-corrupted.jsonl", flags.corrupted_N)):
        cache.write_scores(
            ({"aug_id": edit.aug_id, "keep": bool(not d)} for edit, d in zip(cache.edits, drop, strict=True)), file
        )


def main() -> None:
    """Run what the command line names, in the order seed, rate, condition."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with photo, art_painting and cartoon")
    parser.add_argument("--model", type=Path, required=True, help="open_clip local-dir folder")
    parser.add_argument("--out", type=Path, default=Path("runs/pacs"))
    parser.add_argument("--seeds", type=numbers, default=numbers("0-4"))
    parser.add_argument("--rates", type=lambda text: [float(part) for part in text.split(",")], default=[0.5])
    parser.add_argument("--conditions", type=lambda text: text.split(","), default=list(CONDITIONS))
    parser.add_argument("--worker", default="0/1", help="i/n: take every n-th seed, from the i-th")
    parser.add_argument("--set", action="append", default=[], help="further overrides of the recipe, for all runs")
    options = parser.parse_args()
    options.out = options.out.resolve()
    runtime.keep_freed_memory()
    torch.set_num_threads(1)
    worker, workers = (int(part) for part in options.worker.split("/"))
    for seed in options.seeds[worker::workers]:
        for rate in options.rates:
            for name in options.conditions:
                run_one(options, name, seed, rate)
    write_json(options.out / f"environment-{worker}.json", environment())


if __name__ == "__main__":
    main()
