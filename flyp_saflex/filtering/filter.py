"""The command `flyp-saflex filter`: ALIA's filters, source consistency, CLIPScore and near duplicates; no edit is deleted.

The semantic filter is CLIP's zero-shot choice between positive and negative texts. The confidence filter asks a model trained
on the clean images whether an edit hardly changed or no longer shows its class (`alia.py`). Source consistency asks whether an
edit still resembles training images of its class; CLIP's directional similarity stands beside it (`scores.py`). CLIPScore asks
whether an edit fits the name of its class, with the dataset's caption templates, by a threshold (arXiv 2104.08718). Perceptual
hashes say whether an edit is nearly its source (`near_duplicate.py`). The cosine
between the CLIP embeddings of source and edit is always computed. Training reads the column `keep` with
`augment.filter = "scores"`.

With accelerate every process scores its share of the sources and their edits; the main process writes and prints.

Shapes: N edits, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, DataError, RunError
from flyp_saflex.evaluation.load_run import load_run
from flyp_saflex.filtering.alia import UNREADABLE, applied_thresholds, confidence_filter, keep
from flyp_saflex.filtering.inputs import Checked, check, plan_line
from flyp_saflex.filtering.near_duplicate import hash_distances
from flyp_saflex.filtering.scores import Scores, load_filter_clip, score_edits, thresholds
from flyp_saflex.filtering.summary import Scored, report
from flyp_saflex.offline import FilterConfig
from flyp_saflex.runtime import process_state, telling_lost_processes
from flyp_saflex.storage.augment_cache import SHEETS, AugmentCache
from flyp_saflex.tasks.clip_task import ClipTask


@telling_lost_processes("run filter again; the scores of before are as they were")
def filter_edits(config: Config, *, limit: int | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Score every edit of the cache entry, write the scores beside it, and print how many edits they drop.

    Args:
        config: recipe; `filter`, `cache`, `data`, `model` and `editor.prompts` are used. `data.shots` is ignored: edits of all
            training images are scored.
        limit: score only the edits of at most this many training images, and write no scores.
        dry_run: run all checks; load no weights, write nothing.

    Returns:
        The printed numbers (see `summary.report`). A dry run, and every process but the main one, return only the number of
        edits.

    Raises:
        ConfigError: an option is missing or cannot be used.
        DataError: no cache entry, one of another dataset, no texts, no edit that can be read.
        RunError: the run folder cannot be used, or its model knows other classes.
        ModelError: weights cannot be loaded.
    """
    checked = check(config, limit=limit)
    state = process_state(config.train.process_timeout_s)
    if state.is_main_process:
        for note in checked.notes:
            print(f"note: {note}")
        print(plan_line(config, checked, dry_run=dry_run), flush=True)
    if dry_run:
        return {"edits": len(checked.edits)}
    clip = load_filter_clip(config, state.device)
    model: ClipTask | None = None
    if checked.run is not None:  # activations behind frozen blocks exist for images of the dataset, not for edits
        plain = replace(checked.run, train=replace(checked.run.train, frozen_cache=""))
        task = load_run(Path(config.filter.run), plain, checked.run_dataset, device=state.device)
        if not isinstance(task, ClipTask):
            raise ConfigError(f"filter.run = {config.filter.run} is no CLIP model: give a run of flyp, ce-text or ce-linear")
        model = task
    threshold_K = thresholds(config, checked, model, state) if model else np.empty(0)
    scores = score_edits(config, checked, clip, model, state)
    if not state.is_main_process:
        return {"edits": len(checked.edits)}
    distance_N = np.empty(0)
    if checked.hashes:
        sources = {sample.sample_id: sample for sample in checked.dataset.train.samples}
        distance_N = hash_distances(checked.edits, sources, box_crop=config.data.box_crop)
    rows, flags = score_rows(checked, scores, threshold_K, config.filter, distance_N)
    if limit is None:
        _write(checked.cache, [*rows, *_unscored(checked)], config.cache.scores)
    scored = Scored(dataset=checked.dataset, edits=checked.edits, rows=rows, flags=flags, box_crop=config.data.box_crop)
    numbers = report(scored, checked.cache.folder / SHEETS, sheet_rows=config.filter.sheet_rows, drop=config.filter.drop)
    if limit is None:
        print(f'scores in {checked.cache.folder / config.cache.scores}; training reads them with augment.filter = "scores"')
    return numbers


def score_rows(
    checked: Checked,
    scores: Scores,
    threshold_K: NDArray[np.float64],
    options: FilterConfig,
    distance_N: NDArray[np.float64],
) -> tuple[list[dict[str, Any]], dict[str, NDArray[np.bool_]]]:
    """Return the rows of scores.jsonl of the scored edits, and flagged_N by verdict.

    A value of a row is None where its filter was not run or the edit cannot be read; the columns of source consistency, of
    CLIPScore and of the hashes (`distance_N`) are there only if they were run.
    """
    drop, rule = options.drop, options.rule
    readable_N = np.array([n not in scores.unreadable for n in range(len(checked.edits))])
    flags = {}
    if checked.texts is not None:
        flags["semantic"] = readable_N & ~(scores.log_odds_N >= 0)
    predicted_N = np.zeros(len(readable_N), dtype=int)
    threshold_N = np.zeros(len(readable_N))
    if checked.run is not None:
        labels_N = [edit.label for edit in checked.edits]
        found = confidence_filter(scores.probabilities_NK, labels_N, threshold_K, rule=rule)  # NaN is below every threshold
        flags |= {"unchanged": found.unchanged_N, "corrupted": found.corrupted_N}
        predicted_N = scores.probabilities_NK.argmax(axis=1)
        threshold_N = applied_thresholds(threshold_K, labels_N, predicted_N, rule)
    if checked.captions is not None:
        flags["foreign"] = readable_N & (scores.consistency_N < 0)  # NaN is never flagged
    if checked.clip_score:
        flags["low-score"] = readable_N & (scores.clip_score_N < options.min_clip_score)
    if checked.hashes:
        flags["near-duplicate"] = readable_N & (distance_N < options.min_hash_distance)  # NaN is never flagged
    flags[UNREADABLE] = ~readable_N
    keep_N = keep(flags, drop)
    rows = []
    for n, edit in enumerate(checked.edits):
        seen = bool(readable_N[n])
        asked = seen and checked.run is not None
        compared = seen and checked.texts is not None
        reasons = [name for name in drop if name in flags and flags[name][n]]
        predicted = int(predicted_N[n])
        rows.append(
            {
                "aug_id": edit.aug_id,
                "keep": bool(keep_N[n]),
                "reason": ", ".join(reasons) if seen else scores.unreadable[n],
                "semantic": _number(scores.log_odds_N[n]) if compared else None,
                "semantic_pass": not flags["semantic"][n] if compared else None,
                "predicted": predicted if asked else None,
                "confidence": _number(scores.probabilities_NK[n, predicted]) if asked else None,
                "threshold": _number(threshold_N[n]) if asked else None,
                "unchanged": bool(flags["unchanged"][n]) if asked else None,
                "corrupted": bool(flags["corrupted"][n]) if asked else None,
                "similarity": _number(scores.similarity_N[n]),
            }
        )
        if checked.captions is not None:
            rows[-1] |= {
                "source": _number(scores.consistency_N[n]) if seen else None,
                "foreign": bool(flags["foreign"][n]) if seen else None,
                "directional": _number(scores.directional_N[n]) if seen else None,
            }
        if checked.clip_score:
            rows[-1] |= {
                "clip_score": _number(scores.clip_score_N[n]) if seen else None,
                "low_score": bool(flags["low-score"][n]) if seen else None,
            }
        if checked.hashes:
            rows[-1] |= {
                "hash_distance": int(distance_N[n]) if np.isfinite(distance_N[n]) else None,
                "near_duplicate": bool(flags["near-duplicate"][n]) if seen else None,
            }
    return rows, flags


def _number(value: float) -> float | None:
    """Return a number for JSON, rounded; None for NaN and infinity."""
    return round(float(value), 6) if np.isfinite(value) else None


def _unscored(checked: Checked) -> list[dict[str, Any]]:
    """Return the rows of edits that are not scored, because their source is no training image."""
    scored = {edit.aug_id for edit in checked.edits}
    reason = "made from an image that is not trained on"
    return [{"aug_id": e.aug_id, "keep": False, "reason": reason} for e in checked.cache.edits if e.aug_id not in scored]


def _write(cache: AugmentCache, rows: list[dict[str, Any]], file: str) -> None:
    """Write the scores; replace those of an earlier run as a whole."""
    if (cache.folder / file).is_file():
        print(f"note: {cache.folder / file} of an earlier run is replaced as a whole")
    try:
        cache.write_scores(rows, file)
    except RunError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else str(error)
        raise DataError(
            f"scores {cache.folder / file} cannot be written: {reason}; free disk space and run filter again"
        ) from None
