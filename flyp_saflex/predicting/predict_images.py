"""Prediction of a run on images that need no label: `flyp-saflex predict RUN FOLDER|TABLE|IMAGES...`.

Reads RUN/config.toml, RUN/data.json and RUN/model; the run's data only to fit a temperature on its select split. Embeddings are
kept in OUT.parts until the table is written, so that the same command resumes. Under accelerate every process embeds its share.

Shapes: N images, n of them readable, K classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env
from numpy.typing import NDArray

from flyp_saflex.config import Config
from flyp_saflex.data.registry import split_for
from flyp_saflex.data.text import listed
from flyp_saflex.errors import ConfigError, DataError, RunError
from flyp_saflex.evaluation.calibration import Calibration, probabilities
from flyp_saflex.evaluation.evaluate import check_start
from flyp_saflex.evaluation.load_run import classes_of, load_clip_run, open_run, own_data
from flyp_saflex.evaluation.predict import predict
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.predicting.files import FEATURES, TABLES, check_place, prediction_columns, write_features, write_table
from flyp_saflex.predicting.inputs import Inputs, collect
from flyp_saflex.predicting.label_issues import check_cleanlab, issue_columns, label_issues, lonely_classes
from flyp_saflex.predicting.parts import Parts, digest
from flyp_saflex.records import Dataset, Sample, Split
from flyp_saflex.storage.results import percent, read_results
from flyp_saflex.tables import METHODS, TASKS
from flyp_saflex.tasks.clip_task import ClipTask

PART = 1024
"""Images of a part: what an interruption loses at most."""
SHOWN_UNREADABLE = 5
NO_CALIBRATION = "none"
"""Value of `--calibrate-on` for probabilities as they are."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of a prediction, as on the command line."""

    out: Path = Path("predictions.csv")
    """Table of predictions, .csv or .parquet."""
    top_k: int = 5
    """Classes per image."""
    embeddings: Path | None = None
    """File of the image features, .npz or .parquet."""
    issues: Path | None = None
    """Table of likely label errors, .csv or .parquet."""
    calibrate_on: str = ""
    """Split of role `select` for the temperature; empty: the one that selects, where it is there; `none`: no temperature."""
    wise_alpha: float = 1.0
    """WiSE-FT's alpha of the model."""


def predict_images(
    run: Path,
    images: Sequence[Path],
    options: PredictOptions | None = None,
    *,
    overrides: Sequence[str] = (),
    limit: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the classes and probabilities of images, and return a summary.

    Args:
        run: folder that `train` wrote.
        images: folders, tables with a column of paths, or files.
        options: files to write, classes per image, temperature.
        overrides: `section.field=value`, applied to the run's recipe.
        limit: the first images only.
        dry_run: run all checks, load no model, write nothing.

    Returns:
        `images`, `unreadable`, `temperature` (None: not calibrated), `issues` (None: not asked for).

    Raises:
        RunError: no usable run, or files that cannot be written.
        ConfigError: an option that does not fit, or a split that may not calibrate.
        DataError: images or labels that are not there.
    """
    run, options = Path(run), options or PredictOptions()
    _check_options(options)
    config = open_run(run, tuple(overrides))
    if options.wise_alpha != 1:
        check_start(config, (options.wise_alpha,))
    inputs = collect([Path(path) for path in images], config.data, labelled=options.issues is not None, limit=limit)
    own, no_data = own_data(run, config)
    classes = classes_of(run, own, no_data)
    labels = inputs.label_indices(classes.class_names) if options.issues is not None else []
    split, not_calibrated = _calibration_split(options, config, own, no_data)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    is_main = state.is_main_process
    if is_main:
        about_labels = _label_notes(inputs, labels, own, classes) if options.issues is not None else []
        for note in [*inputs.notes, *_advice(run, options), *about_labels]:
            print(f"note: {note}")
    if dry_run:
        if is_main:
            how = f"not calibrated: {not_calibrated}" if split is None else f"calibrated on {split.name} ({len(split)} images)"
            print(f"{run}: would predict {len(inputs.samples)} images into {options.out}, {how}")
        return {"images": len(inputs.samples), "unreadable": [], "temperature": None, "issues": None}

    parts = Parts(options.out.with_name(f"{options.out.name}.parts"), _identity(run, config, inputs, options))
    state.wait_for_everyone()  # no process writes a part before all have seen the same ones
    task = load_clip_run(run, config, classes, alpha=options.wise_alpha, device=state.device)
    todo = [position for position in range(len(inputs.samples)) if position not in parts.done]
    if is_main and parts.done:
        print(f"resuming: {len(parts.done)} of {len(inputs.samples)} images are done")
    _embed(task, config, inputs.samples, todo[state.process_index :: state.num_processes], parts, state)
    state.wait_for_everyone()
    if not is_main:
        return {}
    calibration = _calibration(task, config, split, state) if split is not None else None
    if calibration is not None and calibration.at_bound:
        not_calibrated = (
            f"no temperature fits {calibration.split}: its {calibration.n} images are too few, or all are answered rightly"
        )
        calibration = None
    positions, embeddings = parts.gather()
    likely = probabilities(_logits(task, embeddings), calibration.temperature if calibration else 1.0)
    columns = prediction_columns(
        inputs.names,
        positions,
        likely,
        parts.reasons,
        classes.class_names,
        top_k=min(options.top_k, classes.num_classes),
        calibrated=calibration is not None,
    )
    names = [inputs.names[position] for position in positions.tolist()]
    if options.embeddings is not None:
        write_features(options.embeddings, names, embeddings)
    issues = None
    if options.issues is not None:
        kept = [labels[position] for position in positions.tolist()]
        found = label_issues(kept, likely)
        write_table(options.issues, issue_columns(found, names, kept, likely, classes.class_names))
        issues = len(found)
    write_table(options.out, columns)
    parts.remove()
    unreadable = {inputs.names[position]: reason for position, reason in sorted(parts.reasons.items())}
    _tell(options, inputs, unreadable, calibration, not_calibrated, issues)
    return {
        "images": len(inputs.samples),
        "unreadable": list(unreadable),
        "temperature": calibration.temperature if calibration else None,
        "issues": issues,
    }


def _check_options(options: PredictOptions) -> None:
    check_place("--out", options.out, TABLES)
    if options.embeddings is not None:
        check_place("--embeddings", options.embeddings, FEATURES)
    if options.issues is not None:
        check_place("--issues", options.issues, TABLES)
        check_cleanlab()
    files = [path.absolute() for path in (options.out, options.embeddings, options.issues) if path is not None]
    if len(set(files)) < len(files):
        raise ConfigError("--out, --embeddings and --issues name one file twice, expected a file each; rename one")
    if options.top_k < 1:
        raise ConfigError(f"--top-k {options.top_k}: expected at least 1 class per image")
    if not 0 <= options.wise_alpha <= 1:
        raise ConfigError(f"--wise-alpha {options.wise_alpha:g}: expected a number from 0 to 1")


def _calibration_split(options: PredictOptions, config: Config, own: Dataset | None, no_data: str) -> tuple[Split | None, str]:
    """Return the split that the temperature is fitted on, or None and why there is none.

    Raises:
        ConfigError: a split that the user named cannot be used.
    """
    if options.calibrate_on == NO_CALIBRATION:
        return None, f"--calibrate-on {NO_CALIBRATION}"
    name = options.calibrate_on or config.evaluate.select_split or config.train.select_split
    if own is None:
        if options.calibrate_on:
            raise ConfigError(f"--calibrate-on {name}: {no_data}")
        return None, no_data
    if not name:
        return None, "the run names no select split; give one with --calibrate-on SPLIT"
    try:
        return split_for(own, name, "select"), ""
    except DataError as error:
        if options.calibrate_on:
            raise ConfigError(f"--calibrate-on {name}: {error}") from None
        return None, str(error)


def _advice(run: Path, options: PredictOptions) -> list[str]:
    """Return a note where `evaluate` chose other weights than those that predict."""
    try:
        chosen = read_results(run).get("chosen_alpha")
    except RunError:
        return []
    if chosen is None or float(chosen) == options.wise_alpha:
        return []
    return [
        f"evaluate chose WiSE-FT's alpha {chosen:g}; these are the weights of {options.wise_alpha:g} (--wise-alpha {chosen:g})"
    ]


def _label_notes(inputs: Inputs, labels: Sequence[int], own: Dataset | None, classes: Dataset) -> list[str]:
    """Return notes on labels that cannot be judged well: of images that the run was trained on, of classes with one image."""
    lonely = lonely_classes(labels, classes.class_names)
    notes = [f"{len(lonely)} classes have one image each, whose label is not judged: {listed(lonely)}"] if lonely else []
    if own is None:
        return [
            *notes,
            "whether the run was trained on these images is unknown; errors show on images that it was not trained on",
        ]
    trained = {str(sample.item.resolve()) for sample in own.train.samples if isinstance(sample.item, Path)}
    number = sum(str(sample.path.resolve()) in trained for sample in inputs.samples)
    if not number:
        return [*notes, "none of these images is in the run's train split: their probabilities are held out"]
    return [*notes, f"the run was trained on {number} of {len(inputs.samples)} images: their label errors are likely overlooked"]


def _identity(run: Path, config: Config, inputs: Inputs, options: PredictOptions) -> dict[str, str]:
    """Return what embeddings depend on, by name."""
    files = [run / name for name in TASKS[METHODS[config.train.method].task].files]
    weights = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return {
        "weights": digest([*weights, f"{options.wise_alpha}", config.train.precision, config.data.decoding]),
        "images": digest([*inputs.names, *(str(sample.item) for sample in inputs.samples)]),
    }


def _loader(task: ClipTask, config: Config, samples: Sequence[Sample], state: PartialState, *, own: bool) -> ImageLoader:
    """Return the loader of images of the run's own data, or of others: these have no resized copies, and may be unreadable."""
    data = config.data if own else replace(config.data, materialised="")
    return ImageLoader(
        task.source(data, samples),
        batch_size=config.evaluate.batch_size,
        workers=data.workers,
        max_unreadable=data.max_unreadable if own else 1.0,
        box_crop=data.box_crop,
        progress=state.is_main_process,
        pin=state.device.type == "cuda",
    )


def _embed(
    task: ClipTask, config: Config, samples: Sequence[Sample], todo: Sequence[int], parts: Parts, state: PartialState
) -> None:
    """Embed images in order and write them in parts.

    Args:
        task: the model.
        config: how images are read.
        samples: all N of them.
        todo: positions of those to embed.
        parts: where they go.
        state: accelerate's.
    """
    wanted = [samples[position] for position in todo]
    loader = _loader(task, config, wanted, state, own=False)
    embed = task.embedder(precision=config.train.precision)
    positions: list[int] = []
    rows: list[NDArray[np.float32]] = []
    covered = failed = 0

    def write(end: int) -> None:
        """Write what lies before `end`: the loader goes in order, so what it did not give there is unreadable."""
        nonlocal covered, failed
        missing = sorted(set(range(covered, end)) - set(positions))
        reasons = [reason for _, reason in loader.unreadable[failed : failed + len(missing)]]
        unreadable = {todo[index]: reason for index, reason in zip(missing, reasons, strict=True)}
        if positions or unreadable:
            embeddings = np.concatenate(rows) if rows else np.empty((0, 0), dtype=np.float32)
            parts.write([todo[index] for index in positions], embeddings, unreadable)
        covered, failed = end, failed + len(missing)
        positions.clear()
        rows.clear()

    num_read = 0
    for batch, images_BCHW in loader.batches(wanted):
        positions.extend(int(index) for index in batch)
        rows.append(embed(images_BCHW).cpu().numpy())
        num_read += len(batch)
        if num_read + len(loader.unreadable) - covered >= PART:
            write(num_read + len(loader.unreadable))
    write(len(todo))


def _calibration(task: ClipTask, config: Config, split: Split, state: PartialState) -> Calibration:
    """Fit the temperature on the images of a select split.

    Raises:
        DataError: too many of them cannot be read.
        RunError: a logit is NaN or infinite.
    """
    loader = _loader(task, config, split.samples, state, own=True)
    positions, (embeddings,) = predict([lambda: task.embedder(precision=config.train.precision)], loader.batches(split.samples))
    labels = [split.samples[int(position)].label for position in positions]
    return Calibration.of(_logits(task, embeddings.numpy()), labels, split.name)


def _logits(task: ClipTask, embeddings_nD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return class logits [n, K] of embeddings.

    Raises:
        RunError: one of them is NaN or infinite.
    """
    if not len(embeddings_nD):
        return np.empty((0, task.dataset.num_classes), dtype=np.float32)
    of = task.class_logits()
    logits_nK = torch.cat([of(rows).cpu() for rows in torch.from_numpy(embeddings_nD).split(8 * PART)])
    if not bool(torch.isfinite(logits_nK).all()):
        raise RunError("the run's model gives logits that are NaN or infinite: broken weights, or try --set train.precision=no")
    return logits_nK.numpy()


def _tell(
    options: PredictOptions,
    inputs: Inputs,
    unreadable: dict[str, str],
    calibration: Calibration | None,
    not_calibrated: str,
    issues: int | None,
) -> None:
    """Print what was written."""
    print(f"{len(inputs.samples) - len(unreadable)} images predicted: {options.out}")
    if calibration is None:
        print(f"probabilities are not calibrated: {not_calibrated}")
    else:
        told = f"probabilities are calibrated: temperature {calibration.temperature:.3f}, fitted on {calibration.n} images of "
        told += f"{calibration.split}; calibration error there {percent(calibration.ece_before)} % before, "
        print(f"{told}{percent(calibration.ece_after)} % after")
    if options.embeddings is not None:
        print(f"image features: {options.embeddings}")
    if issues is not None:
        print(f"{issues} likely label errors: {options.issues}")
    if unreadable:
        print(f"{len(unreadable)} images cannot be read, see the column error:")
        for reason in list(unreadable.values())[:SHOWN_UNREADABLE]:
            print(f"  {reason}")
        if len(unreadable) > SHOWN_UNREADABLE:
            print(f"  and {len(unreadable) - SHOWN_UNREADABLE} more")
