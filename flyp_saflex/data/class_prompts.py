"""Class names and caption templates, from the folder `prompts/<dataset>`.

`templates.txt` holds one caption template per line, each with exactly one `{}`. `classes.txt` holds one class per line, in
the order of the class indices: an English name, or the dataset's own key and the English name with a tab between.
Lines that start with `#` are comments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flyp_saflex.data.text import nfc, read_text, shown
from flyp_saflex.errors import DataError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The text that belongs to a dataset.

    Attributes:
        class_names: English names by class index; empty if the folder has no `classes.txt`.
        class_keys: the dataset's own names (folder names, labels of a table); the English name where no key is given.
        templates: caption templates, each with one `{}`.
        folder: where they were read.
    """

    class_names: tuple[str, ...]
    class_keys: tuple[str, ...]
    templates: tuple[str, ...]
    folder: Path


def shipped_folder() -> Path:
    """Return the shipped `prompts` folder: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "prompts"
    return inside if inside.is_dir() else package.parent / "prompts"


def shipped() -> list[str]:
    """Return the names of the shipped prompt folders."""
    folder = shipped_folder()
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def load_prompts(source: str) -> Prompts:
    """Read a prompt folder.

    Args:
        source: a shipped name (`iwildcam`, `cub`, `pacs`, `default` ...) or the path of a folder.

    Raises:
        DataError: no such folder or name, no `templates.txt`, or a line that cannot be used.
    """
    folder = shipped_folder() / source if source in shipped() else Path(source)
    if not folder.is_dir():
        raise DataError(
            f"data.prompts = '{source}' is neither a folder nor a shipped name{nearest(source, shipped())} "
            f"(shipped: {', '.join(shipped())}); make the folder with templates.txt and classes.txt in it"
        )
    classes, templates = folder / "classes.txt", folder / "templates.txt"
    if not templates.is_file():
        raise DataError(f"{folder} has no templates.txt: write one caption template per line, for example 'a photo of a {{}}.'")
    keys, names = read_classes(classes) if classes.is_file() else ((), ())
    return Prompts(class_names=names, class_keys=keys, templates=read_templates(templates), folder=folder)


def read_templates(path: Path) -> tuple[str, ...]:
    """Read caption templates.

    Raises:
        DataError: a template without exactly one `{}`, a template twice, or none at all.
    """
    templates: list[str] = []
    for number, line in _lines(path):
        if not line:
            continue
        if line.count("{}") != 1 or line.count("{") != 1 or line.count("}") != 1:
            raise DataError(
                f"{path} line {number}: the template '{shown(line)}' has {line.count('{}')} times {{}}, expected exactly one "
                "and no other brace; write for example 'a photo of a {}.'"
            )
        if line in templates:
            raise DataError(f"{path} line {number}: the template '{shown(line)}' is there twice; remove one")
        templates.append(line)
    if not templates:
        raise DataError(f"{path} holds no template: write one per line, for example 'a photo of a {{}}.'")
    return tuple(templates)


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read class keys and English names, by class index.

    Two classes may share an English name (iWildCam has two such pairs) but not a key.

    Raises:
        DataError: an empty line between classes, a key twice, or no class at all.
    """
    lines = _lines(path)
    while lines and not lines[-1][1]:
        lines.pop()
    keys: list[str] = []
    names: list[str] = []
    where: dict[str, int] = {}
    for number, line in lines:
        key, tab, name = line.partition("\t")
        key, name = nfc(key.strip()), nfc(name.strip())
        if not key or (tab and not name):
            raise DataError(f"{path} line {number}: no class name, expected a name (or key, tab, name); remove or fill the line")
        if tab and key in where:
            raise DataError(
                f"{path} line {number}: the key '{shown(key)}' is already on line {where[key]}; every class needs its own"
            )
        if tab:
            where[key] = number
        keys.append(key)
        names.append(name or key)
    if not names:
        raise DataError(f"{path} holds no class: write one name per line, in the order of the class indices")
    return tuple(keys), tuple(names)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return (line number, text) of every line that is not a comment."""
    return [(number, line.strip(" ")) for number, line in enumerate(read_text(path).splitlines(), 1) if not line.startswith("#")]
