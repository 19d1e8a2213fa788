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
from flyp_saflex.storage.results import percent, read_results, results_on_other_data
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tables import METRICS

UNKNOWN = "unknown"
"""The Hub's name of a licence that nobody named."""
OF_THE_MACHINE = ("evaluate.", "train.log_", "train.checkpoint_every", "train.keep_checkpoints", "data.workers", "train.tracker")
"""Options that do not change the model."""
FOLDERS = re.compile(r"[^\s'\",:]*[/\\](?=[^\s'\",/\\])")
"""Folders before the last part of a path."""


def model_card(
    run: Path,
    config: Config,
    classes: Dataset,
    *,
    library: str,
    usage: str,
    licence: str = "",
    alpha: float = 1.0,
    has_head: bool = False,
) -> str:
    """Return the text of README.md.

    Args:
        run: its folder.
        config: its recipe.
        classes: class names and templates.
        library: `library_name` of the Hub.
        usage: Python that loads the folder and classifies an image.
        licence: identifier of the Hub, as `apache-2.0`; empty: unknown.
        alpha: WiSE-FT's alpha of the exported weights.
        has_head: whether the classes are fixed, instead of being captions that a user may change.
    """
    train, start = config.train, _without_folders(config.model.name).removeprefix("local-dir:")
    hub = start.removeprefix("hf-hub:")
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    parts = [
        "---",
        f"license: {licence or UNKNOWN}",
        f"library_name: {library}",
        "pipeline_tag: image-classification" if has_head else "pipeline_tag: zero-shot-image-classification",
        *([f"base_model: {hub}"] if hub != start else []),
        "tags: [clip, flyp, saflex]" if config.saflex.enabled else "tags: [clip, flyp]",
        "---",
        "",
        f"# {hub}, finetuned on {_what(classes)}",
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
        f"FOLDER is this folder. `classes.json` holds the {classes.num_classes} classes in order and the caption templates.",
        "",
        "## Data",
        "",
        *_data(run, classes),
        "",
        "## Results",
        "",
        *_results(run, alpha),
        *_elsewhere(run, alpha),
        "",
        "## Recipe",
        "",
        *_recipe(run, config),
        "",
        "## Limits",
        "",
        f"It gives one of {classes.num_classes} classes to every image, also to one with none of them.",
        *([] if has_head else ["With other class names than these it may be worse than its pretrained weights (forgetting)."]),
        "On images of other origin (cameras, places, styles) than the training data it can be much worse than above.",
        _calibration(run, alpha),
        "It has the biases of its pretrained weights and of the data.",
        *([] if licence else ["The licence is not stated; those of the pretrained weights and of the data may bind its use."]),
    ]
    return "\n".join(parts) + "\n"


def _what(classes: Dataset) -> str:
    """Return the data in words: readers of anybody's images tell nothing by their name."""
    count = f"{classes.num_classes} classes"
    return f"images of {count}" if classes.name in ("folder", "table", "hf") else f"{classes.name} ({count})"


def _data(run: Path, classes: Dataset) -> list[str]:
    known = read_record(run)
    lines = [f"{_what(classes)[0].upper()}{_what(classes)[1:]}: {listed([f'`{name}`' for name in classes.class_names], 12)}."]
    if known is not None:
        lines += ["", "| split | role | images |", "|---|---|---|"]
        lines += [f"| {_cell(name)} | {split.role} | {split.images} |" for name, split in known.splits.items()]
    return lines


def _results(run: Path, alpha: float) -> list[str]:
    """Return a table of the rows at an alpha; a sentence where the run was not evaluated there."""
    found = _read(run)
    rows, before = (_rows(found, wanted) for wanted in (alpha, 0.0))
    if not rows:
        return ["These weights were not evaluated."]
    lines = [*_table(rows), "", "One run; fractions in percent, bootstrap 95 % intervals over images in brackets."]
    if any(row["role"] == "select" for row in rows):
        lines.append("The split of role select chose the weights: its figures are too good.")
    if before and alpha:
        lines += ["", "The pretrained weights on the same images:", "", *_table(before)]
    if (chosen := found.get("chosen_alpha")) is not None and chosen != alpha:
        lines += [
            "",
            f"Of the WiSE-FT weights alpha {chosen:g} was the best on {found['select_split']}; these are of {alpha:g}.",
        ]
    return lines


def _elsewhere(run: Path, alpha: float) -> list[str]:
    """Return a table of the accuracy on other test sets, before and after finetuning; nothing where there are none."""
    lines = []
    for file in results_on_other_data(run):
        found = _read(run, file)
        for after in _rows(found, alpha):
            before = [row["accuracy"] for row in _rows(found, 0.0) if row["split"] == after["split"]]
            cells = [_cell(f"{file[len('results-on-') : -len('.json')]}, {after['split']}"), str(after["n"])]
            lines.append(f"| {' | '.join([*cells, percent(before[0]) if before else '-', percent(after['accuracy'])])} |")
    head = [
        "",
        "Other images and class lists:",
        "",
        "| set | images | accuracy of the pretrained weights | of these |",
        "|---" * 4 + "|",
    ]
    return [*head, *lines] if lines else []


def _calibration(run: Path, alpha: float) -> str:
    """Return a sentence on the temperature that makes probabilities calibrated."""
    found = [row["temperature"] for row in _rows(_read(run), alpha) if row.get("temperature")]
    if not found:
        return "Its probabilities are not calibrated."
    return f"Its probabilities are calibrated after dividing the logits by {found[0]:.3g}, a temperature of the select split."


def _read(run: Path, name: str = "results.json") -> dict[str, Any]:
    try:
        return read_results(run, name)
    except RunError:
        return {"results": []}


def _rows(found: Mapping[str, Any], alpha: float) -> list[dict[str, Any]]:
    return [row for row in found["results"] if row["wise_alpha"] == alpha]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    lines = [f"| split | role | images | {' | '.join(METRICS[name].title for name in names)} |", "|---" * (3 + len(names)) + "|"]
    for row in rows:
        cells = [_cell(row["split"]), row["role"], str(row["n"]), *(_value(row, name) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _value(row: Mapping[str, Any], name: str) -> str:
    text, interval = METRICS[name].text(row.get(name)), row.get(f"{name}_interval")
    return text if not interval else f"{text} [{METRICS[name].text(interval[0])}, {METRICS[name].text(interval[1])}]"


def _recipe(run: Path, config: Config) -> list[str]:
    lines = [f"Seed {config.seed}. Options that differ from the defaults:", ""]
    for line in differing(Config(), config):
        key, _, change = line.partition(": ")
        if not key.startswith(OF_THE_MACHINE):
            usual, _, value = change.partition(" -> ")
            lines.append(f"- `{key} = {_without_folders(value)}` (default `{_without_folders(usual)}`)")
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
