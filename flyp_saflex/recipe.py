"""Recipes: TOML file or shipped name, `--set` overrides, errors that name the key (floor 1).

msgspec converts and checks types and ranges; what is added here is the nearest known name for a typo, overrides, and
TOML with the fields' documentation as comments.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import msgspec
import tomli_w

from flyp_saflex import config as config_module
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTIONS = {f.name: f.type for f in dataclasses.fields(Config) if f.name not in ("recipe", "seed")}


def shipped() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files("flyp_saflex.recipes").iterdir()
        if entry.name.endswith(".toml")
    )


def load(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe (a shipped name or a TOML path), apply `section.field=value` overrides, check everything.

    Raises:
        ConfigError: unknown recipe, section or key (with the nearest name), wrong type or range, or options that
            exclude each other.
    """
    path = Path(recipe)
    if recipe.endswith(".toml") or path.is_file():
        if not path.is_file():
            raise ConfigError(f"recipe {recipe}: there is no such file; shipped recipes: {', '.join(shipped())}")
        text, name = path.read_text(encoding="utf-8"), path.stem
    elif recipe in shipped():
        text, name = (resources.files("flyp_saflex.recipes") / f"{recipe}.toml").read_text(encoding="utf-8"), recipe
    else:
        raise ConfigError(
            f"unknown recipe '{recipe}'{nearest(recipe, shipped())} "
            f"(shipped: {', '.join(shipped())}; or give the path of a .toml file)"
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {recipe} is not valid TOML: {error}") from None
    values.setdefault("recipe", name)
    for override in overrides:
        _apply(values, override)
    return build(values, source=f"recipe {recipe}")


def build(values: Mapping[str, Any], source: str) -> Config:
    """Turn nested values into a checked `Config`; `source` names their origin in errors."""
    _check_keys(values, source)
    try:
        config = msgspec.convert(_tuples(values), Config)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at `$.")
        raise ConfigError(f"{source}: {where.rstrip('`') or 'top level'}: {problem}{_choices(where.rstrip('`'))}") from None
    problems = check(config)
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return config


def override(config: Config, overrides: Iterable[str], source: str) -> Config:
    """Return the recipe with some `section.field=value` applied, checked; `source` names their origin in errors.

    Raises:
        ConfigError: as `load`.
    """
    values = _without_none(dataclasses.asdict(config))
    for text in overrides:
        try:
            _apply(values, text)
        except ConfigError as error:
            raise ConfigError(f"{source}: {str(error).removeprefix('--set ')}") from None
    return build(values, source)


def dumps(config: Config, *, comments: bool = False) -> str:
    """Return the recipe as TOML; unset options are left out, `comments` adds each field's documentation."""
    text = tomli_w.dumps(_without_none(dataclasses.asdict(config)))
    if not comments:
        return text
    docs, section, lines = _field_docs(), "Config", []
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)(?:\.(\w+))?\]", line):
            section = "" if header[2] else type(getattr(config, header[1])).__name__  # the keys of a table are the user's names
            if header[2]:
                lines.append(f"# {docs[type(getattr(config, header[1])).__name__, header[2]]}")
        elif (key := re.match(r"(\w+) =", line)) and (doc := docs.get((section, key[1]))):
            lines.append(f"# {doc}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """Return `section.field: old -> new` for every option in which two recipes differ."""
    a, b = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a | b) if a.get(key) != b.get(key)]


def check(config: Config) -> list[str]:
    """Return one line per combination of options that cannot work, naming both options and the fix."""
    problems = []
    train, saflex, augment = config.train, config.saflex, config.augment
    if saflex.enabled and not augment.upstream:
        problems.append(
            "saflex.enabled is true but augment.upstream is empty, so there is nothing to weigh: set augment.upstream "
            '(["cache"], ["randaugment"], ...) or saflex.enabled=false'
        )
    if augment.filter == "scores" and "cache" not in augment.upstream:
        problems.append('augment.filter = "scores" needs edits: add "cache" to augment.upstream or set augment.filter="none"')
    if "cache" in augment.upstream[1:]:
        problems.append('augment.upstream: "cache" must come first, the operations after it are applied to its images')
    if train.batch_size % train.accumulation:
        problems.append(
            f"train.batch_size = {train.batch_size} is not a multiple of train.accumulation = {train.accumulation}: "
            "change one of them"
        )
    if train.freeze_image and train.freeze_text and train.method in ("flyp", "ce-text"):
        problems.append(
            f"train.freeze_image and train.freeze_text leave train.method = {train.method} nothing to train but logit_scale: "
            "unfreeze one or use train.method=linear-probe"
        )
    if saflex.select == "always" and not (saflex.enabled or augment.filter in ("argmax", "lowest-loss", "random")):
        problems.append(
            'saflex.select = "always", but nothing is dropped while training with saflex.enabled = false and '
            f'augment.filter = "{augment.filter}": set saflex.select="auto" or saflex.enabled=true'
        )
    if saflex.select == "always" and (train.freeze_image or train.method == "linear-probe"):
        frozen = "train.freeze_image = true" if train.freeze_image else "train.method = linear-probe"
        problems.append(
            f'saflex.select = "always" saves backward passes of images, but {frozen} leaves none: set saflex.select="auto"'
        )
    if train.frozen_cache and (augment.on_train or any(name != "cache" for name in augment.upstream)):
        problems.append(
            "train.frozen_cache holds fixed activations, but augment.on_train or augment.upstream changes images at random: "
            'set augment.on_train=[] and augment.upstream=[] or ["cache"], or train.frozen_cache=""'
        )
    if train.frozen_cache and not train.freeze_batchnorm:
        problems.append("train.frozen_cache needs train.freeze_batchnorm=true: with batch statistics nothing is fixed")
    if train.frozen_cache and not (train.freeze_image_blocks or train.freeze_image or train.method == "linear-probe"):
        problems.append("train.frozen_cache needs frozen image blocks: set train.freeze_image_blocks or train.freeze_image")
    splits = set(config.data.add_to_train)
    for option, value in (("train.select_split", train.select_split), ("saflex.validation_split", saflex.validation_split)):
        used = value and (option.startswith("train") or saflex.enabled)
        if used and value in splits:
            problems.append(f"{option} = {value} is also in data.add_to_train: a split that is trained on selects nothing")
    return problems


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override}: expected section.field=value, for example --set train.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set data.root=/images
    *sections, field = key.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: '{section}' is an option, not a section")
    target[field] = value


def _check_keys(values: Mapping[str, Any], source: str) -> None:
    for key, value in values.items():
        if key in SECTIONS:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: '{key}' is a section, found the value {value!r}: write {key}.field = ...")
            section = type(getattr(Config(), key))
            fields = [f.name for f in dataclasses.fields(section)]
            for name in value:
                if name not in fields:
                    raise ConfigError(f"{source}: unknown key '{key}.{name}'{_nearest_key(name, fields, key)}")
        elif key not in ("recipe", "seed"):
            raise ConfigError(f"{source}: unknown key '{key}'{nearest(key, ['seed', *SECTIONS])}")


def _nearest_key(name: str, fields: list[str], section: str) -> str:
    hint = nearest(name, fields)
    if hint:
        return hint.replace("'", f"'{section}.", 1)
    homes = [other for other in SECTIONS if any(f.name == name for f in dataclasses.fields(type(getattr(Config(), other))))]
    return f"; did you mean '{homes[0]}.{name}'?" if homes else f" ({section} has: {', '.join(fields)})"


def _choices(where: str) -> str:
    section, _, name = where.partition(".")
    name = name.partition("[")[0]
    if section not in SECTIONS or not name:
        return ""
    annotation = inspect.get_annotations(type(getattr(Config(), section))).get(name, "")
    hint = annotation if isinstance(annotation, str) else ""
    aliases = {"Upstream": config_module.Upstream, "WeightRule": config_module.WeightRule}
    for alias, literal in aliases.items():
        hint = hint.replace(alias, f"Literal{list(get_args(literal))}")
    return f" (expected {hint})" if "Literal" in hint else ""


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Let a single word stand for a list of one, so that `--set augment.upstream=randaugment` works."""
    result = dict(values)
    for section, options in values.items():
        if isinstance(options, Mapping):
            default = getattr(Config(), section)
            result[section] = {name: _as_declared(item, getattr(default, name)) for name, item in options.items()}
    return result


def _as_declared(item: Any, default: Any) -> Any:
    if isinstance(default, dict) and isinstance(item, Mapping):
        return {name: _listed(value) for name, value in item.items()}
    return _listed(item) if isinstance(default, tuple) else item


def _listed(item: Any) -> Any:
    if item == "":
        return []
    return [item] if isinstance(item, (str, int, float)) else item


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


@cache
def _field_docs() -> dict[tuple[str, str], str]:
    docs = {}
    for node in ast.parse(inspect.getsource(config_module)).body:
        if isinstance(node, ast.ClassDef):
            for field, string in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(string, ast.Expr):
                    docs[node.name, field.target.id] = " ".join(str(ast.literal_eval(string.value)).split())
    return docs
