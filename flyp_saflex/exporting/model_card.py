"""Model card of an exported model: README.md with the fields that the Hub reads.

Data, recipe, metrics with their intervals, SAFLEX's kept share, limits: from data.json, config.toml, results.json and
metrics.jsonl of the run. Paths of the machine are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flyp_saflex import __version__
from flyp_saflex.config import Config
from flyp_saflex.data.text import listed
from flyp_saflex.errors import RunError
from flyp_saflex.records import Dataset
from flyp_saflex.reporting.seeds import differing
from flyp_saflex.storage.data_record import read_record
from flyp_saflex.storage.results import percent, read_results
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tables import METRICS

UNKNOWN = "unknown"
"""The Hub's name of a licence that nobody named."""
FOLDERS = re.compile(r"[^\s'\",:]*[/\\](?=[^\s'\",/\\])")
"""Folders before the last part of a path."""


def model_card(
    run: Path, config: Config, classes: Dataset, *, library: str, usage: str, licence: str = "", alpha: float = 1.0
) -> str:
    """Return the text of README.md.

    Args:
        run: its folder.
        config: its recipe.
        classes: class names and templates.
        library: `library_name` of the Hub.
        usage: Python that loads the folder.
        licence: identifier of the Hub, as `apache-2.0`; empty: unknown.
        alpha: WiSE-FT's alpha of the exported weights.
    """
    train = config.train
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    parts = [
        "---",
        f"license: {licence or UNKNOWN}",
        f"library_name: {library}",
        "pipeline_tag: zero-shot-image-classification" if library != "onnx" else "pipeline_tag: image-classification",
        "tags: [clip, flyp, saflex]" if config.saflex.enabled else "tags: [clip, flyp]",
        "---",
        "",
        f"# {_without_folders(config.model.name)}, finetuned on {classes.name}",
        "",
        f"CLIP finetuned with flyp-saflex {__version__} (`{train.method}`, {length}, batch size {train.batch_size}).",
        *([f"Weights: WiSE-FT, {alpha:g} of the way from the pretrained to the finetuned model."] if alpha != 1 else []),
        "",
        "## Use",
        "",
        "```python",
        usage,
        "```",
        "",
        f"`classes.json` holds the {classes.num_classes} classes in order and the caption templates.",
        "",
        "## Data",
        "",
        *_data(run, classes),
        "",
        "## Results",
        "",
        *_results(run, alpha),
        "",
        "## Recipe",
        "",
        *_recipe(run, config),
        "",
        "## Limits",
        "",
        f"The model knows {classes.num_classes} classes and gives one of them to every image, also to one with none.",
        "On images of other origin (cameras, places, styles) than the training data it can be much worse than above.",
        "Its probabilities are not calibrated. It has the biases of its pretrained weights and of the data.",
        *([] if licence else ["The licence is not stated; those of the pretrained weights and of the data may bind its use."]),
    ]
    return "\n".join(parts) + "\n"


def _data(run: Path, classes: Dataset) -> list[str]:
    known = read_record(run)
    lines = [f"{classes.name}: {listed([f'`{name}`' for name in classes.class_names], 12)}."]
    if known is not None:
        lines += ["", "| split | role | images |", "|---|---|---|"]
        lines += [f"| {_cell(name)} | {split.role} | {split.images} |" for name, split in known.splits.items()]
    return lines


def _results(run: Path, alpha: float) -> list[str]:
    """Return a table of the rows at an alpha; a sentence where the run was not evaluated there."""
    try:
        rows = [row for row in read_results(run)["results"] if row["wise_alpha"] == alpha]
    except RunError:
        rows = []
    if not rows:
        return ["These weights were not evaluated."]
    names = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    lines = [f"| split | role | images | {' | '.join(METRICS[name].title for name in names)} |", "|---" * (3 + len(names)) + "|"]
    for row in rows:
        cells = [_cell(row["split"]), row["role"], str(row["n"]), *(_value(row, name) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "One run; fractions in percent, bootstrap 95 % intervals over images in brackets."]


def _value(row: Mapping[str, Any], name: str) -> str:
    text, interval = METRICS[name].text(row.get(name)), row.get(f"{name}_interval")
    return text if not interval else f"{text} [{METRICS[name].text(interval[0])}, {METRICS[name].text(interval[1])}]"


def _recipe(run: Path, config: Config) -> list[str]:
    lines = [f"Seed {config.seed}. Options that differ from the defaults:", ""]
    lines += [f"- `{_without_folders(line)}`" for line in differing(Config(), config)]
    if config.saflex.enabled:
        lines += ["", _kept(run, config)]
    elif config.augment.upstream:
        lines += ["", f"Augmented rows: {', '.join(config.augment.upstream)}, all with weight 1 (no SAFLEX)."]
    return lines


def _kept(run: Path, config: Config) -> str:
    """Return a sentence on the augmented rows that SAFLEX kept."""
    share = RunDir(run, lock=False).kept_share()
    told = "saw no augmented row in the log" if share is None else f"kept {percent(share)} % of the augmented rows"
    return f"SAFLEX (preset `{config.saflex.preset}`) {told} ({', '.join(config.augment.upstream) or 'no upstream'})."


def _without_folders(text: str) -> str:
    """Return a text whose paths are cut to their last part; names on the Hub stay."""
    return re.sub(r"(local-dir:)?" + FOLDERS.pattern, lambda found: found[1] or "", text) if "hf-hub:" not in text else text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
