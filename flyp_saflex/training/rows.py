"""From batches of the reader to the tensors of a step, and SAFLEX's validation rows (floor 3, shared by stages)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import get_all_start_methods
from typing import Any

import torch
from torch.utils.data import DataLoader

from flyp_saflex.data.registry import split_for
from flyp_saflex.records import Edit, Sample
from flyp_saflex.saflex import baselines
from flyp_saflex.saflex.settings import SaflexSettings
from flyp_saflex.step.step import StepResult, Validation
from flyp_saflex.tasks.feature_cache import ActivationStore
from flyp_saflex.tasks.proxy_classes import Rows
from flyp_saflex.training.sampling import Batch, BatchReader, Plan, Row, Stream, derived_seed
from flyp_saflex.training.setup import MIXES, Job

KEEP_BYTES = 2 * 2**30
"""Validation rows up to this size are read once and kept on the device; larger ones are read at every refresh."""


def read_steps(
    job: Job, store: ActivationStore | None, first: int, end: int, rank: int = 0, num_processes: int = 1
) -> Iterator[list[Batch]]:
    """Yield the accumulated parts of each step from `first` to before `end`, as this process reads them."""
    parts = job.config.train.accumulation
    reader = BatchReader(
        partial(_rows_of, job.plan, first, parts, rank, num_processes),
        (end - first) * parts,
        job.dataset.train.samples,
        job.edits,
        job.reader,
        on_train=job.on_train,
        on_augmented=job.on_augmented,
        box_crop=job.config.data.box_crop,
        stored=store.read if store is not None else None,
    )
    workers = job.config.data.workers if store is None else 0
    # A forked worker has samples and index at once; any other is sent them.
    method = "fork" if workers and "fork" in get_all_start_methods() else None
    loader = DataLoader(
        reader,
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
        multiprocessing_context=method,
        pin_memory=job.on_cuda,
    )
    collected: list[Batch] = []
    for batch in loader:
        collected.append(batch)
        if len(collected) == parts:
            yield collected
            collected = []


def _rows_of(plan: Plan, first: int, parts: int, rank: int, num_processes: int, number: int) -> list[Row]:
    """Return the rows of the `number`-th batch of a process that starts at step `first`."""
    step, part = divmod(number, parts)
    return plan.shard(first + step, rank, num_processes, part, parts)


class RowBuilder:
    """Puts labels and captions to images, and mixes augmented rows if the recipe says so."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.mix = next((name for name in job.config.augment.upstream if name in MIXES), None)

    def items(self, batch: Batch) -> list[Sample | Edit]:
        """Return what each row of a batch was read from."""
        return [self._source(row)[int(index)] for row, index in zip(batch.rows, batch.indices, strict=True)]

    def names(self, batch: Batch) -> list[str]:
        """Return the identity of every row of a batch."""
        return [item.aug_id if isinstance(item, Edit) else item.sample_id for item in self.items(batch)]

    def build(self, batch: Batch, step: int, part: int) -> Rows:
        """Return the rows of a part of a step, on the device, behind the frozen blocks."""
        job, device = self.job, self.device
        items = self.items(batch)
        seeds = [derived_seed(row.seed, "caption") for row in batch.rows]
        captions_N = torch.tensor(
            [job.captions.of_row(item, seed) for item, seed in zip(items, seeds, strict=True)], device=device
        )
        labels_N = torch.tensor([item.label for item in items], device=device)
        inputs = batch.inputs.to(device, non_blocking=True)
        rows = Rows(inputs, captions_N, labels_N, batch.indices.to(device), batch.num_train)
        if self.mix is not None and len(items) > batch.num_train:
            self._mix(rows, step, part)
        if job.config.train.frozen_cache == "" and job.learner.tower.num_frozen:
            few = job.config.train.rows_at_once or len(items)
            with torch.no_grad():
                rows.inputs = torch.cat([job.learner.tower.lower(inputs) for inputs in rows.inputs.split(few)])
        return rows

    def describe(self, step: int, results: list[StepResult]) -> list[dict[str, Any]]:
        """Return one record per augmented row of a step: identity, weight, gain of its label, learned (soft) label."""
        source = self.job.edits if self.job.edits is not None else self.job.dataset.train.samples
        records = []
        for result in results:
            for place, index in enumerate(result.ids_A.tolist()):
                item = source[index]
                record: dict[str, Any] = {
                    "step": step,
                    "id": item.aug_id if isinstance(item, Edit) else item.sample_id,
                    "label": item.label,
                    "weight": float(result.weights_A[place]),
                }
                if result.gains_A is not None and result.top_labels_AJ is not None and result.top_shares_AJ is not None:
                    record["gain"] = float(result.gains_A[place])
                    labels = [self._class_of(top) for top in result.top_labels_AJ[place].tolist()]
                    record["learned_label"] = labels[0]
                    record["soft_labels"] = soft_label(labels, result.top_shares_AJ[place].tolist())
                records.append(record)
        return records

    def _class_of(self, label: int) -> int | None:
        """Return the class of a label choice; None for a sample's own caption, which names no class."""
        if self.job.is_linear or self.job.config.train.method == "ce-text":
            return label
        templates = self.job.captions.num_templates
        return label // templates if label < self.job.dataset.num_classes * templates else None

    def _source(self, row: Row) -> Any:
        return self.job.edits if row.kind == "augmented" and self.job.edits is not None else self.job.dataset.train.samples

    def _mix(self, rows: Rows, step: int, part: int) -> None:
        """Mixup or CutMix among the augmented rows; training rows keep their images and labels."""
        augment, first = self.job.config.augment, rows.num_train
        generator = torch.Generator().manual_seed(derived_seed(self.job.config.seed, "mix", step, part))
        images = rows.inputs[first:]
        alpha = augment.mixup_alpha if self.mix == "mixup" else augment.cutmix_alpha
        share, partner = baselines.draw_mix(len(images), alpha, generator)
        partner = partner.to(self.device)
        own_A = torch.eye(len(images), device=self.device)
        if self.mix == "mixup":
            mixed, mass_AA = baselines.mixup(images, own_A, share, partner)
        else:
            mixed, mass_AA = baselines.cutmix(images, own_A, share, partner, generator)
        everyone = torch.arange(len(rows.labels_N), device=self.device)
        everyone[first:] = first + partner
        rows.partners_N, rows.partner_labels_N = rows.captions_N[everyone], rows.labels_N[everyone]
        rows.share_N = torch.ones(len(everyone), device=self.device)
        rows.share_N[first:] = mass_AA.diagonal()
        rows.inputs = torch.cat([rows.inputs[:first], mixed])


def soft_label(labels: list[int | None], shares: list[float]) -> list[tuple[int | None, float]]:
    """Return (class, share) with the largest share first; captions of one class are added up, shares below 0.005 left out."""
    total: dict[int | None, float] = {}
    for label, share in zip(labels, shares, strict=True):
        total[label] = total.get(label, 0.0) + share
    return sorted(((label, round(share, 3)) for label, share in total.items() if share >= 0.005), key=lambda pair: -pair[1])


class ValidationRows:
    """The rows behind SAFLEX's validation gradient: a split of role `select`, in parts or whole."""

    def __init__(self, job: Job, store: ActivationStore | None, device: torch.device) -> None:
        self.job, self.store, self.device = job, store, device
        self.samples = split_for(job.dataset, job.config.saflex.validation_split, "select").samples
        self._whole: Validation | None = None

    def at(self, step: int, settings: SaflexSettings) -> Validation:
        """Return the validation rows of the refresh before `step`; of a bank those that it renews."""
        num_samples = len(self.samples)
        size = min(settings.validation_rows or num_samples, num_samples)
        stream = Stream(num_samples, derived_seed(self.job.config.seed, "validation"))
        renewed = settings.validation_renewed if settings.scope == "head" else 0
        if self.job.saflex is None or not 0 < renewed < size:
            if size == num_samples:
                return self._of(list(range(num_samples)))
            return self._of(stream.take(step // settings.refresh_every * size, size))
        bank = self.job.saflex.bank
        slots = bank.next_slots(size, renewed)
        rows = self._of(slots if size == num_samples else stream.take(bank.num_read, len(slots)))
        return replace(rows, slots_V=torch.tensor(slots, device=self.device))

    def _of(self, positions: list[int]) -> Validation:
        """Return these rows, from memory if the whole split is there."""
        whole = self._whole
        if whole is None:
            validation = self._read([self.samples[position] for position in positions])
            if positions == list(range(len(self.samples))) and validation.inputs.nbytes <= KEEP_BYTES:
                self._whole = validation
            return validation
        if len(positions) == len(self.samples):
            return whole
        chosen = torch.tensor(positions, device=self.device)
        return Validation(whole.inputs[chosen], whole.labels_V[chosen], whole.captions_V[chosen])

    def _read(self, samples: list[Sample]) -> Validation:
        job = self.job
        positions, parts = [], []
        for found, read in (self.store or job.loader()).batches(samples):
            positions += found
            with torch.no_grad():
                inputs = read.to(self.device)
                parts.append(inputs if self.store is not None else job.learner.tower.lower(inputs))
        labels_V = torch.tensor([samples[position].label for position in positions], device=self.device)
        captions_V = labels_V * job.captions.num_templates
        return Validation(torch.cat(parts), labels_V, captions_V)
