"""Options of the SAFLEX method and its presets: declared here once, for recipes and for other people's loops.

A recipe's `[saflex]` section starts from the values of `saflex.preset`; what it names overrides them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import msgspec

from flyp_saflex.errors import ConfigError, nearest
from flyp_saflex.ranges import BelowOne, Count, Fraction, Natural, NonNegative, Positive
from flyp_saflex.tables import EVIDENCE, WEIGHT_RULES
from flyp_saflex.user_text import quoted

RETAINED = 1e6
"""Penalty from which on labels are retained exactly."""
DEFAULT = "posterior"
"""Preset of a recipe that names none."""


@dataclass(frozen=True, kw_only=True)
class SaflexSettings:
    """Options of the method; the defaults are those of the preset `robust`."""

    temperature: Positive = 0.1
    """tau: temperature of the softened Eq. (10); every preset: 0.1."""
    penalty: NonNegative = 1e6
    """beta of Eq. (10): pull of the learned label towards the upstream label."""
    weight_rule: str = "upstream"
    """Rule that turns the gains into weights: `evidence` (decided before training), `upstream` (keep rows whose own label has
    a gain >= 0), `sum` (Eq. 11 as printed), `label` (the main text's: the learned label has one), `soft` (weigh by
    the own label's gain), `all` (keep every row)."""
    gain_scale: Literal["none", "std"] = "std"
    """Unit of the gains in the softmax of the labels: `none`: raw, as printed in the paper; `std`: their standard deviation."""
    validation_loss: Literal["ce", "margin", "train"] = "margin"
    """Loss of the validation rows: cross entropy over class captions (`ce`), its infinite-temperature limit (`margin`), or the
    training loss (`train`)."""
    validation_rows: Natural = 256
    """Validation images per refresh, drawn in turn; 0, or more than the split has: the whole split, kept in memory."""
    validation_renewed: Natural = 16
    """Head scope: validation images encoded anew per refresh, in turn; the others keep their features of earlier refreshes; 0:
    all. With 16 of 256, features are at most 16 refreshes old."""
    refresh_every: Count = 4
    """Steps between validation gradients."""
    scope: Literal["all", "head"] = "head"
    """Parameters of the validation gradient: all trained ones (`all`), or image projection and text tower (`head`; of other
    classifiers: the last Linear layer)."""
    average: BelowOne = 0.5
    """Decay of the running average of the validation gradient over refreshes; 0: no average."""
    estimator: Literal["auto", "exact", "central", "one-sided"] = "auto"
    """Directional derivative: forward-mode differentiation (`exact`), or finite differences of float32 passes (`central`,
    `one-sided`). `auto`: exact in head scope and in half precision, else one-sided; exact for the rest of the run after a
    poor comparison (`check_every`)."""
    check_every: Natural = 200
    """Steps (parts of steps, with `train.accumulation`) between comparisons of estimated and exact gains on 8 rows per process,
    logged in metrics.jsonl as `estimator_...`; 0: never."""
    agreement: Literal["ignore", "keep", "require"] = "keep"
    """Use of the model's own prediction: `ignore` it, `keep` a row whose upstream label it predicts whatever the gain, or
    `require` that it predicts the upstream label."""
    evidence: tuple[str, ...] = ()
    """Evidence of the pretrained model that decides about cached edits before training: names in `tables.EVIDENCE`; empty: none.
    The labels that it finds plausible are then the candidates of Eq. (10), and `weight_rule = "evidence"` takes its weights."""
    evidence_threshold: Fraction = 0.2
    """Posterior below which a label does not count; 0.2: to drop a good edit costs four times as much as to keep a bad one."""
    gains_of: Literal["log", "prob"] = "log"
    """Reading of f in Eq. (9)-(11): log-probabilities, or probabilities (then the gains of a row sum to zero)."""
    permute_gains: bool = False
    """A control experiment of the trainer: decide about every augmented row with the gains of another row of the step."""
    class_balance: Fraction = 1.0
    """Strength of the correction of class frequencies, which dropping rows shifts; 0: none, 1: full."""

    def __post_init__(self) -> None:
        WEIGHT_RULES.check(self.weight_rule)
        for kind in self.evidence:
            EVIDENCE.check(kind)

    @property
    def needs_gains(self) -> bool:
        """True if a decision depends on gains; otherwise no validation gradient is taken."""
        retained = self.penalty >= RETAINED
        return not (self.weight_rule in ("all", "evidence") and retained and self.agreement == "ignore")


_PAPER = SaflexSettings(
    # The appendix' values for CLIP finetuning: its tau and beta, Eq. (11) as printed, the training loss, all parameters. It
    # does not say how many validation rows; 256 is our batch size.
    temperature=0.1,
    penalty=0.0,
    weight_rule="sum",
    gain_scale="none",
    validation_loss="train",
    validation_rows=256,
    validation_renewed=0,
    refresh_every=1,
    scope="all",
    average=0.0,
    estimator="exact",
    class_balance=0.0,
    agreement="ignore",
)
PRESETS: dict[str, SaflexSettings] = {
    # The default, ours: the pretrained model decides once about every edit, by its zero-shot probabilities and by how much the
    # edit still resembles its source, calibrated on the labels that edits did not come with (null rule). The model under
    # training has no vote: it drops what it does not recognise yet, which is what an edit is for (scripts/RESULTS.md).
    # Labels are learned at tau = 0.1 among the plausible ones (Eq. 10 on a smaller feasible set).
    "posterior": SaflexSettings(
        evidence=("zero-shot", "source", "source-middle"),
        weight_rule="evidence",
        penalty=1.0,
        agreement="ignore",
        class_balance=0.0,
    ),
    # Ours: labels are retained, rows whose own label does not help are dropped. The margin's gradient does not fade when the
    # validation rows are classified right. Many validation rows, reused over steps, because the sampling noise of the
    # gradient is larger than any other error, but not a large split whole, which would cost more than training; and few of
    # their images per refresh: with 16 of 256 renewed the gains are as good as with 64 fresh ones (scripts/RESULTS.md). The
    # model's own prediction may overrule a negative gain: together the two drop 13 % of the clean edits, the model's vote
    # alone 24 % (scripts/RESULTS.md). Class balance, because dropping otherwise favours the classes it drops least.
    "robust": SaflexSettings(),
    # Eq. (9)-(11) as printed, f read as log-probabilities (`paper` is the former name) or as probabilities.
    "paper-log": _PAPER,
    "paper-prob": dataclasses.replace(_PAPER, gains_of="prob"),
    "paper": _PAPER,
}


def preset(name: str = "robust", **overrides: Any) -> SaflexSettings:
    """Return the settings of a preset with some changed; an override of None leaves the preset's value.

    Raises:
        ConfigError: unknown preset or field (with the nearest name), or a value out of range.
    """
    return _checked(with_preset(name, {key: value for key, value in overrides.items() if value is not None}))


def checked(settings: SaflexSettings) -> SaflexSettings:
    """Return settings that somebody constructed, with every value in its range.

    Raises:
        ConfigError: a value out of range.
    """
    return _checked(dataclasses.asdict(settings))


def _checked(values: dict[str, Any]) -> SaflexSettings:
    try:
        return msgspec.convert(values, SaflexSettings)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at `$.")
        field = where.rstrip("`")
        if names := get_args(get_type_hints(SaflexSettings)[field]):
            problem = f"expected one of {', '.join(names)}{nearest(str(values[field]), names)}"
        raise ConfigError(f"saflex.{field} = {quoted(repr(values[field]))}: {quoted(problem)}") from None


def with_preset(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset's values by option with some replaced, unchecked.

    Raises:
        ConfigError: unknown preset or option (with the nearest name).
    """
    if not isinstance(name, str) or name not in PRESETS:  # a recipe may give any value
        found = f"saflex.preset = {quoted(repr(name))}"
        raise ConfigError(f"{found}: expected one of {', '.join(PRESETS)}{nearest(str(name), PRESETS)}")
    known = [field.name for field in dataclasses.fields(SaflexSettings)]
    for key in values:
        if key not in known:
            raise ConfigError(f"saflex has no option {quoted(repr(key))}{nearest(key, known)} (known: {', '.join(known)})")
    return dataclasses.asdict(PRESETS[name]) | dict(values)
