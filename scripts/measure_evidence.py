"""Measure how well evidence tells good edits from bad ones, without any training.

    python scripts/beds/make.py pacs --data PACS --out runs/beds/pacs
    python scripts/measure_evidence.py scripts/beds/pacs.toml --set data.root=PACS --set model.name=local-dir:CLIP \
        --set cache.root=runs/beds/pacs/edits --seeds 0-4 --rates 0,0.25,0.5,0.75

`{seed}` in an override stands for the seed: biased cameras have a world each (`data.root=.../worlds/seed{seed}`).
The truth is that of the entries' `oracle.jsonl`. Printed are, for each kind of evidence, for their plain and for their weighted
sum, means over seeds:

    AUC          good against bad edits by the margin of the own label, under all bad, swapped, and other bad ones
    rho          estimated share of wrong labels
    kept         mean weight (and share with a weight above 0) of good, of swapped and of other bad edits
    true class   share of the swapped edits' weight that is on the class which they show
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from flyp_saflex import AugmentCache, recipe, runtime
from flyp_saflex.clip.image_tower import ImageTower, num_blocks
from flyp_saflex.clip.model import Clip, load_clip
from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.records import Dataset, Edit, Sample
from flyp_saflex.saflex.evidence import combine, decide, on_grid, own_source_evidence, source_evidence
from flyp_saflex.saflex.null_rule import margins

sys.path.append(str(Path(__file__).resolve().parent / "beds"))
from number_lists import numbers

MIDDLE = 0.7
"""Depth of the middle layer, a fraction of the tower's blocks."""
THRESHOLDS = (0.5, 0.2)
SETS = {
    "zero-shot": ("zero-shot",),
    "source, final": ("final",),
    "source, middle": ("middle",),
    "own source, final": ("own final",),
    "own source, middle": ("own middle",),
    "weighted: zero-shot + final": ("zero-shot", "final"),
    "weighted: zero-shot + final + middle": ("zero-shot", "final", "middle"),
    "sum: zero-shot + final + middle": ("zero-shot", "final", "middle"),
}


class Features:
    """Final embedding and middle layer of pictures; a file with the same bytes is read once."""

    def __init__(self, clip: Clip) -> None:
        blocks = num_blocks(clip.model.visual)
        self.tower = ImageTower(clip.model.visual, max(1, round(MIDDLE * blocks)))
        self.loader = ImageLoader(clip.preprocess, batch_size=64)
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def of(self, items: Sequence[Sample | Edit]) -> tuple[Tensor, Tensor]:
        """Return embeddings [N, D] of length 1 and middle features [N, C * 16]."""
        digests = [hashlib.sha256(Path(item.item).read_bytes()).hexdigest() for item in items]
        new = {digest: item for digest, item in zip(digests, items, strict=True) if digest not in self.known}
        names = list(new)
        for positions, images in self.loader.batches(list(new.values())):
            hidden = self.tower.lower(images)
            rows = zip(normalize(self.tower(hidden), dim=1), on_grid(hidden).half(), strict=True)
            self.known |= {names[position]: row for position, row in zip(positions, rows, strict=True)}
        final, middle = zip(*(self.known[digest] for digest in digests), strict=True)
        return torch.stack(final), torch.stack(middle).float()


def evidence(clip: Clip, features: Features, dataset: Dataset, edits: Sequence[Edit]) -> tuple[dict[str, Tensor], Tensor]:
    """Return every kind of evidence on the edits, and the labels that they came with."""
    used = {edit.source_id for edit in edits}
    sources = [sample for sample in dataset.train.samples if sample.sample_id in used]
    place = {sample.sample_id: number for number, sample in enumerate(sources)}
    labels_S = torch.tensor([sample.label for sample in sources])
    own_N = torch.tensor([edit.label for edit in edits])
    source_N = torch.tensor([place[edit.source_id] for edit in edits])
    groups_N = instructions(edits, dataset.class_names)
    head_KD = zero_shot_head(clip, dataset.class_names, dataset.templates)
    (final_SD, middle_SD), (final_ND, middle_ND) = features.of(sources), features.of(edits)
    found = {"zero-shot": (clip.model.logit_scale.exp().detach() * final_ND @ head_KD.T).log_softmax(dim=1)}
    for name, of_edits, of_sources in (("final", final_ND, final_SD), ("middle", middle_ND, middle_SD)):
        found[name] = source_evidence(of_edits, of_sources, labels_S, groups_N, len(head_KD))
        found[f"own {name}"] = own_source_evidence(of_edits, of_sources, labels_S, source_N, groups_N, len(head_KD))
    return found, own_N


def instructions(edits: Sequence[Edit], class_names: Sequence[str]) -> Tensor:
    """Return the index of each edit's instruction, without the class name: it must not be centred away."""
    texts = [edit.instruction.replace(class_names[edit.label], "{}") for edit in edits]
    index = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([index[text] for text in texts])


def measure(kinds: Mapping[str, Tensor], own_N: Tensor, true_N: Tensor, *, plain: bool) -> dict[str, float]:
    """Return the figures of one combination on one entry; `true_N` is -1 for edits that show no class."""
    if plain:
        kinds = {"sum": sum(combine({name: scores}, own_N).scores_NK for name, scores in kinds.items())}  # type: ignore[dict-item]
    scores_NK = combine(kinds, own_N).scores_NK
    margin_N = margins(scores_NK, scores_NK.isfinite())[torch.arange(len(own_N)), own_N]
    good_N, swapped_N = true_N == own_N, (true_N != own_N) & (true_N >= 0)
    bad = {"AUC": ~good_N, "AUC swapped": swapped_N, "AUC other": true_N < 0}
    figures = {name: auc(margin_N, good_N, bad_N) for name, bad_N in bad.items()}
    for threshold in THRESHOLDS:
        decision = decide(kinds, own_N, threshold=threshold)
        weights_N, mark = decision.weights_N, f" at {threshold:g}"
        figures["rho"] = decision.rho
        for name, rows_N in (("good", good_N), ("swapped", swapped_N), ("other", true_N < 0)):
            figures[f"weight {name}{mark}"] = mean(weights_N, rows_N)
            figures[f"kept {name}{mark}"] = mean((weights_N > 0).float(), rows_N)
        rows_N = swapped_N.nonzero()[:, 0]
        on_true_N = decision.labels_NK[rows_N, true_N[rows_N]] * weights_N[rows_N]
        figures[f"true class{mark}"] = float(on_true_N.sum() / weights_N[rows_N].sum()) if weights_N[rows_N].sum() > 0 else np.nan
    return figures


def auc(scores_N: Tensor, good_N: Tensor, bad_N: Tensor) -> float:
    """Return the AUC of good against bad edits; NaN without either."""
    either_N = good_N | bad_N
    if not good_N.any() or not bad_N.any():
        return float("nan")
    return float(roc_auc_score(good_N[either_N].numpy(), scores_N[either_N].numpy()))


def mean(values_N: Tensor, rows_N: Tensor) -> float:
    """Return the mean over some rows; NaN without any."""
    return float(values_N[rows_N].mean())


def table(rows: Mapping[tuple[float, str], list[dict[str, float]]]) -> str:
    """Return the means over seeds as a Markdown table."""
    head = ["rate", "evidence", "AUC (swapped, other)", "rho"]
    head += [f"{column} at {t:g}" for t in THRESHOLDS for column in ("good", "swapped", "true class", "other")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (rate, name), measured in rows.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN
            value = {key: float(np.nanmean([figures[key] for figures in measured])) for key in measured[0]}
        cells = [
            f"{rate:g}",
            name,
            f"{value['AUC']:.3f} ({value['AUC swapped']:.2f}, {value['AUC other']:.2f})",
            f"{value['rho']:.2f}",
        ]
        for mark in (f" at {t:g}" for t in THRESHOLDS):
            good, swapped, other = (
                f"{value[f'weight {kind}{mark}']:.2f} ({value[f'kept {kind}{mark}']:.2f})"
                for kind in ("good", "swapped", "other")
            )
            cells += [good, swapped, f"{value[f'true class{mark}']:.2f}", other]
        lines.append("| " + " | ".join(cells).replace("nan (nan)", "-").replace("nan", "-") + " |")
    return "\n".join(lines)


def settings(options: argparse.Namespace, seed: int, rate: float) -> Config:
    """Return the recipe of one entry."""
    chosen = [text.replace("{seed}", str(seed)) for text in options.set]
    return recipe.load(options.recipe, [*chosen, f"seed={seed}", f"cache.key=seed{seed}-rate{rate:g}"])


def main() -> None:
    """Measure what the command line names and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of the bed")
    parser.add_argument("--set", action="append", default=[], help="overrides of the recipe; {seed} stands for the seed")
    parser.add_argument("--seeds", type=numbers, default=numbers("0-4"))
    parser.add_argument("--rates", type=lambda text: [float(part) for part in text.split(",")], default=[0.0, 0.25, 0.5, 0.75])
    options = parser.parse_args()
    runtime.keep_freed_memory()
    found: dict[tuple[float, str], list[dict[str, float]]] = defaultdict(list)
    first = settings(options, options.seeds[0], options.rates[0])
    clip = load_clip(first.model.name, first.model.pretrained)
    for seed in options.seeds:
        features = Features(clip)
        dataset = load_dataset(settings(options, seed, 0.0).data, seed=seed)
        for rate in options.rates:
            cache = AugmentCache.open(first.cache.root, dataset.name, settings(options, seed, rate).cache.key)
            truth = cache.scores("oracle.jsonl")
            shown = [truth[edit.aug_id]["true_label"] for edit in cache.edits]
            kinds, own_N = evidence(clip, features, dataset, cache.edits)
            true_N = torch.tensor([-1 if label is None else label for label in shown])
            for name, chosen in SETS.items():
                figures = measure({kind: kinds[kind] for kind in chosen}, own_N, true_N, plain=name.startswith("sum"))
                found[rate, name].append(figures)
            print(f"seed {seed}, rate {rate:g}: {len(own_N)} edits", flush=True)
    print(table(dict(sorted(found.items(), key=lambda item: item[0][0]))))


if __name__ == "__main__":
    main()
