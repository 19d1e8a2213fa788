"""SAFLEX's settings and its presets (floor 2: tensors only; the options themselves are the recipe's `[saflex]` section)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from flyp_saflex.errors import ConfigError, nearest
from flyp_saflex.saflex.closed_form import WEIGHT_RULES
from flyp_saflex.saflex.estimators import Choice
from flyp_saflex.saflex.losses import VALIDATION_LOSSES

GainScale = Literal["none", "std"]
Scope = Literal["all", "head"]
Agreement = Literal["ignore", "keep", "require"]


@dataclass(frozen=True, kw_only=True)
class SaflexSettings:
    """What SAFLEX does; field names are those of the recipe's `[saflex]` section. See `preset` for values."""

    temperature: float = 0.1
    """tau of the soft labels."""
    penalty: float = 1e6
    """beta: pull of the learned label towards the one that the row came with; 1e6 retains it exactly."""
    weight_rule: str = "upstream"
    """A name in `WEIGHT_RULES`."""
    gain_scale: GainScale = "std"
    """Unit of the gains: as printed in the paper, or their standard deviation over the batch."""
    validation_loss: str = "margin"
    """`ce`, `margin` or `train`; for the trainer, which builds the loss function."""
    validation_rows: int = 256
    """Validation rows per refresh, 0: the whole split; for the trainer."""
    validation_renewed: int = 16
    """How many of them get new image features per refresh in head scope, 0: all; for the trainer (`ValidationBank`)."""
    refresh_every: int = 4
    """Steps between validation gradients."""
    scope: Scope = "head"
    """Parameters whose gradient is meant; for the trainer, which passes them."""
    average: float = 0.5
    """Decay of the validation gradient's running average; 0: the newest only."""
    estimator: Choice = "auto"
    """How the directional derivative is computed; `auto`: see `estimators.choose`."""
    check_every: int = 200
    """Calls between comparisons of an estimated derivative with the exact one, on a few rows; 0: never."""
    agreement: Agreement = "keep"
    """Rows whose label the model itself predicts: `ignore` that, `keep` them whatever their gain, or `require` it."""
    permute_gains: bool = False
    """A control: every row is decided about with the gains of another row; for the trainer, which knows the rows."""
    class_balance: float = 1.0
    """0..1: weigh kept rows so that dropping does not shift the classes' shares (`KeptRates`); 0: off."""

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "weight_rule": tuple(WEIGHT_RULES),
            "gain_scale": get_args(GainScale),
            "validation_loss": (*VALIDATION_LOSSES, "train"),
            "scope": get_args(Scope),
            "estimator": get_args(Choice),
            "agreement": get_args(Agreement),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"saflex.{name} = {value!r}: expected one of {', '.join(known)}{nearest(str(value), known)}")
        ranges = {
            "temperature": (self.temperature > 0, "a number above 0"),
            "penalty": (self.penalty >= 0, "a number of at least 0"),
            "validation_rows": (self.validation_rows >= 0, "a whole number of at least 0 (0: the whole split)"),
            "validation_renewed": (self.validation_renewed >= 0, "a whole number of at least 0 (0: all of them)"),
            "check_every": (self.check_every >= 0, "a whole number of at least 0 (0: never)"),
            "refresh_every": (self.refresh_every >= 1, "a whole number of at least 1"),
            "class_balance": (0 <= self.class_balance <= 1, "a number from 0 to 1"),
            "average": (0 <= self.average < 1, "at least 0 and below 1 (at 1 no gradient but the first would count)"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise ConfigError(f"saflex.{name} = {getattr(self, name)}: expected {expected}")


PRESETS: dict[str, SaflexSettings] = {
    # The appendix' values for CLIP finetuning: its tau and beta, Eq. (11) as printed, the training loss, all parameters. It
    # does not say how many validation rows; 256 is our batch size.
    "paper": SaflexSettings(
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
    ),
    # Ours: labels are retained, rows whose own label does not help are dropped. The margin's gradient does not fade when the
    # validation rows are classified right. Many validation rows, reused over steps, because the sampling noise of the
    # gradient is larger than any other error, but not a large split whole, which would cost more than training; and few of
    # their images per refresh: with 16 of 256 renewed the gains are as good as with 64 fresh ones (scripts/RESULTS.md). The
    # model's own prediction may overrule a negative gain: together the two drop 13 % of the clean edits, the model's vote
    # alone 24 % (scripts/RESULTS.md). Class balance, because dropping otherwise favours the classes it drops least.
    "robust": SaflexSettings(),
}


def preset(name: str = "robust", **overrides: Any) -> SaflexSettings:
    """Return the named settings with some changed; an override of None leaves the preset's value.

    Raises:
        ConfigError: unknown preset or field (with the nearest name), or a value out of range.
    """
    if name not in PRESETS:
        raise ConfigError(f"saflex.preset = {name!r}: expected one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    known = [field.name for field in fields(SaflexSettings)]
    for key in overrides:
        if key not in known:
            raise ConfigError(f"saflex has no option {key!r}{nearest(key, known)} (known: {', '.join(known)})")
    values = {key: getattr(PRESETS[name], key) for key in known}
    return SaflexSettings(**values | {key: value for key, value in overrides.items() if value is not None})
