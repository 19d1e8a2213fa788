"""DomainBed's datasets by name: leave-one-domain-out over `root/<domain>/<class>/*` (arXiv 2007.01434).

`data.test_domains` names what is left out; every other domain is trained on, and `id_val`, held out of the training domains,
selects the model (DomainBed's training-domain validation). DomainBed itself holds out 20 % of every training domain and tests on
none of them: `data.select_fraction = 0.2`, `data.test_fraction = 0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flyp_saflex.config import DataConfig
from flyp_saflex.data.folder import existing_root, read_folder
from flyp_saflex.data.text import listed, nfc_all
from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Reader of one of DomainBed's datasets.

    Attributes:
        name: value of `data.name`.
        folder: name of its folder as DomainBed's `download.py` makes it.
        images: published number of images by domain (folder name); None: sources differ.
        num_classes: classes of the whole dataset.
        prompts: shipped prompt folder; empty: class folders give the names.
    """

    name: str
    folder: str
    images: Mapping[str, int | None]
    num_classes: int
    prompts: str = ""

    def __call__(self, config: DataConfig) -> Dataset:
        """Read the dataset.

        Raises:
            DataError: no test domain is named, or a domain is missing.
        """
        root = existing_root(config, f"{self.folder} with the folders {', '.join(self.images)}")
        root = root / self.folder if (root / self.folder).is_dir() else root
        if not config.test_domains:
            raise DataError(
                f"data.test_domains is empty (data.name = {self.name}); name the domain that is left out, for example "
                f"--set data.test_domains={next(iter(self.images))} (domains: {', '.join(self.images)})"
            )
        missing = [domain for domain in self.images if not (root / domain).is_dir()]
        if missing and not config.train_domains:
            raise DataError(
                f"data.root = {config.root}: no folder {listed(missing)} in {root}; expected {self.folder}/<domain>/<class>/* "
                f"with the domains {', '.join(self.images)}; set data.train_domains to train on some of them"
            )
        held = {*nfc_all(config.test_domains), *nfc_all(config.select_domains)}
        dataset = read_folder(
            replace(
                config,
                root=str(root),
                train_domains=config.train_domains or tuple(domain for domain in self.images if domain not in held),
                prompts=config.prompts or self.prompts,
            )
        )
        return replace(dataset, name=self.name, notes=(*dataset.notes, *self._differences(dataset)))

    def _differences(self, dataset: Dataset) -> list[str]:
        """Return notes where the folder holds other numbers than the published ones."""
        counts = dict.fromkeys(self.images, 0)
        for split in dataset.splits.values():
            for sample in split.samples:
                counts[sample.domain] = counts.get(sample.domain, 0) + 1
        notes = [
            f"{self.name}: {counts[domain]} images of '{domain}', but {published} are published: this is not the usual copy"
            for domain, published in self.images.items()
            if published is not None and counts[domain] not in (0, published)
        ]
        if dataset.num_classes != self.num_classes:
            notes.append(f"{self.name}: {dataset.num_classes} classes, but {self.num_classes} are published")
        return notes


PACS = Benchmark(
    name="pacs",
    folder="PACS",
    images={"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
    num_classes=7,
    prompts="pacs",
)
VLCS = Benchmark(
    name="vlcs", folder="VLCS", images={"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376}, num_classes=5
)
OFFICE_HOME = Benchmark(
    name="office-home",
    folder="office_home",
    images={"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357},
    num_classes=65,
)
TERRA_INCOGNITA = Benchmark(
    name="terra-incognita",
    folder="terra_incognita",
    images={"location_100": None, "location_38": None, "location_43": None, "location_46": None},
    num_classes=10,
)
DOMAIN_NET = Benchmark(
    name="domain-net",
    folder="domain_net",
    # without the duplicates that DomainBed's download.py removes
    images={"clipart": 48129, "infograph": 51605, "painting": 72266, "quickdraw": 172500, "real": 172947, "sketch": 69128},
    num_classes=345,
)
