"""Evaluation of a run: every split, every WiSE-FT alpha, each image decoded once.

Reads RUN/config.toml and RUN/model, writes RUN/results.json, RUN/details.json and RUN/predictions/<split>.parquet after
every split, so that an interrupted evaluation keeps the finished splits. Results on other data than the run's own lie beside
them, under a name. `evaluate_split` is the part without files, also for
the variants of many runs. Under accelerate every process takes its share of a split.

Shapes: N images, K classes, D embedding.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState

from flyp_saflex import recipe as recipe_module
from flyp_saflex.clip.model import RANDOM
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.evaluation.calibration import calibration_error, fit_temperature, usable
from flyp_saflex.evaluation.load_run import check_folder, check_model, load_run
from flyp_saflex.evaluation.predict import Variant, predict_split
from flyp_saflex.evaluation.run_data import compare_data
from flyp_saflex.evaluation.scoring import Scored, details, prediction_columns, score_split, split_scores
from flyp_saflex.evaluation.weight_averaging import WeightAverage
from flyp_saflex.evaluation.wilds_submission import check_submission, write_submission
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.records import Dataset, Split
from flyp_saflex.runtime import process_state, telling_lost_processes
from flyp_saflex.storage.results import Results
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tasks.task import Loader


@telling_lost_processes("run the command again; the splits that were finished are kept")
def evaluate(
    run: Path,
    *,
    splits: Sequence[str] = (),
    wise_alphas: Sequence[float] | None = None,
    overrides: Iterable[str] = (),
    limit: int | None = None,
    dry_run: bool = False,
    wilds_submission: bool = False,
    on: str = "",
    forgetting: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run and return what results.json then holds.

    Args:
        run: folder that `train` wrote.
        splits: names of splits; empty: every split that was not trained on.
        wise_alphas: WiSE-FT's alphas; None: `evaluate.wise_alphas`. 1, the finetuned model, is always evaluated.
        overrides: `section.field=value`, applied to the run's recipe.
        limit: use at most this many images of each split.
        dry_run: run all checks, load no model, write nothing.
        wilds_submission: write the prediction files of WILDS' leaderboard to RUN/wilds-submission.
        on: name of a test set that `overrides` lead to (`other_sets.py`); no alpha is chosen on it.
        forgetting: `limit`, `sets` and loss `by_alpha` (`other_sets.py`), which limit the choice of alpha, now and later;
            None: as before.

    Raises:
        RunError: no run folder, a run without a model, a linear head for other classes, or logits that are NaN.
        ConfigError: a split to select on that may not select.
        DataError: an unknown split, or too many unreadable images.
    """
    run, overrides = Path(run), tuple(overrides)
    check_folder(run)
    state = process_state(RunDir(run, lock=False).read_config().train.process_timeout_s)
    with RunDir(run, lock=state.is_main_process and not dry_run) as folder:
        config = folder.read_config()
        if overrides:
            config = recipe_module.load(str(run / "config.toml"), overrides)
        check_model(folder, config)
        alphas = tuple(sorted({1.0, *(config.evaluate.wise_alphas if wise_alphas is None else wise_alphas)}))
        if any(alpha != 1 for alpha in alphas):
            check_start(config, alphas)
        dataset = load_dataset(config.data, seed=config.seed, limit=limit, test_set=on)
        calibrates = config.evaluate.calibrate and not on
        select = "" if on else select_split(config, dataset, choose=len(alphas) > 1 or calibrates)
        if calibrates and not select:
            raise ConfigError("evaluate.calibrate fits the temperature on a select split: set evaluate.select_split")
        todo = splits_to_evaluate(dataset, splits, first=select)
        if wilds_submission:
            check_submission(config, dataset, todo, limit=limit)
        data_notes, other = compare_data(run, config, dataset, [split.name for split in todo], overrides, name=on)
        results = Results(
            folder.path,
            recipe=config.recipe,
            seed=config.seed,
            order=list(dataset.splits),
            select_split=select,
            select_metric=config.train.select_metric,
            other=other,
        )
        if forgetting is not None:
            results.values["forgetting"] = dict(forgetting)
        elif config.evaluate.max_forgetting < 1 and len(alphas) > 1 and "forgetting" not in results.values:
            data_notes.append("evaluate.max_forgetting limits no alpha here: give the sets by --on NAME=PATH")
        for note in data_notes if state.is_main_process else ():
            print(f"note: {note}")
        if dry_run:
            if state.is_main_process:
                print(f"{run}: would evaluate {', '.join(f'{s.name} ({len(s)})' for s in todo)} at alpha {_list(alphas)}")
            return results.as_dict()
        task = load_run(folder.path, config, dataset, device=state.device)
        start = task.initial_state() if any(alpha != 1 for alpha in alphas) else None
        samples = [sample for split in todo for sample in split.samples]
        source = task.source(config.data, samples)
        if state.is_main_process:
            for note in source.notes:
                print(f"note: {note}")
        images = ImageLoader(
            source,
            batch_size=config.evaluate.batch_size,
            workers=config.data.workers,
            max_unreadable=config.data.max_unreadable,
            box_crop=config.data.box_crop,
            progress=state.is_main_process,
            pin=state.device.type == "cuda",
        )
        loader, lowered = task.evaluation_inputs(config, images, torch.device(state.device), start)
        average = WeightAverage(task, start, precision=config.train.precision, lowered=lowered)
        variants = {alpha: average.variant(alpha) for alpha in alphas}
        extras = {key: value for key, value in (("limit", limit), ("overrides", telling(overrides))) if value}
        temperatures = results.temperatures(select) if calibrates else None
        for split in todo:
            started = time.monotonic()
            scored = evaluate_split(
                variants,
                split,
                loader,
                bootstrap=config.evaluate.bootstrap,
                seed=config.seed,
                state=state,
                extras=extras,
                temperatures=temperatures,
                fits=split.name == select,
            )
            if dataset.evaluator is not None:
                for part in scored.values():
                    part.row["official"] = dataset.evaluator(part.samples, part.predictions_N.tolist())
            results.add(_with_alpha(part.row, alpha) for alpha, part in scored.items())
            if state.is_main_process:
                shown = {alpha: part for alpha, part in scored.items() if alpha in (1.0, results.chosen_alpha)}
                if config.evaluate.save_predictions:
                    results.write_predictions(split.name, prediction_columns(shown, dataset.class_names))
                results.write_details(split.name, details(shown, dataset.class_names))
                results.write()
                if wilds_submission:
                    write_submission(run, config.seed, split, scored[results.chosen_alpha or 1.0])
                if other is None:
                    folder.note_seconds("evaluation", split.name, time.monotonic() - started)
        if state.is_main_process:
            print(results.table([split.name for split in todo]))
        return results.as_dict()


def evaluate_split(
    variants: Mapping[Any, Variant],
    split: Split,
    loader: Loader,
    *,
    bootstrap: int = 0,
    seed: int = 0,
    state: PartialState | None = None,
    extras: Mapping[str, Any] | None = None,
    temperatures: dict[Any, float] | None = None,
    fits: bool = False,
) -> dict[Any, Scored]:
    """Score several models on one split, reading its images once.

    Args:
        variants: by a key of your own (alpha, a run's name): what puts a model's weights in place.
        split: the images.
        loader: reads them with the preprocessing that all variants share.
        bootstrap: resamples behind the intervals; 0: none.
        seed: seed of the resamples.
        state: accelerate's state, to share the images among its processes; None: this process reads all of them.
        extras: further fields of every row.
        temperatures: by the same keys; a row then has the temperature and the calibration error with it. None: not asked for.
        fits: whether the temperatures are fitted on this split, and put there.

    Returns:
        A row and the predictions by key. Unreadable images are left out of both and counted in the row.

    Raises:
        RunError: a logit is NaN or infinite.
        DataError: no image, or too many unreadable ones.
    """
    index_N, arrays = predict_split(list(variants.values()), split, loader, state=state)
    scored = {}
    for key, logits_NK in zip(variants, arrays, strict=True):
        scored[key] = score_split(split, index_N, logits_NK, bootstrap=bootstrap, seed=seed)
        if temperatures is not None:
            scores = split_scores(split, index_N, logits_NK)
            if fits:
                temperatures[key] = usable(fit_temperature(scores.logits_NK, scores.labels_N))
            if key in temperatures:
                after = calibration_error(scores.logits_NK, scores.labels_N, temperatures[key])
                scored[key].row.update(temperature=temperatures[key], ece_calibrated=after)
        scored[key].row.update(extras or {})
    return scored


def check_start(config: Config, alphas: Sequence[float]) -> None:
    """Check that the weights that the run started from can be had again.

    Raises:
        ConfigError: the run started from random weights.
    """
    if config.model.pretrained == RANDOM:
        raise ConfigError(
            f"WiSE-FT alphas {_list(alphas)} need the pretrained weights, but model.pretrained = {RANDOM}: there are none; "
            "use --wise-alphas 1"
        )


def select_split(config: Config, dataset: Dataset, *, choose: bool) -> str:
    """Return the split that picks alpha, or the empty string when nothing is to be picked.

    Args:
        config: `evaluate.select_split`, else `train.select_split`.
        dataset: its splits.
        choose: whether there is more than one alpha.

    Raises:
        ConfigError: the split is unknown, or its role is not `select`.
    """
    option = "evaluate.select_split" if config.evaluate.select_split else "train.select_split"
    name = config.evaluate.select_split or config.train.select_split
    if not name or not (choose or config.evaluate.select_split):
        return ""
    try:
        return split_for(dataset, name, "select").name
    except DataError as error:
        raise ConfigError(f"{option} = {name} cannot pick alpha: {error}") from None


def splits_to_evaluate(dataset: Dataset, names: Sequence[str], *, first: str = "") -> list[Split]:
    """Return the named splits, or all but those trained on, in order.

    Args:
        dataset: its splits.
        names: of the splits; empty: all but those trained on.
        first: split that picks alpha, and therefore comes first; empty: none.

    Raises:
        DataError: a name is unknown; says the nearest.
    """
    wanted = {split_for(dataset, name).name for name in names}
    todo = [split for split in dataset.splits.values() if (split.name in wanted if wanted else split.role != "train")]
    return sorted(todo, key=lambda split: split.name != first)


def telling(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that belong beside a result: not where images are, how they are read, or what is computed."""
    silent = ("data.root=", "data.workers=", "evaluate.")
    return [override for override in overrides if not override.startswith(silent)]


def _with_alpha(row: dict[str, Any], alpha: float) -> dict[str, Any]:
    """Return the row with `wise_alpha` beside the split that it is about, where a reader looks for it."""
    return {name: row[name] for name in ("split", "role", "shift")} | {"wise_alpha": alpha} | row


def _list(alphas: Sequence[float]) -> str:
    return ", ".join(f"{alpha:g}" for alpha in alphas)
