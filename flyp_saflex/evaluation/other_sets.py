"""Evaluation of a run on other test sets, before and after finetuning: shifts and forgetting.

Alpha 0 is the pretrained model and alpha 1 the finetuned one, both zero-shot over the set's own classes. With a limit of
forgetting (`evaluate.max_forgetting`) the sets also restrict which alpha the run's own select split may choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.state import PartialState

from flyp_saflex.errors import ConfigError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.evaluation.load_run import open_run
from flyp_saflex.storage.results import align, percent, read_results
from flyp_saflex.tables import TEST_SETS


def evaluate_on(
    run: Path,
    sets: Sequence[str],
    *,
    wise_alphas: Sequence[float] | None = None,
    overrides: Iterable[str] = (),
    limit: int | None = None,
    dry_run: bool = False,
) -> dict[str, dict[str, Any]]:
    """Evaluate a run on other test sets, print accuracy before and after finetuning, and choose alpha if forgetting is limited.

    Args:
        run: run folder.
        sets: `NAME=PATH`; a name in `tables.TEST_SETS`, or any other for a folder of class folders.
        wise_alphas: further alphas between the pretrained (0) and the finetuned model (1).
        overrides: `section.field=value`.
        limit: use at most this many images of each set.
        dry_run: run all checks, load no model, write nothing.

    Returns:
        What the results file of each set holds, by name.

    Raises:
        ConfigError: a set that is not written NAME=PATH, or a name twice; a limit of forgetting without select split.
        UserError: as `evaluate`.
    """
    places = dict(_parsed(text) for text in sets)
    if len(places) < len(sets):
        raise ConfigError(f"--on: a name is there twice ({', '.join(sets)}), expected one path per name; give each its own name")
    run, overrides = Path(run), tuple(overrides)
    config = open_run(run, overrides)
    alphas = sorted({0.0, 1.0, *(config.evaluate.wise_alphas if wise_alphas is None else wise_alphas)})
    limits = config.evaluate.max_forgetting < 1 or _is_limited(run)
    select = config.evaluate.select_split or config.train.select_split
    if limits and not select:
        raise ConfigError("evaluate.max_forgetting chooses alpha by the select split: set evaluate.select_split")
    found = {}
    for name, path in places.items():
        moved = [f"data.root={path}", "data.prompts=", "data.shots=0", "data.add_to_train=[]"]
        moved += ["data.materialised=", "data.box_crop=true", "evaluate.select_split=", "evaluate.max_forgetting=1"]
        found[name] = evaluate(run, wise_alphas=alphas, overrides=[*overrides, *moved], limit=limit, dry_run=dry_run, on=name)
    lost = {} if dry_run else losses(found)
    if lost and PartialState().is_main_process:
        print(_table(found, lost))
    if limits:
        told = {"limit": config.evaluate.max_forgetting, "sets": list(places), "by_alpha": {f"{a}": x for a, x in lost.items()}}
        _choose(run, select, alphas, None if dry_run else told, overrides=overrides, limit=limit, dry_run=dry_run)
    return found


def losses(found: Mapping[str, Mapping[str, Any]]) -> dict[float, float]:
    """Return by alpha the largest loss of zero-shot accuracy on any set, against the pretrained model.

    Args:
        found: what the results file of each set holds, by name; rows at alpha 0 and at the same further alphas in each.

    Returns:
        Fractions; negative where every set has gained.
    """
    accuracy = [{row["wise_alpha"]: row["accuracy"] for row in results["results"]} for results in found.values()]
    shared = sorted(set.intersection(*(set(rows) for rows in accuracy)))
    return {alpha: max(rows[0.0] - rows[alpha] for rows in accuracy) for alpha in shared}


def _choose(
    run: Path,
    select: str,
    alphas: Sequence[float],
    told: Mapping[str, Any] | None,
    *,
    overrides: Sequence[str],
    limit: int | None,
    dry_run: bool,
) -> None:
    """Evaluate the run's own select split at the same alphas, and choose among those within the limit."""
    chosen = evaluate(
        run, splits=[select], wise_alphas=alphas, overrides=overrides, limit=limit, dry_run=dry_run, forgetting=told
    )
    if told is not None and PartialState().is_main_process:
        alpha = chosen["chosen_alpha"]
        print(
            f"alpha {alpha:g} is the best on {select} among those that lose at most {percent(told['limit'])} points on each set "
            f"({told['by_alpha'][str(alpha)] * 100:+.1f} on the worst)"
        )


def _is_limited(run: Path) -> bool:
    return (run / "results.json").is_file() and "forgetting" in read_results(run)


def _parsed(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and name.strip() and path.strip()):
        raise ConfigError(f"--on {text}: expected NAME=PATH, for example imagenet-v2=/data/imagenetv2 ({', '.join(TEST_SETS)})")
    return name.strip(), path.strip()


def _table(found: Mapping[str, Mapping[str, Any]], lost: Mapping[float, float]) -> str:
    lines = [["set", "images", "before", "after", "change"]]
    for name, results in found.items():
        rows = {row["wise_alpha"]: row for row in results["results"] if row["split"] == "test"}
        before, after = rows[0.0]["accuracy"], rows[1.0]["accuracy"]
        lines.append([name, str(rows[1.0]["n"]), percent(before), percent(after), f"{100 * (after - before):+.1f}"])
    text = "accuracy, zero-shot over each set's classes, percent (change in points):\n" + align(lines, left=1)
    if len(lost) > 2:
        text += "\nforgetting, the largest loss on any set, points by alpha: "
        text += ", ".join(f"{alpha:g} {100 * loss:.1f}" for alpha, loss in lost.items())
    return text
