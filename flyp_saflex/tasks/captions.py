"""Captions that can occur in training, by id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flyp_saflex.records import Dataset, Edit, Sample, Samples


@dataclass
class Captions:
    """Captions that can occur in training, by id.

    Class k in template m has the id k * num_templates + m; the own captions of samples follow.
    """

    texts: list[str]
    num_templates: int
    own: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset, samples: Sequence[Sample]) -> Captions:
        """Collect the captions of the classes, and of the samples that have their own."""
        texts = [template.replace("{}", name) for name in dataset.class_names for template in dataset.templates]
        own: dict[str, int] = {}
        captions = (samples.captions or ()) if isinstance(samples, Samples) else [sample.caption for sample in samples]
        for caption in captions:
            if caption is not None and caption not in own:
                own[caption] = len(texts)
                texts.append(caption)
        return cls(texts, len(dataset.templates), own)

    def of_class(self, label: int, seed: int) -> int:
        """Return a class' caption in a template that the seed picks."""
        return label * self.num_templates + seed % self.num_templates

    def of_row(self, sample: Sample | Edit, seed: int) -> int:
        """Return the caption of a row: the sample's own, or its class' in a random template."""
        if isinstance(sample, Sample) and sample.caption is not None:
            return self.own[sample.caption]
        return self.of_class(sample.label, seed)
