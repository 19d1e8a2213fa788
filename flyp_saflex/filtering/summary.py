"""Summary of the filters: tables of dropped edits per class and domain, contact sheets of kept and dropped edits.

An edit may have several verdicts, so the numbers in a row of a table need not add up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flyp_saflex.errors import DataError
from flyp_saflex.filtering.alia import UNREADABLE, keep, removal_table
from flyp_saflex.images.contact_sheet import Tile, contact_sheet
from flyp_saflex.images.decode import Place, read_image
from flyp_saflex.records import Dataset, Edit, Sample
from flyp_saflex.storage.results import align, percent

PAIRS = 3
"""Pairs of source and edit per row of a sheet."""
SHOWN = 40
"""Most rows of a table that are printed; the returned numbers have all of them."""
CONFIDENCE = (
    "unchanged, corrupted: predicted as the class of its source, or as another class, with at least the mean probability of "
    "held-out images of that class (arXiv 1911.00068)."
)
MEANING = {
    "semantic": "semantic: a negative text fits better than every positive one.",
    "unchanged": CONFIDENCE,
    "corrupted": CONFIDENCE,
    "foreign": "foreign: resembles training images of another class more than those of its own, by pretrained features.",
    "low-score": "low-score: fits the name of its class less than filter.min_clip_score (CLIPScore, arXiv 2104.08718).",
    "near-duplicate": "near-duplicate: perceptual hashes differ from the source's by less than filter.min_hash_distance bits.",
}
Table = dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scored edits with their verdicts.

    Attributes:
        dataset: the dataset of the sources.
        edits: the scored edits.
        rows: their rows of scores.jsonl.
        flags: verdict -> flagged_N, for the verdicts of the filters that were run and for unreadable edits.
        box_crop: whether sources are cropped to their boxes.
    """

    dataset: Dataset
    edits: Sequence[Edit]
    rows: Sequence[Mapping[str, Any]]
    flags: Mapping[str, NDArray[np.bool_]]
    box_crop: bool = False


def report(scored: Scored, sheets: Path, *, drop: Collection[str], sheet_rows: int) -> dict[str, Any]:
    """Print the tables and write the contact sheets.

    Args:
        scored: the edits.
        sheets: folder of the sheets `filter-kept.jpg`, `filter-<verdict>.jpg`.
        drop: verdicts that drop an edit; other verdicts are only counted.
        sheet_rows: rows per sheet; 0: no sheets.

    Returns:
        Counts "edits", "kept" and one per verdict; tables "classes" and "domains" (see `alia.removal_table`); "similarity": mean
        cosine to the sources, None if there is none.
    """
    flags, names = scored.flags, scored.dataset.class_names
    keep_N = keep(flags, drop)
    labelled = [f"{label} {name}" for label, name in enumerate(names)]
    classes = removal_table([labelled[edit.label] for edit in scored.edits], flags, keep_N, labelled)
    domains = removal_table([domain_of(edit) for edit in scored.edits], flags, keep_N)
    total = removal_table(["all"] * len(scored.edits), flags, keep_N)
    print(f"\n{table_text('class', classes, total)}\n\n{table_text('domain', domains)}\n")
    told = [MEANING[name] for name in flags if name in MEANING] + ["An edit may have several verdicts."] * (len(flags) > 2)
    print("\n".join([*dict.fromkeys(told), f"Dropped are: {', '.join(name for name in flags if name in drop) or 'none'}."]))
    cosines = [row["similarity"] for row in scored.rows if row["similarity"] is not None]
    if cosines:
        low, middle, high = np.quantile(cosines, (0.1, 0.5, 0.9))
        print(f"cosine to the source: median {middle:.3f}, 80 % between {low:.3f} and {high:.3f}")
    scores = [row["clip_score"] for row in scored.rows if row.get("clip_score") is not None]
    if scores:
        low, middle, high = np.quantile(scores, (0.1, 0.5, 0.9))
        print(f"CLIPScore: median {middle:.3f}, 80 % between {low:.3f} and {high:.3f}")
    bits = [row["hash_distance"] for row in scored.rows if row.get("hash_distance") is not None]
    if bits:
        low, middle, high = np.quantile(bits, (0.1, 0.5, 0.9))
        print(f"distance to the source in bits: median {middle:.0f}, 80 % between {low:.0f} and {high:.0f}")
    unreadable = [row["reason"] for row, bad in zip(scored.rows, flags[UNREADABLE], strict=True) if bad]
    if unreadable:
        print(f"{len(unreadable)} edits cannot be read and are not kept, first: {unreadable[0]}")
    if len(cosines) + len(unreadable) < len(scored.rows):
        print(f"{len(scored.rows) - len(cosines) - len(unreadable)} edits have no cosine: their sources cannot be read")
    if sheet_rows:
        written = write_sheets(scored, keep_N, sheets, sheet_rows)
        print(f"contact sheets in {sheets}: {', '.join(written)}")
    similarity = float(np.mean(cosines)) if cosines else None
    return {**total["all"], "classes": classes, "domains": domains, "similarity": similarity}


def domain_of(edit: Edit) -> str:
    """Return the domain of an edit from the manifest, else its instruction."""
    return str(edit.provenance.get("domain") or edit.instruction or "(unknown)")


def table_text(title: str, table: Table, total: Table | None = None) -> str:
    """Return a removal table as text, with the kept fraction in percent."""
    columns = list(next(iter(table.values())))
    if UNREADABLE in columns and not any(row[UNREADABLE] for row in table.values()):
        columns.remove(UNREADABLE)
    lines = [(title, *columns, "kept %")]
    for name, row in [*list(table.items())[:SHOWN], *(total or {}).items()]:
        lines.append((name[:60], *(str(row[column]) for column in columns), percent(row["kept"] / row["edits"])))
    more = f"\nand {len(table) - SHOWN} more" if len(table) > SHOWN else ""
    return align(lines, left=1) + more


def write_sheets(scored: Scored, keep_N: NDArray[np.bool_], folder: Path, num_rows: int) -> list[str]:
    """Write one sheet of kept edits and one per verdict, each edit beside its source; return the file names.

    A sheet shows edits spread over the whole manifest. Sheets of an earlier run that would now be empty are removed.
    """
    sources = {sample.sample_id: sample for sample in scored.dataset.train.samples}
    groups = {"kept": keep_N} | {name: flagged_N for name, flagged_N in scored.flags.items() if name != UNREADABLE}
    written = []
    for name in ("kept", "semantic", "unchanged", "corrupted", "foreign", "low-score", "near-duplicate"):
        path = folder / f"filter-{name}.jpg"
        found = np.flatnonzero(groups[name]) if name in groups else np.empty(0, dtype=int)
        if not len(found):
            path.unlink(missing_ok=True)
            continue
        shown = found[np.linspace(0, len(found) - 1, min(len(found), num_rows * PAIRS)).round().astype(int)]
        pairs = [_pair(scored, sources, int(n)) for n in shown]
        contact_sheet([[tile for pair in pairs[at : at + PAIRS] for tile in pair] for at in range(0, len(pairs), PAIRS)], path)
        written.append(path.name)
    return written


def _pair(scored: Scored, sources: Mapping[str, Sample], number: int) -> tuple[Tile, Tile]:
    """Return the tiles of a source and of its edit, with the scores of the filters."""
    edit, row, names = scored.edits[number], scored.rows[number], scored.dataset.class_names
    source = sources[edit.source_id]
    told = [edit.instruction or domain_of(edit)]
    if row["predicted"] is not None:
        told.append(f"{names[row['predicted']]} {row['confidence']:.2f}")
    told += [f"{name} {row[key]:+.2f}" for name, key in (("text", "semantic"), ("cos", "similarity")) if row[key] is not None]
    before = Tile(_read(source.image, source.box if scored.box_crop else None), names[edit.label])
    return before, Tile(_read(edit.path), " | ".join(told))


def _read(path: Place, box: tuple[float, float, float, float] | None = None) -> Image.Image | None:
    try:
        return read_image(path, box=box)
    except DataError:
        return None
