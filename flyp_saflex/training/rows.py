"""Rows of a step, built from a batch of the reader, and SAFLEX's validation rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from flyp_saflex.data.registry import split_for
from flyp_saflex.presets import SaflexSettings
from flyp_saflex.records import Edit, Sample
from flyp_saflex.step.augmented_rows import StepResult
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tasks.feature_cache import FeatureCache
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.tasks.task import Processes
from flyp_saflex.training.batches import Batch
from flyp_saflex.training.decisions import Decisions
from flyp_saflex.training.sampling import Row, Stream, derived_seed
from flyp_saflex.training.setup import Setup
from flyp_saflex.training.views import ViewSource

KEEP_BYTES = 2 * 2**30
"""Validation rows up to this size are read once and kept on the device; larger ones are read at every refresh."""


class RowBuilder:
    """Labels and captions of a batch's inputs, and the mix of its augmented rows if asked for.

    Args:
        setup: of the run.
        device: where the rows go.
        decisions: labels and weights that evidence decided on.
        processes: rows are mixed with those of all processes, as a single process mixes them.
    """

    def __init__(
        self, setup: Setup, device: torch.device, decisions: Decisions | None = None, processes: Processes | None = None
    ) -> None:
        self.setup, self.device, self.decisions = setup, device, decisions
        self.processes = processes or Processes()

    def items(self, batch: Batch) -> list[Sample | Edit]:
        """Return the sample or edit that each row of a batch was read from."""
        return [self._source(row)[int(index)] for row, index in zip(batch.rows, batch.indices, strict=True)]

    def names(self, batch: Batch) -> list[str]:
        """Return the identity of every row of a batch."""
        return [_identity(item) for item in self.items(batch)]

    def build(self, batch: Batch, step: int, part: int) -> Rows:
        """Return the rows of a part of a step, on the device, behind the frozen part of the network."""
        setup, device, task = self.setup, self.device, self.setup.task
        items = self.items(batch)
        seeds = [derived_seed(row.seed, "caption") for row in batch.rows]
        captions_N = torch.tensor([task.caption_of(item, seed) for item, seed in zip(items, seeds, strict=True)], device=device)
        labels_N = torch.tensor([task.label_of(item) for item in items], device=device)
        inputs = batch.inputs.to(device, non_blocking=True)
        rows = Rows(inputs, captions_N, labels_N, batch.indices.to(device), batch.num_train)
        if self.decisions is not None:
            self._decide(rows, self.decisions, seeds)
        if setup.confidences:
            self._soften(rows, [row.seed for row in batch.rows])
        if setup.mix is not None and len(items) > batch.num_train:
            self._mix(rows, step, part)
        if task.network.num_frozen and not setup.config.train.frozen_cache:
            few = setup.config.train.rows_at_once or len(items)
            with torch.no_grad():
                rows.inputs = torch.cat([task.network.lower(inputs) for inputs in rows.inputs.split(few)])
        return rows

    def _decide(self, rows: Rows, decisions: Decisions, seeds: list[int]) -> None:
        """Put the labels and weights that evidence decided on to the augmented rows."""
        task, augmented = self.setup.task, range(rows.num_train, len(rows.labels_N))
        rows.prior_N = torch.ones(len(rows.labels_N), device=self.device)
        rows.share_N = torch.ones(len(rows.labels_N), device=self.device)
        partners_N, partner_labels_N = rows.captions_N.clone(), rows.labels_N.clone()
        for place in augmented:
            index = int(rows.ids_N[place])
            first, second = decisions.labels_N2[index].tolist()
            if first != int(rows.labels_N[place]):
                rows.labels_N[place] = first
                rows.captions_N[place] = partners_N[place] = task.caption_of_class(first, seeds[place])
            rows.prior_N[place] = decisions.weights_N[index]
            rows.share_N[place] = share = float(decisions.shares_N[index])
            partner_labels_N[place] = second if share < 1 else first
            if share < 1:
                partners_N[place] = task.caption_of_class(second, seeds[place])
        rows.partners_N, rows.partner_labels_N = partners_N, partner_labels_N

    def _soften(self, rows: Rows, seeds: list[int]) -> None:
        """Note how much of their labels the augmented rows keep, and their weights, by the draws of their operations."""
        options, num_classes = self.setup.config.augment, self.setup.dataset.num_classes
        rows.confidence_N = torch.ones(len(seeds), device=self.device)
        for place in range(rows.num_train, len(seeds)):
            for number, confidence in self.setup.confidences.items():
                rows.confidence_N[place] *= confidence(options, derived_seed(seeds[place], number), num_classes)
        if options.soft_weights:
            rows.prior_N = rows.confidence_N if rows.prior_N is None else rows.prior_N * rows.confidence_N

    def describe(self, step: int, results: list[StepResult]) -> list[dict[str, Any]]:
        """Return one record per augmented row of a step: identity, weight, gain of its label, learned (soft) label.

        Where evidence decided, `posterior` holds the probabilities of its upstream label and of none of the classes.
        """
        pool = self.setup.pool
        records = []
        for result in results:
            for place, index in enumerate(result.ids_A.tolist()):
                item = pool[index]
                record: dict[str, Any] = {
                    "step": step,
                    "id": _identity(item),
                    "label": item.label,
                    "weight": float(result.weights_A[place]),
                }
                if self.decisions is not None and self.decisions.posteriors_N2 is not None:
                    record["posterior"] = [round(part, 4) for part in self.decisions.posteriors_N2[index].tolist()]
                if result.gains_A is not None:
                    record["gain"] = float(result.gains_A[place])
                if result.top_labels_AJ is not None and result.top_shares_AJ is not None:
                    over, task = self.setup.objective.over, self.setup.task
                    labels = [task.class_of(top, over) for top in result.top_labels_AJ[place].tolist()]
                    record["learned_label"] = labels[0]
                    record["soft_labels"] = soft_label(labels, result.top_shares_AJ[place].tolist())
                records.append(record)
        return records

    def _source(self, row: Row) -> Any:
        return self.setup.pool if row.kind == "augmented" else self.setup.dataset.train.samples

    def _mix(self, rows: Rows, step: int, part: int) -> None:
        """Mix the augmented rows; training rows keep their inputs and labels.

        Every process draws the mix of all processes' rows, and keeps its own: place i of process r is i * count + r.
        """
        setup, first, processes = self.setup, rows.num_train, self.processes
        assert setup.mix is not None
        generator = torch.Generator().manual_seed(derived_seed(setup.config.seed, "mix", step, part))
        gathered = processes.gather_in_order(rows.inputs[first:])
        mixed = setup.mix(gathered, setup.config.augment, generator, setup.dataset.fields)
        own = slice(processes.rank, None, processes.count)
        partners_A = mixed.partners_A[own]
        captions_N, labels_N = (processes.gather_in_order(values_N[first:]) for values_N in (rows.captions_N, rows.labels_N))
        rows.partners_N = torch.cat([rows.captions_N[:first], captions_N[partners_A]])
        rows.partner_labels_N = torch.cat([rows.labels_N[:first], labels_N[partners_A]])
        rows.share_N = torch.ones(len(rows.labels_N), device=self.device)
        rows.share_N[first:] = mixed.shares_A[own]
        rows.inputs = torch.cat([rows.inputs[:first], mixed.inputs[own]])


def soft_label(labels: list[int | None], shares: list[float]) -> list[tuple[int | None, float]]:
    """Return (class, share) with the largest share first; captions of one class are added up, shares below 0.005 left out."""
    total: dict[int | None, float] = {}
    for label, share in zip(labels, shares, strict=True):
        total[label] = total.get(label, 0.0) + share
    return sorted(((label, round(share, 3)) for label, share in total.items() if share >= 0.005), key=lambda pair: -pair[1])


def _identity(item: Sample | Edit) -> str:
    return item.aug_id if isinstance(item, Edit) else item.sample_id


class ValidationRows:
    """Rows behind SAFLEX's gradient: a split of role `select`, or with `gradient_rows = "train"` the training split."""

    def __init__(self, setup: Setup, cache: FeatureCache | None, device: torch.device) -> None:
        self.setup, self.cache, self.device = setup, cache, device
        chosen = setup.config.saflex
        from_train = chosen.gradient_rows == "train"
        split = setup.dataset.train if from_train else split_for(setup.dataset, chosen.validation_split, "select")
        self.samples = split.samples
        self._whole: Validation | None = None

    def at(self, step: int, settings: SaflexSettings) -> Validation:
        """Return the validation rows of the refresh before `step`; of a bank those that it renews."""
        num_samples = len(self.samples)
        size = min(settings.validation_rows or num_samples, num_samples)
        stream = Stream(num_samples, derived_seed(self.setup.config.seed, "validation"))
        renewed = settings.validation_renewed if settings.scope == "head" else 0
        if self.setup.saflex is None or not 0 < renewed < size:
            if size == num_samples:
                return self._of(list(range(num_samples)))
            return self._of(stream.take(step // settings.refresh_every * size, size))
        bank = self.setup.saflex.bank
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
        task = self.setup.task
        positions, parts = [], []
        for found, read in self._batches(samples):
            positions += found
            with torch.no_grad():
                inputs = read.to(self.device)
                parts.append(inputs if self.cache is not None else task.network.lower(inputs))
        labels_V = torch.tensor([task.label_of(samples[position]) for position in positions], device=self.device)
        return Validation(torch.cat(parts), labels_V, task.class_caption(labels_V))

    def _batches(self, samples: list[Sample]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield (positions, inputs [B, ...]), or [B, 2, ...] where a row is a pair of views, drawn once per run."""
        setup = self.setup
        if setup.task.num_views == 1:
            yield from (self.cache or setup.loader()).batches(samples)
            return
        seeds = [derived_seed(setup.config.seed, "validation view", number) for number in range(setup.task.num_views)]
        loaders = [setup.loader(source=ViewSource(setup.source, setup.on_train, seed)) for seed in seeds]
        for parts in zip(*(loader.batches(samples) for loader in loaders), strict=True):
            yield parts[0][0], torch.stack([images for _, images in parts], dim=1)
