"""The PACS experiment: edits at any corruption rate, ALIA's scores of them, and `compare`; see scripts/reproduce_pacs.sh.

Runs, their resumption, the report and the verdict are those of `flyp-saflex compare`, on the recipe scripts/beds/pacs.toml. Only
table.py (and the `oracle` condition) knows what is corrupted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from flyp_saflex import recipe, runtime
from flyp_saflex.comparison.compare import compare
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import UserError
from flyp_saflex.filtering.filter import filter_edits
from flyp_saflex.storage.augment_cache import AugmentCache

sys.path.append(str(Path(__file__).resolve().parents[1] / "beds"))
from number_lists import fractions, numbers
from styles import write_style_edits

RECIPE = Path(__file__).resolve().parents[1] / "beds" / "pacs.toml"
EDITED = ("augment.upstream=cache",)
ROBUST = (*EDITED, "saflex.enabled=true", "saflex.preset=robust")
OOD_SELECT = ("data.select_domains=art_painting", "data.test_domains=cartoon")
JUDGE = "no-edits"
"""Condition whose model ALIA's filter asks."""
CONDITIONS: dict[str, tuple[str, ...]] = {
    "zero-shot": ("train.steps=0", "train.epochs=0"),
    JUDGE: (),
    "trusted": EDITED,
    "oracle": (*EDITED, "augment.filter=scores", "cache.scores=oracle.jsonl"),
    "filter-random": (*EDITED, "augment.filter=random"),  # keeps 1 - rate, as the next
    "filter-lowest-loss": (*EDITED, "augment.filter=lowest-loss"),
    "filter-argmax": (*EDITED, "augment.filter=argmax"),
    "filter-alia": (*EDITED, "augment.filter=scores", "cache.scores=alia.jsonl"),
    "filter-alia-corrupted": (*EDITED, "augment.filter=scores", "cache.scores=alia-corrupted.jsonl"),
    "saflex-robust": ROBUST,
    # The paper names no estimator; the exact tangent of all parameters costs minutes per run on a CPU, its difference 0.2 %.
    "saflex-paper": (*EDITED, "saflex.enabled=true", "saflex.preset=paper", "saflex.estimator=one-sided"),
    "validation-trained": (*EDITED, "data.add_to_train=id_val", "train.select_split="),
    "saflex-robust-ood-select": (*ROBUST, *OOD_SELECT, "saflex.validation_split=art_painting"),
    "ood-select-trained": (*EDITED, *OOD_SELECT, "data.add_to_train=art_painting"),
}
ALIA = {"filter-alia": ("unchanged", "corrupted"), "filter-alia-corrupted": ("corrupted",)}
"""Verdicts that drop an edit, by condition; without `unchanged`, more of the clean edits are kept."""


def experiment(options: argparse.Namespace, *, conclude: bool) -> None:
    """Write what edits and scores are missing, and run what is left of the conditions.

    Args:
        options: of the command line.
        conclude: whether report and verdict are written.
    """
    config = study(options, options.conditions)
    write_edits(options, config)
    if asked := ALIA.keys() & set(options.conditions):
        judge = study(options, [JUDGE, "trusted"])
        compare(replace(judge, compare=replace(judge.compare, keep="models")), options.out, conclude=False)
        for seed in options.seeds:
            for rate in options.rates:
                for name in sorted(asked):
                    score(config, options.out / "runs" / f"{JUDGE}-seed{seed}", cache_key(options, seed, rate), name)
    compare(config, options.out, conclude=conclude)


def write_edits(options: argparse.Namespace, config: Config) -> None:
    """Write the entries of all seeds and rates, or what is missing of them."""
    for seed in options.seeds:
        dataset = load_dataset(config.data, seed=seed)
        edit_seed = 0 if options.all_photos else seed  # with all photographs every seed has the same edits, in another order
        for rate in options.rates:
            write_style_edits(dataset, Path(config.cache.root), cache_key(options, seed, rate), seed=edit_seed, rate=rate)


def study(options: argparse.Namespace, conditions: list[str]) -> Config:
    """Return the recipe of a comparison of some conditions at every rate.

    Raises:
        ConfigError: an override that cannot be applied.
    """
    config = recipe.load(
        str(RECIPE),
        [
            f"data.root={options.data}",
            f"model.name=local-dir:{options.model}",
            f"cache.root={options.out / 'edits'}",
            f"train.frozen_cache={options.out / 'activations'}",
            "evaluate.save_predictions=false",
            *(["data.shots=0"] if options.all_photos else []),
            *options.set,
        ],
    )
    sets = {
        f"corruption {rate:g}": (f"cache.key={cache_key(options, '{seed}', rate)}", f"augment.keep_fraction={1 - rate:g}")
        for rate in options.rates
    }
    made = {name: CONDITIONS[name] for name in CONDITIONS if name in conditions}
    compared = replace(config.compare, seeds=tuple(options.seeds), baseline="", conditions=made, edits=sets, keep="results")
    return replace(config, compare=compared)


def cache_key(options: argparse.Namespace, seed: int | str, rate: float) -> str:
    """Return the cache entry of a seed's edits."""
    return f"all-rate{rate:g}" if options.all_photos else f"seed{seed}-rate{rate:g}"


def score(config: Config, judge: Path, key: str, name: str) -> None:
    """Score an entry's edits with ALIA's confidence filter, unless it is done."""
    file = next(text.partition("=")[2] for text in CONDITIONS[name] if text.startswith("cache.scores="))
    cache = replace(config.cache, key=key, scores=file)
    if not (AugmentCache.open(cache.root, config.data.name, key).folder / file).is_file():
        asked = replace(config.filter, use=("confidence",), drop=ALIA[name], run=str(judge), sheet_rows=0)
        filter_edits(replace(config, cache=cache, filter=asked))


def names(text: str) -> list[str]:
    """Parse names of conditions with commas between.

    Raises:
        ValueError: an unknown one.
    """
    found = text.split(",")
    if unknown := set(found) - CONDITIONS.keys():
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    return found


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="folder with photo, art_painting and cartoon")
    made.add_argument("--model", type=Path, required=True, help="open_clip local-dir folder")
    made.add_argument("--out", type=Path, default=Path("runs/pacs"))
    made.add_argument("--seeds", type=numbers, default=numbers("0-4"))
    made.add_argument("--rates", type=fractions, default=[0.5])
    made.add_argument("--conditions", type=names, default=list(CONDITIONS), metavar="NAMES", help=", ".join(CONDITIONS))
    made.add_argument("--all-photos", action="store_true", help="train on all photographs instead of 20 per class")
    made.add_argument("--worker", default="", help="i/n: take every n-th seed, from the i-th, and write no report")
    made.add_argument("--set", action="append", default=[], help="further overrides of the recipe, for all runs")
    return made


def main() -> int:
    """Run what the command line names; return the exit code."""
    options = parser().parse_args()
    options.out = options.out.resolve()
    runtime.keep_freed_memory()
    torch.set_num_threads(1)
    if options.worker:
        worker, workers = (int(part) for part in options.worker.split("/"))
        options.seeds = options.seeds[worker::workers]
    try:
        if options.seeds:
            experiment(options, conclude=not options.worker)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
