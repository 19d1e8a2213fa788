"""Conditions of a comparison: names, parts in the verdict, overrides, and the usual set.

A condition is a name with overrides of the recipe. Its name starts with its role (`ROLES`); after ` @ ` it names the set of
edits that it is trained on. `{seed}` and `{kept}` in overrides are filled in per run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from flyp_saflex import recipe
from flyp_saflex.comparing import CompareConfig
from flyp_saflex.config import Config, DataConfig
from flyp_saflex.data.registry import load_dataset, split_for
from flyp_saflex.errors import ConfigError, DataError, nearest
from flyp_saflex.records import Dataset
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.data_record import DataRecord, record_of

ROLES = {
    "zero-shot": "the pretrained model",
    "no-edits": "no augmented rows, the same steps",
    "no-edits-same-rows": "further training rows in place of the augmented ones",
    "trusted": "every augmented row with weight one and its own label",
    "filter": "augmented rows chosen by a plain filter",
    "saflex": "SAFLEX",
    "validation-trained": "augmented rows trusted, SAFLEX's validation rows trained on as well",
    "permuted": "SAFLEX with the gains of other rows",
    "oracle": "augmented rows chosen with the truth",
}
"""Parts that a condition can play in the verdict, by the start of its name."""
WITHOUT_EDITS = ("zero-shot", "no-edits", "no-edits-same-rows")
SET_MARK = " @ "
SEED, KEPT = "{seed}", "{kept}"


@dataclass(frozen=True)
class Condition:
    """One line of the comparison.

    Attributes:
        name: with the set of edits, `saflex @ half corrupted`.
        role: a key of `ROLES`, or empty: it stands in the tables only.
        edits: name of the set of edits; empty without sets, and without augmented rows.
        overrides: of the recipe, placeholders included.
    """

    name: str
    role: str
    edits: str
    overrides: tuple[str, ...]

    @property
    def needs_kept(self) -> bool:
        """True if it is trained at the kept share of SAFLEX."""
        return any(KEPT in text for text in self.overrides)

    @property
    def short_name(self) -> str:
        """Name without the set of edits."""
        return self.name.partition(SET_MARK)[0]

    @property
    def slug(self) -> str:
        """Name of its run folders, without the seed."""
        return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in self.name.lower()).split())

    def config(self, base: Config, seed: int, kept: float | None = None) -> Config:
        """Return the recipe of one run: an ordinary one, without the comparison that it is a part of.

        Args:
            base: recipe of the comparison.
            seed: of the run.
            kept: SAFLEX's kept share; None: not known yet, the config serves checks only.

        Raises:
            ConfigError: an override that cannot be applied; names the condition.
        """
        share = f"{0.5 if kept is None else kept:.4f}"
        overrides = [text.replace(SEED, str(seed)).replace(KEPT, share) for text in self.overrides]
        for text in overrides:
            if text.partition("=")[0].partition(".")[0] in ("seed", "recipe", "compare"):
                raise ConfigError(
                    f"compare condition '{self.name}': {text} is set by the comparison itself: leave it out, "
                    "or change compare.seeds or the name of the condition"
                )
        plain = replace(base, compare=CompareConfig(), seed=seed, recipe=self.name)
        return recipe.override(plain, overrides, source=f"compare condition '{self.name}'")


def role_of(name: str) -> str:
    """Return the longest role that a condition's name is or starts with, or the empty string."""
    plain = name.partition(SET_MARK)[0].lower()
    found = [role for role in ROLES if plain == role or (plain.startswith(role) and not plain[len(role)].isalnum())]
    return max(found, key=len, default="")


def conditions_of(config: Config) -> list[Condition]:
    """Return the conditions of a recipe's `[compare]` section in order, checked for every seed; nothing is run.

    Raises:
        ConfigError: an override that cannot be applied, names that clash, an unknown baseline, no condition with augmented rows.
        DataError: edits of some seed that are not there.
    """
    options = config.compare
    given = options.conditions or usual(config)
    made: list[Condition] = []
    for name, own in given.items():
        condition = Condition(name, role_of(name), name.partition(SET_MARK)[2], (*options.common, *own))
        sets = options.edits if condition.role not in WITHOUT_EDITS and not condition.edits else {}
        if sets and condition.config(config, options.seeds[0]).augment.upstream:
            made += [_on_set(condition, edits, extra) for edits, extra in sets.items()]
        else:
            made.append(condition)
    _check_names(made, options)
    _check_runs(made, config)
    return made


def baseline_of(conditions: Sequence[Condition], options: CompareConfig) -> str:
    """Return the condition that the report's tables compare with."""
    without = [condition.name for condition in conditions if condition.role == "no-edits"]
    return options.baseline or (without or [conditions[0].name])[0]


def differing_by_seed(conditions: Sequence[Condition]) -> tuple[str, ...]:
    """Return the options that the overrides of some condition set by seed."""
    texts = [text for condition in conditions for text in condition.overrides if SEED in text or KEPT in text]
    return tuple(dict.fromkeys(text.partition("=")[0] for text in texts))


def saflex_for(condition: Condition, conditions: Sequence[Condition]) -> Condition:
    """Return the SAFLEX condition on the same edits whose kept share `{kept}` stands for.

    Raises:
        ConfigError: there is none.
    """
    found = [other for other in conditions if other.role == "saflex" and other.edits == condition.edits and not other.needs_kept]
    if not found:
        raise ConfigError(
            f"compare condition '{condition.name}' needs {KEPT}, the share that SAFLEX keeps, but no condition whose name starts "
            "with 'saflex' is trained on the same edits: add one, or write a number"
        )
    return found[0]


def usual(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the usual conditions of a recipe: overrides by name.

    Raises:
        ConfigError: the recipe has neither an upstream nor edits.
        DataError: the dataset cannot be read.
    """
    options = config.compare
    first_set = next(iter(options.edits.values()), ())
    probe = Condition("common", "", "", (*options.common, *first_set)).config(config, options.seeds[0])
    train, augment = probe.train, probe.augment
    upstream = augment.upstream or ("cache",)
    if not augment.upstream and not _entry(probe):
        raise ConfigError(
            "nothing to compare: augment.upstream is empty and cache.root = "
            f"{probe.cache.root} holds no edits of '{probe.data.name}': set augment.upstream, or make edits first"
        )
    data = _dataset(probe.data)
    steps = () if train.steps else (f"train.steps={round(train.epochs * len(data.train) / train.batch_size)}",)
    rows = train.batch_size + round(augment.per_train * train.batch_size)
    plain = ("saflex.enabled=false", "augment.filter=none", "saflex.select=auto")
    without = ("augment.upstream=[]", *plain)
    trusted = (f"augment.upstream={json.dumps(upstream)}", *plain)
    saflex = (*trusted, "saflex.enabled=true", f"saflex.select={probe.saflex.select}")
    made = {
        "zero-shot": (*without, "train.steps=0", "train.epochs=0", "train.probe_steps=0"),
        "no-edits": without,
        "no-edits-same-rows": (*without, *steps, f"train.batch_size={min(rows, len(data.train))}"),
        "trusted": trusted,
        "saflex": saflex,
        "filter-argmax": (*trusted, "augment.filter=argmax"),
        "filter-lowest-loss": (*trusted, "augment.filter=lowest-loss", f"augment.keep_fraction={KEPT}"),
        "filter-random": (*trusted, "augment.filter=random", f"augment.keep_fraction={KEPT}"),
        "validation-trained": (*trusted, *steps, *_validation_trained(probe, data)),
        "permuted": (*saflex, "saflex.permute_gains=true"),
    }
    if upstream[0] == "cache" and _all_have_scores(config):
        made["filter-alia"] = (*trusted, "augment.filter=scores")
    return made


def notes(conditions: Sequence[Condition], config: Config) -> list[str]:
    """Return what a user should know before the runs start."""
    found = []
    for condition in conditions:
        if not condition.role:
            hint = nearest(condition.name, ROLES)
            found.append(f"condition '{condition.name}' stands in the tables but plays no part in the verdict{hint}")
        if condition.role == "no-edits-same-rows" and not config.compare.conditions:
            rows = config.train.batch_size + round(config.augment.per_train * config.train.batch_size)
            if (size := condition.config(config, config.compare.seeds[0]).train.batch_size) < rows:
                found.append(f"'{condition.name}' has {size} rows a step, not {rows}: the training split has no more images")
    if not config.compare.conditions and not any("filter-alia" in condition.name for condition in conditions):
        found.append(f"no condition with ALIA's filter: the cache has no {config.cache.scores} for every seed")
    return found


def _on_set(condition: Condition, edits: str, extra: tuple[str, ...]) -> Condition:
    return Condition(f"{condition.name}{SET_MARK}{edits}", condition.role, edits, (*condition.overrides, *extra))


def _check_names(conditions: Sequence[Condition], options: CompareConfig) -> None:
    names = [condition.name for condition in conditions]
    if options.baseline and options.baseline not in names:
        raise ConfigError(
            f"compare.baseline = {options.baseline}: there is no such condition{nearest(options.baseline, names)} "
            f"(conditions: {', '.join(names)})"
        )
    slugs: dict[str, str] = {}
    for condition in conditions:
        if not condition.slug or condition.slug in slugs:
            other = f"as '{slugs[condition.slug]}'" if condition.slug in slugs else "that is empty"
            raise ConfigError(f"compare condition '{condition.name}' has a folder name {other}: choose another name")
        slugs[condition.slug] = condition.name


def _check_runs(conditions: Sequence[Condition], config: Config) -> None:
    """Check the recipe of every run, and that its edits are there."""
    augmented = False
    for condition in conditions:
        if condition.needs_kept:
            saflex_for(condition, conditions)
        for seed in dict.fromkeys(config.compare.seeds):
            run = condition.config(config, seed)
            augmented |= bool(run.augment.upstream)
            if "cache" in run.augment.upstream:
                if condition.role in WITHOUT_EDITS and (run.train.steps or run.train.epochs):
                    raise ConfigError(
                        f"compare condition '{condition.name}' begins with '{condition.role}', the name of a run without edits, "
                        'but trains on cached edits: give it another name ("saflex-..."), or set augment.upstream=[]'
                    )
                try:
                    AugmentCache.open(run.cache.root, run.data.name, run.cache.key)
                except DataError as error:
                    raise DataError(f"compare condition '{condition.name}', seed {seed}: {error}") from None
    if not augmented:
        raise ConfigError(
            "nothing to compare: no condition has augmented rows: give one of them augment.upstream, for example "
            'augment.upstream=["cache"]'
        )


def _validation_trained(config: Config, data: Dataset) -> tuple[str, ...]:
    """Return overrides that train on SAFLEX's validation split, and select weights on another one or not at all."""
    split = split_for(data, config.saflex.validation_split, "select").name
    added = json.dumps([*config.data.add_to_train, split])
    others = [name for name, other in data.splits.items() if other.role == "select" and name != split]
    overrides = [f"data.add_to_train={added}"]
    for option, name in (("train", config.train.select_split), ("evaluate", config.evaluate.select_split)):
        if name and split_for(data, name).name == split:
            other = others[0] if others and option == "train" else ""
            overrides.append(f"{option}.select_split={other}")
    return tuple(overrides)


def _all_have_scores(config: Config) -> bool:
    options = config.compare
    sets: Mapping[str, tuple[str, ...]] = options.edits or {"": ()}
    for extra in sets.values():
        for seed in options.seeds:
            run = Condition("common", "", "", (*options.common, *extra)).config(config, seed)
            entry = _entry(run)
            if entry is None or not (entry.folder / run.cache.scores).is_file():
                return False
    return True


def _entry(config: Config) -> AugmentCache | None:
    try:
        return AugmentCache.open(config.cache.root, config.data.name, config.cache.key)
    except DataError:
        return None


@cache
def _dataset(data: DataConfig) -> Dataset:
    """Return the dataset of a recipe for the names and sizes of its splits; these are the same for every seed."""
    return load_dataset(data, check_files=False)


@cache
def _record(data: DataConfig) -> DataRecord:
    return record_of(_dataset(data))


def forget_datasets() -> None:
    """Forget datasets read by an earlier comparison in this process: their files may have changed."""
    _dataset.cache_clear()
    _record.cache_clear()


def splits_of(config: Config) -> Dataset:
    """Return a run's dataset for the names, roles and sizes of its splits.

    Raises:
        DataError: it cannot be read.
    """
    return _dataset(config.data)


def data_of(config: Config) -> DataRecord:
    """Return the record of a run's dataset.

    Raises:
        DataError: it cannot be read.
    """
    return _record(config.data)
