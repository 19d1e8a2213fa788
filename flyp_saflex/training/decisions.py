"""Decisions about cached edits before training, from evidence of the pretrained model or from what their rows state."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flyp_saflex.saflex.evidence import Decision, decide
from flyp_saflex.storage.edits import aug_ids_of
from flyp_saflex.training.inter_class import stated_labels
from flyp_saflex.training.sampling import derived_seed
from flyp_saflex.training.setup import Setup

FILE = "decisions.safetensors"


@dataclass(frozen=True)
class Decisions:
    """Weight and label of every cached edit.

    Attributes:
        weights_N: 0..1.
        labels_N2: the two likeliest classes.
        shares_N: share of the first of them, above 0; 1: the label is one-hot. Of evidence 0.5 or more.
        seconds: time that the evidence took when the decisions were made.
        posteriors_N2: probabilities that an edit shows its upstream label, and that it shows none of the classes; None where the
            evidence could not be calibrated, and in folders of earlier versions.
    """

    weights_N: Tensor
    labels_N2: Tensor
    shares_N: Tensor
    seconds: float = 0.0
    posteriors_N2: Tensor | None = None

    @classmethod
    def of(cls, decision: Decision, own_N: Tensor) -> Decisions:
        """Keep the candidates of each edit: at most two.

        Args:
            decision: on all edits.
            own_N: the label that each edit came with.
        """
        shares_NK = torch.where(decision.candidates_NK, decision.labels_NK, torch.zeros_like(decision.labels_NK))
        top_N2, labels_N2 = shares_NK.topk(2, dim=1)
        total_N = top_N2.sum(dim=1)
        shares_N = torch.where(total_N > 0, top_N2[:, 0] / total_N.clamp(min=1e-12), torch.ones_like(total_N))
        posterior_NJ = decision.verdict.posterior_NJ.float().cpu()
        posteriors_N2 = torch.stack([posterior_NJ.gather(1, own_N[:, None])[:, 0], posterior_NJ[:, -1]], dim=1)
        calibrated = decision.status == "calibrated"
        weights_N = decision.weights_N.float()
        return cls(weights_N, labels_N2, shares_N.float(), posteriors_N2=posteriors_N2 if calibrated else None)


def decide_about_edits(setup: Setup, accelerator: Accelerator, run: Path) -> Decisions | None:
    """Return the decisions of a run, made now or read from its folder; None where none are asked for.

    They are made with the weights that the task has now: call it before a checkpoint is restored.

    Args:
        setup: of the run; SAFLEX is told rho.
        accelerator: processes share the work.
        run: folder that keeps the decisions.
    """
    saflex, edits, augment = setup.saflex, setup.edits, setup.config.augment
    if augment.inter_class != "source" and edits is not None:
        labels_N2, shares_N = stated_labels(edits, setup.dataset.class_names, augment.inter_class, augment.inter_class_gamma)
        return Decisions(torch.ones(len(edits)), labels_N2, shares_N)
    if saflex is None or not saflex.settings.evidence or edits is None:
        return None
    kinds, threshold = saflex.settings.evidence, saflex.settings.evidence_threshold
    stored = _read(run / FILE, key := _key(setup))
    if stored is None:
        accelerator.print(f"evidence on {len(edits)} edits: {', '.join(kinds)}")
        started = time.monotonic()
        found = setup.task.edit_evidence(
            kinds,
            edits,
            setup.loader(progress=accelerator.is_main_process),
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        own_N = torch.tensor([edit.label for edit in edits])
        decision = decide(found, own_N, threshold=threshold)
        made = Decisions.of(decision, own_N)
        stored = {
            "weights": made.weights_N,
            "labels": made.labels_N2,
            "shares": made.shares_N,
            "rho": torch.tensor(decision.rho),
            "kept": torch.tensor(decision.kept_fraction),
            "relabelled": torch.tensor(decision.relabelled_fraction),
            "names": torch.tensor([derived_seed(aug_id) for aug_id in aug_ids_of(edits)]),
            "seconds": torch.tensor(time.monotonic() - started),
        } | ({} if made.posteriors_N2 is None else {"posteriors": made.posteriors_N2})
        told = {"calibrated": f"rho = {decision.rho:.2f}", "too few": "too few edits to calibrate: all are kept"}
        accelerator.print(
            f"evidence: {told.get(decision.status, 'it says nothing about the labels: all edits are kept')}; "
            f"{decision.kept_fraction:.0%} of the edits are kept, {decision.relabelled_fraction:.1%} under another class"
        )
        if accelerator.is_main_process:
            save_file(stored, run / FILE, metadata={"key": key})
    saflex.evidence_row = {name: float(stored[name]) for name in ("rho", "relabelled") if stored[name].isfinite()}
    seconds, posteriors_N2 = float(stored["seconds"]), stored.get("posteriors")
    return Decisions(stored["weights"], stored["labels"], stored["shares"], seconds, posteriors_N2)


@dataclass(frozen=True)
class Recorded:
    """Decisions as a run's folder keeps them.

    Attributes:
        by_name: weight and likeliest class, by `derived_seed(aug_id)`.
        is_calibrated: whether the evidence could tell edits apart; if not, all are kept as they came.
    """

    by_name: dict[int, tuple[float, int]]
    is_calibrated: bool


def recorded_decisions(run: Path) -> Recorded | None:
    """Return a run's decisions about its edits before training; None where there are none, or none with names."""
    try:
        stored = load_file(run / FILE)
    except (OSError, SafetensorError):
        return None
    if "names" not in stored:  # an older version
        return None
    rows = zip(stored["names"].tolist(), stored["weights"].tolist(), stored["labels"][:, 0].tolist(), strict=True)
    return Recorded({name: (weight, label) for name, weight, label in rows}, bool(stored["rho"].isfinite()))


def _key(setup: Setup) -> str:
    """Return a digest of what the decisions depend on but the pretrained weights."""
    settings = setup.config.saflex
    parts = [*aug_ids_of(setup.edits or ()), *settings.evidence, str(settings.evidence_threshold)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return what a run decided earlier, if it was about the same edits."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
        return load_file(path)
    except (OSError, SafetensorError):
        return None
