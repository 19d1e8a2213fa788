"""Reader of tables of numbers and categories (`data.name = "tabular"`), described by a card.

The split is that of the deep learning literature on tables, 65 / 15 / 20 percent of every class, drawn with `data.split_seed`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from flyp_saflex.config import DataConfig
from flyp_saflex.data.duplicates import duplicate_notes
from flyp_saflex.data.published import Problems, few_notes
from flyp_saflex.data.splitting import hold_out
from flyp_saflex.data.tabular_card import REST, Card, read_card
from flyp_saflex.data.tabular_encoding import encode
from flyp_saflex.data.tabular_file import RawTable, read_cells
from flyp_saflex.data.text import listed, shown
from flyp_saflex.errors import DataError
from flyp_saflex.records import Dataset, Sample


def read_tabular(config: DataConfig) -> Dataset:
    """Read, check, split and encode the table that `data.card` describes.

    Raises:
        DataError: no card, no file, another format than the card says, or other counts than the published ones.
    """
    if not config.card:
        raise DataError('data.name = "tabular" needs data.card: a shipped card (qsar, shrutime ...) or a TOML file')
    card = read_card(config.card)
    path = _file(config, card)
    problems = Problems(config.accept_altered)
    table = read_cells(path, card, problems)
    names, labels = _labels(path, table, card)
    _check_counts(path, table, names, labels, card, problems)
    samples = [
        Sample(sample_id=sample_id, item=place, label=label)
        for place, (sample_id, label) in enumerate(zip(_ids(table), labels, strict=True))
    ]
    splits = hold_out(
        samples,
        select_fraction=config.select_fraction,
        select_per_class=config.select_per_class,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        name_of=lambda label: names[label],
    )
    encoded = encode(table, [_row(sample) for sample in splits["train"].samples])
    notes = [*problems.notes, *_paper_notes(card, table), *encoded.notes, *few_notes(splits, names)]
    notes += duplicate_notes(splits, lambda sample: table.features_N[_row(sample)], "rows of equal features")
    return Dataset(
        name=f"tabular-{Path(config.card).stem}",
        root=path.parent,
        class_names=names,
        splits=splits,
        templates=("{}",),
        notes=tuple(notes),
        rows=encoded.rows_NF,
        fields=encoded.fields,
    )


def _file(config: DataConfig, card: Card) -> Path:
    root = Path(config.root)
    path = root / card.file if root.is_dir() else root
    if not config.root or not path.is_file():
        link = f" (Table 6 of the paper links to {card.paper.link})" if card.paper else ""
        raise DataError(
            f"data.root = '{shown(config.root)}': there is no file '{card.file}' of '{card.title}'{link}; "
            "set data.root to its folder or to the file"
        )
    return path


def _row(sample: Sample) -> int:
    assert isinstance(sample.item, int)
    return sample.item


def _ids(table: RawTable) -> list[str]:
    """Return an id per row that depends on its cells alone: adding a row renames no other."""
    seen: Counter[str] = Counter()
    ids = []
    for line in table.lines_N:
        digest = hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        seen[digest] += 1
        ids.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return ids


def _labels(path: Path, table: RawTable, card: Card) -> tuple[tuple[str, ...], list[int]]:
    """Return class names and the class of every row, by the card's target rule."""
    values = sorted(set(table.target_N), key=lambda text: (len(text), text))
    rule = card.classes or {value: (value,) for value in values}
    if len(rule) < 2 or (not card.classes and len(values) > max(20, len(table.target_N) // 10)):
        raise DataError(
            f"{path}: the target '{card.target}' has {len(values)} values ({listed(values, 4)}), expected two classes or more; "
            "correct target or classes in the card"
        )
    names = tuple(rule)
    class_of = {value: label for label, found in enumerate(rule.values()) for value in found if value != REST}
    rest = next((label for label, found in enumerate(rule.values()) if REST in found), None)
    if odd := [value for value in values if value not in class_of and rest is None]:
        raise DataError(
            f"{path}: the target '{card.target}' has values that belong to no class ({listed(odd)}), expected "
            f"{listed(list(class_of))}; correct target or classes in the card"
        )
    labels = [class_of.get(value, rest if rest is not None else -1) for value in table.target_N]
    if absent := [name for label, name in enumerate(names) if label not in set(labels)]:
        raise DataError(f"{path}: no row is of the class {listed(absent)}; correct target or classes in the card")
    return names, labels


def _check_counts(path: Path, table: RawTable, names: tuple[str, ...], labels: list[int], card: Card, problems: Problems) -> None:
    expected = card.expected
    wanted = {
        "rows": (len(labels), expected.rows or None),
        "features": (len(table.names), expected.features or None),
        f"rows of the class '{names[1]}'": (labels.count(1), expected.positives or None),
        "missing cells": (table.num_missing, None if expected.missing < 0 else expected.missing),
    }
    wrong = [f"{found:,} {what}, expected {count:,}" for what, (found, count) in wanted.items() if count not in (None, found)]
    if wrong:
        problems.found(f"{path} is not the published '{card.title}': {'; '.join(wrong)}")


def _paper_notes(card: Card, table: RawTable) -> list[str]:
    if card.paper is None or len(table.names) == card.paper.features:
        return []
    return [f"{len(table.names)} features are used; Table 5 of the paper counts {card.paper.features} for '{card.title}'"]
