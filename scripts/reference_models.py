"""Reference models for tables, on the MLP's splits, features and scores: logistic regression, XGBoost, TabNet.

    python scripts/reference_models.py tabular-qsar --set data.root=DIR --out runs/references
    flyp-saflex report runs/references/* --out references.html

Every model is fitted to `train`, with the hyperparameters below; the number of boosting rounds or epochs is chosen on the split
that selects. OUT/<model>-seed<N>/results.json is an ordinary results file. `{seed}` of `compare.common` is filled in, so that a
seed's split is that of the comparison. XGBoost and TabNet are the extra `[tabular]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyp_saflex import recipe
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.errors import ConfigError, UserError, nearest
from flyp_saflex.evaluation.scoring import score_split
from flyp_saflex.records import Dataset, Split
from flyp_saflex.storage.results import Results

Rows = tuple[NDArray[np.float32], NDArray[np.int64]]
Predict = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""Features to probabilities of every class."""


def logistic(train: Rows, select: Rows, seed: int) -> Predict:
    """Fit logistic regression; the strength of its penalty is chosen on the split that selects."""
    from sklearn.linear_model import LogisticRegression

    models = [LogisticRegression(C=strength, max_iter=2000).fit(*train) for strength in (0.01, 0.1, 1.0, 10.0)]
    return max(models, key=lambda model: -_loss(model.predict_proba(select[0]), select[1])).predict_proba


def xgboost(train: Rows, select: Rows, seed: int) -> Predict:
    """Fit XGBoost with its default trees, 0.1 as learning rate and early stopping."""
    try:
        from xgboost import XGBClassifier
    except ImportError:
        raise ConfigError("--models xgboost: the package is not there: pip install 'flyp-saflex[tabular]'") from None
    model = XGBClassifier(n_estimators=500, learning_rate=0.1, early_stopping_rounds=30, random_state=seed, n_jobs=1)
    return model.fit(*train, eval_set=[select], verbose=False).predict_proba


def tabnet(train: Rows, select: Rows, seed: int) -> Predict:
    """Fit TabNet with its package's defaults and early stopping."""
    try:
        from pytorch_tabnet.tab_model import TabNetClassifier
    except ImportError:
        raise ConfigError("--models tabnet: the package is not there: pip install 'flyp-saflex[tabular]'") from None
    model = TabNetClassifier(seed=seed, verbose=0)
    model.fit(*train, eval_set=[select], max_epochs=100, patience=20, batch_size=min(1024, len(train[0])))
    return model.predict_proba


MODELS: dict[str, Callable[[Rows, Rows, int], Predict]] = {"logistic": logistic, "xgboost": xgboost, "tabnet": tabnet}


def run(config: Config, models: list[str], seeds: list[int], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Fit and score models; return the rows of results by model.

    Args:
        config: recipe of a table.
        models: names in `MODELS`.
        seeds: of the splits and models.
        out: folder of the results.

    Raises:
        UserError: an unknown or missing model, or a wrong table.
    """
    for name in models:
        if name not in MODELS:
            raise ConfigError(f"--models {name}: expected some of {', '.join(MODELS)}{nearest(name, MODELS)}")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for seed in seeds:
        overrides = [text.replace("{seed}", str(seed)) for text in config.compare.common]
        dataset = load_dataset(recipe.override(config, overrides, "compare.common").data, seed=seed)
        select = split_for(dataset, config.train.select_split or "id_val", "select")
        for name in models:
            predict = MODELS[name](_rows(dataset, dataset.train), _rows(dataset, select), seed)
            folder = out / f"{name}-seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            results = Results(folder, recipe=name, seed=seed, order=list(dataset.splits), select_split="", select_metric="")
            for split in dataset.splits.values():
                if split.role != "train":
                    logits_NK = np.log(np.clip(predict(_rows(dataset, split)[0]), 1e-12, None))
                    row = score_split(split, np.arange(len(split)), logits_NK, bootstrap=0).row
                    results.add([{"wise_alpha": 1.0} | row])
                    found[name].append(row | {"seed": seed})
            results.write()
    return found


def _rows(dataset: Dataset, split: Split) -> Rows:
    assert dataset.rows is not None, "a table"
    places = [sample.item for sample in split.samples]
    return np.asarray(dataset.rows)[places], np.array([sample.label for sample in split.samples], dtype=np.int64)


def _loss(probabilities_NK: NDArray[np.float64], labels_N: NDArray[np.int64]) -> float:
    return float(-np.log(np.clip(probabilities_NK[np.arange(len(labels_N)), labels_N], 1e-12, None)).mean())


def main() -> int:
    """Read the command line; print mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value")
    parser.add_argument("--models", default="logistic,xgboost")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/references"))
    arguments = parser.parse_args()
    try:
        config = recipe.load(arguments.recipe, arguments.set)
        found = run(config, arguments.models.split(","), list(range(arguments.seeds)), arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, rows in found.items():
        for split in dict.fromkeys(row["split"] for row in rows):
            for metric in ("accuracy", "auroc", "average_precision"):
                values = 100 * np.array([row[metric] for row in rows if row["split"] == split])
                spread = values.std(ddof=1) if len(values) > 1 else float("nan")
                print(f"{name:<10} {split:<8} {metric:<18} {values.mean():6.2f} +- {spread:.2f} (n = {len(values)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
