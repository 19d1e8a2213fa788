"""Command `data`: contents of a dataset, before anything is spent on it."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median_low
from typing import Any, cast

from tqdm import tqdm

from flyp_saflex.config import Config, DataConfig
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.data.text import spelt
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.images.decode import decode_image, read_bytes
from flyp_saflex.images.resized_writer import materialise as write_copies
from flyp_saflex.records import Dataset, Sample, Split

SHOWN = 12
"""Rows of a table that are printed; the returned numbers have all of them."""
FAINT = 255 // 10
"""An image whose values lie this close together uses less than a tenth of their range."""


def describe(config: Config, *, limit: int | None = None, dry_run: bool = False, materialise: bool = False) -> dict[str, Any]:
    """Print and return what the recipe's dataset holds.

    Counts per split, class and domain; then, from reading every image: sizes, unreadable files, images of nearly one
    colour, and images with the same bytes in two splits or under two labels. Under several processes only the first one reads
    and prints.

    Args:
        config: the recipe.
        limit: at most this many images of each split.
        dry_run: check and count, but read no image.
        materialise: instead of that check, write resized copies of the images into `data.materialised`.

    Raises:
        DataError: the dataset is not there (the message says what to place where) or is wrong; or the copies cannot be
            written.
        ConfigError: `materialise` without a folder.
    """
    if materialise and not config.data.materialised:
        raise ConfigError(
            "--materialise: data.materialised is empty, expected a folder for the copies: set data.materialised=DIR"
        )
    dataset = load_dataset(config.data, seed=config.seed, limit=limit)
    numbers: dict[str, Any] = {
        "name": dataset.name,
        "root": str(dataset.root),
        "num_classes": dataset.num_classes,
        "templates": list(dataset.templates),
        "notes": list(dataset.notes),
        "splits": {name: _counts(split, dataset) for name, split in dataset.splits.items()},
    }
    if os.environ.get("RANK", "0") != "0":
        return numbers
    _print_counts(dataset, numbers["splits"])
    if materialise:
        numbers["materialised"] = _materialise(dataset, config.data, dry_run=dry_run)
    elif dataset.rows is not None:
        print("\nrows of an array: checked while they were read, there are no image files")
    elif not dry_run:
        numbers |= _read_all(dataset, threads=max(1, config.data.workers))
        _print_files(numbers, config.data.max_unreadable)
    return numbers


def _materialise(dataset: Dataset, data: DataConfig, *, dry_run: bool) -> dict[str, Any]:
    """Write the resized copies and print what was done; an image in two splits has one copy."""
    samples = [sample for split in dataset.splits.values() for sample in split.samples]
    made = write_copies(
        samples,
        Path(data.materialised),
        dataset=dataset.name,
        shorter_side_px=data.materialised_px,
        box_crop=data.box_crop,
        dry_run=dry_run,
    )
    print(f"\nresized copies in {data.materialised} (shorter side {data.materialised_px} px): {made.kept} there already")
    if dry_run:
        print(f"  to make: {made.todo}")
    else:
        print(
            f"  new: {made.resized} resized, {made.copied} small ones as they are, "
            f"{made.source_bytes / 2**20:.1f} MiB to {made.stored_bytes / 2**20:.1f} MiB"
        )
        print(f"  unreadable: {len(made.unreadable)}")
        for _, reason in made.unreadable[:SHOWN]:
            print(f"    {reason}")
    return asdict(made)


def _counts(split: Split, dataset: Dataset) -> dict[str, Any]:
    classes = split.class_counts()
    return {
        "role": split.role,
        "shift": split.shift,
        "n": len(split),
        "classes": {label: classes[label] for label in range(dataset.num_classes)},
        "domains": dict(Counter(sample.domain for sample in split.samples).most_common()),
    }


def _read_all(dataset: Dataset, threads: int) -> dict[str, Any]:
    """Read every file once: its pixel size, its hash, or why it cannot be read."""
    rows = [(split.name, sample) for split in dataset.splits.values() for sample in split.samples]
    widths: dict[str, list[int]] = defaultdict(list)
    heights: dict[str, list[int]] = defaultdict(list)
    unreadable: list[dict[str, str]] = []
    faint: list[str] = []
    homes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    labels: dict[str, set[int]] = defaultdict(set)
    label_of = {sample.sample_id: dataset.class_names[sample.label] for _, sample in rows}
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(_read_one, (sample for _, sample in rows))
        for (split, sample), result in zip(
            rows, tqdm(results, total=len(rows), unit="image", desc="reading images", disable=None), strict=True
        ):
            if isinstance(result, str):
                unreadable.append({"split": split, "path": str(sample.item), "reason": result})
                continue
            digest, (width, height), contrast = result
            homes[digest].append((split, sample.sample_id))
            labels[digest].add(sample.label)
            if contrast < FAINT:
                faint.append(sample.sample_id)
            widths[split].append(width)
            heights[split].append(height)
    return {
        "sizes": {split: {"width": _spread(widths[split]), "height": _spread(heights[split])} for split in widths},
        "unreadable": unreadable,
        "faint": faint,
        "duplicates_across_splits": [found for found in homes.values() if len({split for split, _ in found}) > 1],
        "duplicates_under_two_labels": [
            [(sample_id, label_of[sample_id]) for _, sample_id in found]
            for digest, found in homes.items()
            if len(labels[digest]) > 1
        ],
        "duplicates_within_splits": sum(len(found) - len({split for split, _ in found}) for found in homes.values()),
    }


def _read_one(sample: Sample) -> tuple[str, tuple[int, int], int] | str:
    """Return an image's hash, size and largest difference between its values in 0..255, or why it cannot be read."""
    try:
        data = read_bytes(sample.image)
        image = decode_image(io.BytesIO(data), sample.image)
        lows, highs = zip(*cast(tuple[tuple[int, int], ...], image.getextrema()), strict=True)
        return hashlib.sha256(data).hexdigest(), image.size, max(highs) - min(lows)
    except DataError as error:
        return spelt(str(error))


def _spread(values: Sequence[int]) -> tuple[int, int, int]:
    return min(values), median_low(values), max(values)


def _print_counts(dataset: Dataset, splits: Mapping[str, Mapping[str, Any]]) -> None:
    total = sum(counts["n"] for counts in splits.values())
    print(f"{dataset.name}: {dataset.num_classes} classes, {total} images in {dataset.root}")
    print(f"captions: {' | '.join(dataset.templates)}")
    print("\nsplit          role    shift  images  classes  domains")
    for name, counts in splits.items():
        present = sum(1 for count in counts["classes"].values() if count)
        known = len([domain for domain in counts["domains"] if domain])
        print(f"{name:<14} {counts['role']:<7} {counts['shift']:<6} {counts['n']:>6}  {present:>7}  {known:>7}")
    names = list(splits)
    classes = {
        f"{label} {dataset.class_names[label]}": [splits[name]["classes"][label] for name in names]
        for label in range(dataset.num_classes)
    }
    _print_table("class", names, classes)
    found = dict.fromkeys(domain for counts in splits.values() for domain in counts["domains"] if domain)
    if found:
        _print_table("domain", names, {domain: [splits[name]["domains"].get(domain, 0) for name in names] for domain in found})
    for note in dataset.notes:
        print(f"\nnote: {note}")


def _print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[int]]) -> None:
    """Print counts, the most frequent rows first."""
    print(f"\n{title:<28}" + "".join(f" {column:>12.12}" for column in columns))
    ordered = sorted(rows.items(), key=lambda row: -sum(row[1]))
    for name, counts in ordered[:SHOWN]:
        print(f"{name:<28.28}" + "".join(f" {count:>12}" for count in counts))
    if len(ordered) > SHOWN:
        print(f"and {len(ordered) - SHOWN} more, down to {sum(ordered[-1][1])} images ('{ordered[-1][0]}')")


def _print_files(numbers: Mapping[str, Any], max_unreadable: float) -> None:
    print("\nsize (px)      width min/median/max    height min/median/max")
    for split, size in numbers["sizes"].items():
        print(f"{split:<14} {'/'.join(map(str, size['width'])):<23} {'/'.join(map(str, size['height']))}")
    unreadable = numbers["unreadable"]
    print(f"\nunreadable images: {len(unreadable)}")
    for row in unreadable[:SHOWN]:
        print(f"  {row['split']}: {row['reason']}")
    for split, counts in numbers["splits"].items():
        count = sum(1 for row in unreadable if row["split"] == split)
        if count > max_unreadable * counts["n"]:
            print(f"  {split}: more than data.max_unreadable = {max_unreadable} of its images; training would stop")
    if faint := numbers["faint"]:
        print(
            f"images that use less than a tenth of their range: {len(faint)}, first: {', '.join(faint[:3])}; "
            "of nearly one colour, or 12 bits in a file of 16?"
        )
    duplicates = numbers["duplicates_across_splits"]
    print(f"same bytes in two splits: {len(duplicates)}; twice within a split: {numbers['duplicates_within_splits']}")
    for found in duplicates[:SHOWN]:
        print("  " + " = ".join(f"{split}: {sample_id}" for split, sample_id in found))
    if duplicates:
        print("  what is trained on and tested on alike tests nothing: remove one of each")
    if mislabelled := numbers["duplicates_under_two_labels"]:
        print(f"{len(mislabelled)} images are there under two labels: keep the right one of each")
        for group in mislabelled[:SHOWN]:
            print("  " + " = ".join(f"{sample_id} ({label})" for sample_id, label in group))
