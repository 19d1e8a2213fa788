"""Documentation of the options: name, type, default and meaning, read from the dataclasses of `config.py`."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta

from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, nearest
from flyp_saflex.presets import DEFAULT, PRESETS
from flyp_saflex.ranges import LARGEST
from flyp_saflex.tables import CHOICES, METRICS, Table
from flyp_saflex.user_text import quoted

WIDTH = 80
"""Columns of the text of the command `options`."""
PLURALS = re.compile(r"^(integer|number|text)")
KINDS = {bool: "true or false", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a recipe."""

    section: str
    """Section of the recipe; empty: an option above all sections."""
    name: str
    type: str
    """Values that it takes, in words."""
    default: str
    """As TOML writes it, or `unset`; of `saflex` the value of the default preset, then those of presets that differ."""
    meaning: str

    @property
    def key(self) -> str:
        """Name that `--set` takes."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def text(self) -> str:
        """The option in a few lines of at most 80 columns."""
        return "\n".join([self.key, _indented(f"{self.type}; default: {self.default}"), _indented(self.meaning)])


@cache
def options() -> tuple[Option, ...]:
    """Return every option, in the order of the sections."""
    usual, names = Config(), {table.option: table for table in CHOICES} | {"compare.metric": METRICS}
    found: list[Option] = []
    for section, part in (("", usual), *sections().items()):
        hints = get_type_hints(type(part), include_extras=True)
        for field in fields(part):
            value = getattr(part, field.name)
            if is_dataclass(value):
                continue
            option = f"{section}.{field.name}"
            found.append(
                Option(
                    section=section,
                    name=field.name,
                    type=_type_text(hints[field.name], names.get(option)),
                    default=_toml(value) + _other_presets(section, field.name, value),
                    meaning=field_docs()[type(part).__name__, field.name],
                )
            )
    return tuple(found)


def sections() -> dict[str, Any]:
    """Return the sections of a recipe by name, each with its default values."""
    usual = Config()
    return {field.name: part for field in fields(Config) if is_dataclass(part := getattr(usual, field.name))}


def describe(word: str = "") -> str:
    """Return the text of the command `options`.

    Args:
        word: a section, an option, or a word to look for in names and meanings; empty: the sections with their options' names.

    Raises:
        ConfigError: no option has that word; says the nearest section or option.
    """
    if not word.strip():
        return _overview()
    found = [option for option in options() if option.section == word] or _search(word.lower())
    if not found:
        names = [*sections(), *(option.key for option in options()), *(option.name for option in options())]
        raise ConfigError(
            f"options {quoted(word)}: found no option with this word{nearest(word, names)} (sections: {', '.join(sections())})"
        )
    return "\n\n".join(option.text for option in found)


@cache
def field_docs() -> dict[tuple[str, str], str]:
    """Return the string below each field by (class, field); a section's class has those of the classes it extends."""
    docs = {}
    found: list[type] = [Config, *(type(part) for part in sections().values())]
    for section in found:
        for cls in reversed(section.__mro__[:-1]):
            body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
            for field, string in pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(string, ast.Expr):
                    docs[section.__name__, field.target.id] = " ".join(str(ast.literal_eval(string.value)).split())
    return docs


def _search(word: str) -> list[Option]:
    """Return the option of that name alone, or all with the word in their name, then all with it in their meaning."""
    exact = [option for option in options() if word in (option.key, option.name)]
    named = [option for option in options() if word in option.key]
    start = re.compile(rf"\b{re.escape(word)}", re.IGNORECASE)
    told = [option for option in options() if start.search(option.meaning) and option not in named]
    return exact or [*named, *told]


def _overview() -> str:
    parts = []
    for section, part in sections().items():
        title = (type(part).__doc__ or "").strip().splitlines()[0]
        names = ", ".join(option.name for option in options() if option.section == section)
        parts.append(f"[{section}]\n{_indented(title)}\n{_indented(names)}")
    more = "flyp-saflex options SECTION explains all of a section, flyp-saflex options WORD finds options by name and meaning."
    return "\n\n".join([*parts, textwrap.fill(more, WIDTH)])


def _indented(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def _type_text(hint: Any, table: Table[Any] | None = None) -> str:
    """Return the type of an option in words, with its range; with the names where they come from a table."""
    origin, arguments = get_origin(hint), get_args(hint)
    if table is not None:
        return f"{'list of' if origin is tuple else 'one of'} {', '.join(table)}"
    if origin is Annotated:
        metas = [meta for meta in arguments[1:] if isinstance(meta, Meta)]
        return " ".join([_type_text(arguments[0]), *map(_range_text, metas)]).replace(" ,", ",")
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, UnionType):
        return " or ".join([*(_type_text(one) for one in arguments if one is not type(None)), "unset"])
    if origin is tuple:
        inner = _type_text(arguments[0]).removeprefix("one of ")
        return "list of " + PLURALS.sub(r"\1s", inner)
    if origin is dict:
        return f"table of {_type_text(arguments[1]).replace('list of', 'lists of', 1)}"
    return KINDS[hint]


def _range_text(meta: Meta) -> str:
    """Return the range of a number in words; the empty string where it has none."""
    if meta.gt is not None:
        return f"above {meta.gt}"
    if meta.ge is None:
        return ", not empty" if meta.min_length else ""
    if meta.lt is not None:
        return f"from {meta.ge} to below {meta.lt}"
    return f"from {meta.ge} to {meta.le}" if meta.le not in (None, LARGEST) else f"of {meta.ge} or more"


def _toml(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _other_presets(section: str, name: str, usual: Any) -> str:
    """Return the values of an option in presets that differ from the default preset."""
    if section != "saflex" or not hasattr(PRESETS[DEFAULT], name):
        return ""
    values = {preset: getattr(settings, name) for preset, settings in PRESETS.items() if preset not in (DEFAULT, "paper")}
    others = [f"{preset} {_toml(value)}" for preset, value in values.items() if value != usual]
    return f" ({', '.join(others)})" if others else ""
