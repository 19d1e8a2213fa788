"""Files of edit texts, `prompts/<dataset>.<name>.toml`: instructions, prompts and texts of the semantic filter.

    dataset = "iwildcam"
    [[edits]]
    domain = "forest at night"
    instruction = "put the {} in the forest at night"     # for editors that follow an instruction
    prompt = "a photo of a {} in the forest at night"     # for editors that take a description of the outcome
    [semantic]                                            # texts of the semantic filter
    positive = ["a photo of an animal"]
    negative = ["a photo of an object", "a drawing"]
    [made]                                                # provenance, written by the command `prompts`; never used

A `{}` stands for the class name. An instruction may do without one (`make it night`), a prompt may not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from flyp_saflex.data.class_prompts import shipped_folder
from flyp_saflex.errors import DataError, RunError, nearest
from flyp_saflex.storage.files import atomic_write
from flyp_saflex.user_text import quoted, read_toml

TOP = ("dataset", "edits", "semantic", "made")
EDIT = ("domain", "instruction", "prompt")
SEMANTIC = ("positive", "negative")
ANY_DATA = ("", "folder", "table")
"""Values of `data.name` that fit texts of any dataset: readers of any images, or none."""
HEADER = "# Edit texts: change, add or remove them as you like; prompts/README.md says what works.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class EditText:
    """One edit text: a domain with its instruction and its prompt.

    Attributes:
        domain: target of the edit, without the class: `forest at night`.
        instruction: for instruction editors, usually with one `{}` for the class name.
        prompt: description of the outcome, with one `{}`.
    """

    domain: str
    instruction: str
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EditPrompts:
    """Content of a file of edit texts.

    Attributes:
        dataset: the dataset that it was written for, not checked: the file's name decides for which `data.name` it is found.
        edits: the edit texts, at least one.
        positive, negative: texts of the semantic filter, possibly with a `{}`; empty if the file has none.
        made: provenance from the command `prompts`; empty for a file written by hand.
        path: path of the file; None before it is written.
    """

    dataset: str
    edits: tuple[EditText, ...]
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    made: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


def available(dataset: str = "") -> dict[str, Path]:
    """Return the known files by name (`iwildcam.alia`): files in `./prompts/`, which take precedence, and the shipped ones."""
    found: dict[str, Path] = {}
    for folder in (shipped_folder(), Path("prompts")):
        if folder.is_dir():
            found |= {file.stem: file for file in sorted(folder.glob(f"{dataset}.*.toml" if dataset else "*.*.toml"))}
    return found


def load_edit_prompts(source: str, dataset: str) -> EditPrompts:
    """Read a file of edit texts.

    Args:
        source: a path, a name such as `iwildcam.alia`, or empty: the only file for the dataset.
        dataset: `data.name`.

    Raises:
        DataError: no such file, several to choose from, one for another dataset, or a line that cannot be used.
    """
    path = Path(source) if source else None
    if path is None or not path.is_file():
        known = available() if source else available(dataset)
        if not source and len(known) != 1:
            raise DataError(
                f"editor.prompts is empty and there {'are several files' if known else 'is no file'} of texts for '{dataset}'"
                f"{' (' + ', '.join(known) + ')' if known else ''}: set editor.prompts to one, write prompts/{dataset}.mine.toml "
                "(prompts/README.md says how), or run flyp-saflex prompts"
            )
        if source and source not in known:
            raise DataError(
                f"editor.prompts = '{source}' is neither a file nor a known name{nearest(source, list(known))} "
                f"(known: {', '.join(known) or 'none'}); prompts/README.md says how to write one"
            )
        path = known[source] if source else next(iter(known.values()))
    prompts = parse_edit_prompts(path)
    if prompts.dataset and dataset not in ANY_DATA and _family(prompts.dataset) != _family(dataset):
        raise DataError(
            f"editor.prompts: the texts of {path} are for '{quoted(prompts.dataset)}', but data.name = {dataset}: choose a file "
            "for this dataset, or change the line `dataset` of a copy if its texts fit"
        )
    return prompts


def _family(dataset: str) -> str:
    """Return the dataset that a subset is of: `iwildcam` of `iwildcam-mini`."""
    return dataset.partition("-")[0]


def parse_edit_prompts(path: Path) -> EditPrompts:
    """Read and check one file; see `load_edit_prompts`."""
    values = read_toml(path, DataError, any_character=True)
    _known_keys(path, "", values, TOP)
    dataset, edits, semantic = values.get("dataset", ""), values.get("edits", []), values.get("semantic", {})
    if not isinstance(dataset, str) or not isinstance(edits, list) or not isinstance(semantic, dict):
        raise DataError(
            f"{path}: expected dataset = text, [[edits]] tables and a [semantic] table; prompts/README.md has an example"
        )
    if not edits:
        raise DataError(f"{path} holds no [[edits]]: add at least one, with domain, instruction and prompt")
    _known_keys(path, "[semantic] ", semantic, SEMANTIC)
    texts = {key: _texts(path, f"[semantic] {key}", semantic.get(key, [])) for key in SEMANTIC}
    if bool(texts["positive"]) != bool(texts["negative"]):
        raise DataError(f"{path}: [semantic] needs both positive and negative texts; add the missing ones or remove the table")
    found = tuple(_edit(path, number, row) for number, row in enumerate(edits, 1))
    for name in ("instruction", "prompt"):
        used = [getattr(edit, name) for edit in found if getattr(edit, name)]
        for text in used:
            if used.count(text) > 1:
                raise DataError(f"{path}: the {name} '{quoted(text)}' is there {used.count(text)} times; remove all but one")
    made = values.get("made", {})
    return EditPrompts(dataset=dataset, edits=found, made=made if isinstance(made, dict) else {}, path=path, **texts)


def check_target(path: Path, *, force: bool = False) -> None:
    """Check that a file of edit texts can be written, before models are loaded; write nothing.

    Raises:
        DataError: it exists and `force` is false, or its folder cannot be written to.
    """
    if path.exists() and not force:
        raise DataError(f"{path} exists and may have been edited by hand: give --force to replace it, or choose prompts.name")
    folder = next((parent for parent in path.parents if parent.exists()), path.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(
            f"{path} cannot be written: {folder.absolute()} is {'read-only' if folder.is_dir() else 'no folder'}; "
            "run the command where you may write"
        )


def write_edit_prompts(prompts: EditPrompts, path: Path, *, force: bool = False) -> None:
    """Write a file that `load_edit_prompts` reads.

    Raises:
        DataError: it exists and `force` is false, or it cannot be written.
    """
    check_target(path, force=force)
    values: dict[str, Any] = {
        "dataset": prompts.dataset,
        "edits": [{"domain": edit.domain, "instruction": edit.instruction, "prompt": edit.prompt} for edit in prompts.edits],
    }
    if prompts.positive:
        values["semantic"] = {"positive": list(prompts.positive), "negative": list(prompts.negative)}
    if prompts.made:
        values["made"] = prompts.made
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(HEADER + tomli_w.dumps(values, multiline_strings=True))
    except OSError as error:
        raise DataError(f"{path.parent} cannot be made: {error.strerror}; run the command where you may write") from None
    except RunError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise DataError(f"{path} cannot be written: {reason}; free disk space, or run the command where you may write") from None


def _edit(path: Path, number: int, row: Any) -> EditText:
    where = f"{path} edit {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a table [[edits]] with domain, instruction and prompt")
    _known_keys(path, f"edit {number}: ", row, EDIT)
    values = {name: row.get(name, "") for name in EDIT}
    for name, value in values.items():
        if not isinstance(value, str) or value != value.strip() or "\n" in value:
            raise DataError(f"{where}: {name} = {quoted(repr(value))}, expected one line of text without spaces around it")
        braces = value.count("{}")
        needed = name == "prompt" and value
        if (
            value.count("{") != braces
            or value.count("}") != braces
            or braces > 1
            or (needed and not braces)
            or (name == "domain" and braces)
        ):
            expected = {
                "domain": "no brace",
                "instruction": "at most one {} for the class",
                "prompt": "exactly one {} for the class",
            }
            raise DataError(
                f"{where}: {name} = '{quoted(value)}' has {braces} times {{}}, expected {expected[name]}; mend the text"
            )
    if not values["instruction"] and not values["prompt"]:
        raise DataError(
            f"{where} has neither an instruction nor a prompt; add for example instruction = 'put the {{}} in the snow'"
        )
    return EditText(**values)


def _texts(path: Path, where: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or any(not isinstance(value, str) or not value.strip() for value in values):
        raise DataError(f"{path}: {where} = {quoted(repr(values))}, expected a list of texts")
    for value in values:
        if value.count("{}") > 1 or value.count("{") != value.count("{}") or value.count("}") != value.count("{}"):
            raise DataError(f"{path}: {where} has '{quoted(value)}', expected at most one {{}} for the class and no other brace")
    return tuple(values)


def _known_keys(path: Path, where: str, values: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise DataError(f"{path}: {where}unknown key '{quoted(key)}'{nearest(key, known)} (known: {', '.join(known)})")
