"""Evaluation of a run on other test sets, before and after finetuning: shifts and forgetting.

Alpha 0 is the pretrained model and alpha 1 the finetuned one, both zero-shot over the set's own classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flyp_saflex.errors import ConfigError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.storage.results import align, percent
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
    """Evaluate a run on other test sets and print accuracy before and after finetuning.

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
        ConfigError: a set that is not written NAME=PATH, or a name twice.
        UserError: as `evaluate`.
    """
    places = dict(_parsed(text) for text in sets)
    if len(places) < len(sets):
        raise ConfigError(f"--on: a name is there twice ({', '.join(sets)}), expected one path per name; give each its own name")
    found = {}
    for name, path in places.items():
        moved = [f"data.root={path}", "data.prompts=", "data.shots=0", "data.add_to_train=[]"]
        moved += ["data.materialised=", "data.box_crop=false", "evaluate.select_split="]
        found[name] = evaluate(
            run,
            wise_alphas=sorted({0.0, *(wise_alphas or ())}),
            overrides=[*overrides, *moved],
            limit=limit,
            dry_run=dry_run,
            on=name,
        )
    if not dry_run:
        print(_table(found))
    return found


def _parsed(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and name.strip() and path.strip()):
        raise ConfigError(f"--on {text}: expected NAME=PATH, for example imagenet-v2=/data/imagenetv2 ({', '.join(TEST_SETS)})")
    return name.strip(), path.strip()


def _table(found: dict[str, dict[str, Any]]) -> str:
    lines = [["set", "images", "before", "after", "change"]]
    for name, results in found.items():
        rows = {row["wise_alpha"]: row for row in results["results"] if row["split"] == "test"}
        before, after = rows[0.0]["accuracy"], rows[1.0]["accuracy"]
        lines.append([name, str(rows[1.0]["n"]), percent(before), percent(after), f"{100 * (after - before):+.1f}"])
    return "accuracy, zero-shot over each set's classes, percent (change in points):\n" + align(lines, left=1)
