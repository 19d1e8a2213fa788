"""Parts of listed rows: by domain, or pooled and held out; shared by the tables and Hugging Face readers."""

from __future__ import annotations

from collections.abc import Sequence

from flyp_saflex.config import DataConfig
from flyp_saflex.data.splitting import check_domain_names, hold_out, in_reporting_order
from flyp_saflex.data.text import listed, nfc_all
from flyp_saflex.errors import DataError, nearest
from flyp_saflex.records import Sample, Split, rows_at

Part = str | None
"""Split of a row by name; the empty string for the pool that is split further, None for a row that is left out."""
POOL = ""


def names_domains(config: DataConfig) -> bool:
    """Return whether a recipe says by domain what is trained on and tested."""
    return bool(config.train_domains or config.select_domains or config.test_domains)


def domain_parts(config: DataConfig, domains: Sequence[str], source: str) -> list[Part]:
    """Return each row's part by the domains that the recipe names.

    Args:
        config: `train_domains`, `select_domains`, `test_domains`.
        domains: domain of every row.
        source: file or dataset, for messages.

    Raises:
        DataError: a named domain has no row or two roles, or none is trained on.
    """
    found = sorted(set(domains))
    part_of: dict[str, str] = {}
    for role, named in (("train", config.train_domains), ("select", config.select_domains), ("test", config.test_domains)):
        for domain in nfc_all(named):
            if domain not in found:
                raise DataError(
                    f"data.{role}_domains: no row of {source} has '{domain}' in column '{config.domain_column}'"
                    f"{nearest(domain, found[:1000])} (found: {listed(found)})"
                )
            if domain in part_of:
                raise DataError(f"data.{role}_domains: '{domain}' is named twice; a domain has one role")
            if role != "train":
                fix = f"set data.split_column={config.domain_column} instead, or rename the domain"
                check_domain_names(f"data.{role}_domains", domain, fix=fix)
            part_of[domain] = POOL if role == "train" else domain
    if POOL not in part_of.values():
        raise DataError(f"data.train_domains is empty; name the domains of {source} to train on (found: {listed(found)})")
    return [part_of.get(domain) for domain in domains]


def pooled_splits(
    parts: Sequence[str], samples: Sequence[Sample], config: DataConfig, class_names: Sequence[str]
) -> dict[str, Split]:
    """Hold parts of the pool out, and make one split of every select and test domain.

    Args:
        parts: part of every row.
        samples: the rows that are used.
        config: fractions and domains.
        class_names: by class index, for messages.

    Raises:
        DataError: a class has too few images to hold some out.
    """

    def of(name: str) -> Sequence[Sample]:
        return rows_at(samples, (place for place, part in enumerate(parts) if part == name))

    splits = list(
        hold_out(
            of(POOL),
            select_fraction=config.select_fraction,
            select_per_class=config.select_per_class,
            test_fraction=config.test_fraction,
            seed=config.split_seed,
            name_of=class_names.__getitem__,
        ).values()
    )
    for domains, role in ((config.select_domains, "select"), (config.test_domains, "test")):
        for domain in nfc_all(domains):
            splits.append(Split(name=domain, role=role, shift="ood", samples=of(domain)))  # type: ignore[arg-type]
    return in_reporting_order(splits)
