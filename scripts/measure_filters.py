"""Measure ALIA's filters, and SAFLEX's weights, on a demo's edits, where a judge can say what became of each.

    flyp-saflex demo --out DIR
    python scripts/measure_filters.py DIR          # needs the classifier of scripts/measure_tiny_editor.py

Truth is the judge's word, which is right in the percentage of cases that measure_tiny_editor.py prints: an edit is `corrupted`
if the judge sees another class than the label's, and `unchanged` if it sees the source's own place with its class kept although
another place was asked for. Per filter: how many edits it flags, precision and recall.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from measure_tiny_editor import PLACE_NAMES, Judge, judged
from numpy.typing import NDArray

from flyp_saflex.demo.world import FOLDER, read_scenes
from flyp_saflex.filtering.alia import precision_recall
from flyp_saflex.images.decode import read_image
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.run_folder import RunDir


def measure(home: Path, judge: Judge) -> None:
    """Print the figures of one seed of a demo."""
    cache = AugmentCache.open(home / "augment_cache", "iwildcam")
    scores = cache.scores()
    scenes = read_scenes(home / "world" / FOLDER)
    edits = cache.edits
    place_N, class_N = judged(judge, np.stack([np.asarray(read_image(edit.path)) for edit in edits]))
    source_N = np.array([PLACE_NAMES.index(scenes[Path(edit.source_id).name].place) for edit in edits])
    asked_N = np.array([next(n for n, name in enumerate(PLACE_NAMES) if name in edit.instruction) for edit in edits])
    corrupted_N = class_N != np.array([edit.label for edit in edits])
    unchanged_N = ~corrupted_N & (place_N == source_N) & (asked_N != source_N)
    print(
        f"\n{home}: {len(edits)} edits; place as asked {np.mean(place_N == asked_N):.1%}, class kept {np.mean(~corrupted_N):.1%}"
    )
    truths = {"semantic": corrupted_N, "corrupted": corrupted_N, "unchanged": unchanged_N}
    rows = [scores[edit.aug_id] for edit in edits]
    flags = {
        "semantic": np.array([row["semantic_pass"] is False for row in rows]),
        "corrupted": np.array([row["corrupted"] is True for row in rows]),
        "unchanged": np.array([row["unchanged"] is True for row in rows]),
    }
    print("| filter | flags | truly so | precision | recall |\n|---|--:|--:|--:|--:|")
    for name, flagged_N in flags.items():
        found = precision_recall(flagged_N, truths[name])
        shares = ("-" if share is None else f"{share:.2f}" for share in (found.precision, found.recall))
        print(f"| {name} | {found.num_flagged} | {found.num_true} | {' | '.join(shares)} |")
    kept_N = np.array([row["keep"] for row in rows])
    print(f"both filters: {_shares(kept_N, corrupted_N)}")
    truth = {edit.aug_id: bool(corrupted) for edit, corrupted in zip(edits, corrupted_N, strict=True)}
    used = list(RunDir(home / "runs" / "flyp-edits-saflex", lock=False).read_rows("augmented.jsonl"))
    weights_N, used_corrupted_N = np.array([row["weight"] for row in used]), np.array([truth[row["id"]] for row in used])
    print(f"SAFLEX, all steps together: {_shares(weights_N > 0, used_corrupted_N)}")


def _shares(kept_N: NDArray[np.bool_], corrupted_N: NDArray[np.bool_]) -> str:
    good, bad = kept_N[~corrupted_N].mean(), kept_N[corrupted_N].mean()
    return f"keep {good:.0%} of the edits that kept their class and {bad:.0%} of the others"


def main() -> None:
    """Measure every seed of a demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder that `flyp-saflex demo` made")
    parser.add_argument("--judge", type=Path, default=Path("tiny_editor_judge.pt"), help="file that keeps the classifier")
    arguments = parser.parse_args()
    if not arguments.judge.is_file():
        parser.error(f"{arguments.judge} is missing: run scripts/measure_tiny_editor.py first")
    judge = Judge()
    judge.load_state_dict(torch.load(arguments.judge, weights_only=True))
    made_with = json.loads((arguments.demo / "demo.json").read_text(encoding="utf-8"))
    print(f"demo of {made_with['num_images']} pictures")
    for home in sorted(arguments.demo.glob("seed*")):
        measure(home, judge.eval())


if __name__ == "__main__":
    main()
