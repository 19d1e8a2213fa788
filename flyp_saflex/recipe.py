"""Recipes: TOML loading, `--set` overrides, checks of options and of their combinations.

msgspec converts values and checks types and ranges. This module adds overrides, the nearest known name for a typo, checks
across options, and TOML output with the documentation of each option as a comment.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError, nearest
from flyp_saflex.option_docs import field_docs
from flyp_saflex.presets import DEFAULT, PRESETS, SaflexSettings, with_preset
from flyp_saflex.tables import CHOICES, METRICS
from flyp_saflex.user_text import check_values, is_file_name, parse_toml, quoted, read_toml, tomllib

SECTIONS = {f.name: f.type for f in dataclasses.fields(Config) if f.name not in ("recipe", "seed")}


def shipped() -> list[str]:
    """Return the sorted names of the recipes shipped in the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files("flyp_saflex.recipes").iterdir()
        if entry.name.endswith(".toml")
    )


def load(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """Load a recipe, apply overrides and check every option.

    Args:
        recipe: name of a shipped recipe, or path of a TOML file.
        overrides: `section.field=value`; the last one for an option wins.

    Raises:
        ConfigError: unknown recipe, section or key (with the nearest name), wrong type or range, or options that exclude each
            other.
    """
    path, shown = Path(recipe), quoted(recipe)
    is_file = _is_file(path)
    if recipe.endswith(".toml") or is_file:
        if not is_file:
            raise ConfigError(f"recipe {shown}: there is no such file; shipped recipes: {', '.join(shipped())}")
        values, name = read_toml(path, ConfigError), path.stem
    elif recipe in shipped():
        text = (resources.files("flyp_saflex.recipes") / f"{recipe}.toml").read_text(encoding="utf-8")
        values, name = parse_toml(text, f"recipe {recipe}", ConfigError), recipe
    else:
        raise ConfigError(
            f"unknown recipe '{shown}'{nearest(recipe, shipped())} "
            f"(shipped: {', '.join(shipped())}; or give the path of a .toml file)"
        )
    values.setdefault("recipe", name)
    for override in overrides:
        _apply(values, override)
    return build(values, source=f"recipe {shown}")


def build(values: Mapping[str, Any], source: str) -> Config:
    """Convert nested values into a checked `Config`.

    Args:
        values: sections with their options, as read from TOML; a missing option takes its default.
        source: origin of the values, named in errors.

    Raises:
        ConfigError: see `load`.
    """
    _check_keys(values, source)
    try:
        config = msgspec.convert(_with_preset(_tuples(values)), Config)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        where = place.rstrip("`")
        raise ConfigError(
            f"{source}: {where or 'top level'}{_found(values, where)}: {quoted(problem)}{_choices(where)}"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    _check_names(config, source)
    problems = check(config)
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return config


def override(config: Config, overrides: Iterable[str], source: str) -> Config:
    """Return the recipe with some `section.field=value` applied, checked; `source` names their origin in errors.

    Raises:
        ConfigError: as `load`.
    """
    values = _stated(config)
    for text in overrides:
        try:
            _apply(values, text)
        except ConfigError as error:
            raise ConfigError(f"{source}: {str(error).removeprefix('--set ')}") from None
    return build(values, source)


def dumps(config: Config, *, comments: bool = False) -> str:
    """Return the recipe as TOML; unset options and the preset's own are left out, `comments` adds each field's documentation."""
    text = tomli_w.dumps(_stated(config))
    if not comments:
        return text
    docs, section, lines = field_docs(), "Config", []
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)(?:\.(\w+))?\]", line):
            section = "" if header[2] else type(getattr(config, header[1])).__name__  # the keys of a table are the user's names
            if header[2]:
                lines.append(f"# {docs[type(getattr(config, header[1])).__name__, header[2]]}")
        elif (key := re.match(r"(\w+) =", line)) and (doc := docs.get((section, key[1]))):
            lines.append(f"# {doc}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _stated(config: Config) -> dict[str, Any]:
    """Return the options by section; unset ones and the preset's own are left out, so another preset brings its values."""
    values = _without_none(dataclasses.asdict(config))
    usual = dataclasses.asdict(PRESETS[config.saflex.preset])
    values["saflex"] = {key: value for key, value in values["saflex"].items() if key not in usual or value != usual[key]}
    return values


def differences(old: Config, new: Config) -> list[str]:
    """Return one line `section.field: old -> new` per option that differs between two recipes."""
    a, b = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a | b) if a.get(key) != b.get(key)]


def check(config: Config) -> list[str]:
    """Return one line per invalid combination of options, with both options and the fix."""
    problems = []
    train, saflex, augment = config.train, config.saflex, config.augment
    if saflex.enabled and not augment.upstream:
        problems.append(
            "saflex.enabled is true but augment.upstream is empty, so there is nothing to weigh: set augment.upstream "
            '(["cache"], ["randaugment"], ...) or saflex.enabled=false'
        )
    if augment.filter == "scores" and "cache" not in augment.upstream:
        problems.append('augment.filter = "scores" needs edits: add "cache" to augment.upstream or set augment.filter="none"')
    others = {"mixup", "cutmix"} & set(augment.upstream) or (saflex.enabled and saflex.evidence)
    if augment.inter_class != "source" and ("cache" not in augment.upstream or others):
        problems.append(
            f'augment.inter_class = "{augment.inter_class}" labels cached edits: set augment.upstream=["cache"], without mixup '
            "and cutmix, and with SAFLEX a preset without evidence, such as saflex.preset=robust"
        )
    if "cache" in augment.upstream[1:]:
        problems.append('augment.upstream: "cache" must come first, the operations after it are applied to its images')
    if "copy-paste" in augment.upstream[1:]:
        problems.append('augment.upstream: "copy-paste" must come first and without "cache": it takes boxes of training images')
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
    if train.adapter != "none" and (train.l2_sp or train.method == "linear-probe"):
        reason = "train.l2_sp" if train.l2_sp else "train.method = linear-probe"
        problems.append(
            f'train.adapter = "{train.adapter}" goes without {reason}: its updates start at zero; leave one of them out'
        )
    if train.adapter != "none" and train.freeze_text and saflex.enabled and saflex.scope == "head":
        problems.append(
            f'train.adapter = "{train.adapter}" and train.freeze_text leave saflex.scope = "head" nothing but logit_scale: set '
            "saflex.scope=all or train.freeze_text=false"
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
    for name, example in (("key", "winter"), ("scores", "scores.jsonl")):
        value = getattr(config.cache, name)
        if value and not is_file_name(value):
            problems.append(
                f"cache.{name} = {quoted(value)}: expected a plain name that stays in cache.root, without / and the like, "
                f"for example {example}"
            )
    if augment.upstream and not round(augment.per_train * train.batch_size):
        problems.append(
            f"augment.per_train = {augment.per_train} of train.batch_size = {train.batch_size} rounds to no augmented row: raise "
            "one of them, or set augment.upstream=[] and saflex.enabled=false"
        )
    splits = set(config.data.add_to_train)
    for option, value in (("train.select_split", train.select_split), ("saflex.validation_split", saflex.validation_split)):
        used = value and (option.startswith("train") or (saflex.enabled and saflex.gradient_rows == "validation"))
        if used and value in splits:
            problems.append(f"{option} = {value} is also in data.add_to_train: a split that is trained on selects nothing")
    return problems


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    shown = f"--set {quoted(override)}"
    if not separator:
        raise ConfigError(f"{shown}: expected section.field=value, for example --set train.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set data.root=/images
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown}: the value cannot be read ({quoted(str(error))}); write a shorter one") from None
    *sections, field = key.split(".")
    if len(sections) > 2:
        raise ConfigError(f"{shown}: expected section.field=value, found {len(sections)} sections")
    check_values({key: value}, shown, ConfigError)
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{shown}: '{quoted(section)}' is an option, not a section")
    target[field] = value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False


def _check_keys(values: Mapping[str, Any], source: str) -> None:
    for key, value in values.items():
        if key in SECTIONS:
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{source}: '{key}' is a section, found the value {quoted(repr(value))}: write {key}.field = ..."
                )
            section = type(getattr(Config(), key))
            fields = [f.name for f in dataclasses.fields(section)]
            for name in value:
                if name not in fields:
                    raise ConfigError(f"{source}: unknown key '{quoted(f'{key}.{name}')}'{_nearest_key(name, fields, key)}")
        elif key not in ("recipe", "seed"):
            raise ConfigError(f"{source}: unknown key '{quoted(key)}'{nearest(key, ['seed', *SECTIONS])}")


def _check_names(config: Config, source: str) -> None:
    """Check the options whose values are names of a table."""
    for option, table in (*((table.option, table) for table in CHOICES), ("compare.metric", METRICS)):
        section, _, name = option.partition(".")
        value = getattr(getattr(config, section), name)
        if value == "" == getattr(getattr(Config(), section), name):  # empty: chosen later
            continue
        for one in value if isinstance(value, tuple) else (value,):
            try:
                table.check(one, option)
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from None


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the section `saflex` leaves to its preset."""
    given = dict(values.get("saflex", {}))
    known = {field.name for field in dataclasses.fields(SaflexSettings)}
    filled = with_preset(given.get("preset", DEFAULT), {key: value for key, value in given.items() if key in known})
    return values | {"saflex": {key: value for key, value in given.items() if key not in known} | filled}


def _nearest_key(name: str, fields: list[str], section: str) -> str:
    hint = nearest(name, fields)
    if hint:
        return hint.replace("'", f"'{section}.", 1)
    homes = [other for other in SECTIONS if any(f.name == name for f in dataclasses.fields(type(getattr(Config(), other))))]
    return f"; did you mean '{homes[0]}.{name}'?" if homes else f" ({section} has: {', '.join(fields)})"


def _found(values: Mapping[str, Any], where: str) -> str:
    """Return ` = value` of an option, cut where it is long; the empty string where it cannot be told."""
    value: Any = values
    for key in re.findall(r"[^.\[\]]+", where):
        is_list = isinstance(value, list | tuple) and key.isdigit()
        value = value.get(key) if isinstance(value, Mapping) else value[int(key)] if is_list else None
    return "" if value is None else f" = {quoted(repr(value))}"


def _choices(where: str) -> str:
    section, _, name = where.partition(".")
    name = name.partition("[")[0]
    if section not in SECTIONS or not name:
        return ""
    classes = type(getattr(Config(), section)).__mro__[:-1]
    annotation = next((found[name] for cls in classes if name in (found := inspect.get_annotations(cls))), "")
    return f" (expected {annotation})" if "Literal" in str(annotation) else ""


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert single values of list options to lists, so that `--set augment.upstream=randaugment` works."""
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
    return [item] if isinstance(item, str | int | float) else item


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat
