"""Reasons in words: why SAFLEX dropped or relabelled an edit, from the run's options and its logged numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flyp_saflex.config import Config
from flyp_saflex.reporting.gallery import Decision, Fate

EVIDENCE_WORDS = {
    "zero-shot": "zero-shot probabilities",
    "source": "resemblance to training pictures of the class",
    "source-middle": "resemblance to training pictures of the class",
}
"""Kinds of `saflex.evidence` in words; another one is told by its name."""
GAIN_RULES = {
    "upstream": "Its own label would not lower the validation loss",
    "sum": "The uniform label would not lower the validation loss (Eq. 11)",
    "label": "Its learned label would not lower the validation loss",
    "soft": "Its own label would not lower the validation loss",
}
"""Weight rules that ask the gains, with what is true of an edit that they drop."""


def group_reason(fate: Fate, config: Config | None) -> str:
    """Return what is true of all edits of a group, where evidence before training decided; the empty string elsewhere.

    Args:
        fate: the group.
        config: options of the run; None: they are not known.
    """
    if config is None or not config.saflex.evidence or fate == "kept":
        return ""
    kinds = " and ".join(dict.fromkeys(EVIDENCE_WORDS.get(kind, kind) for kind in config.saflex.evidence))
    if fate == "relabelled":
        return f"Evidence of the pretrained model before training ({kinds}) finds another class likely, too."
    if config.saflex.weight_rule != "evidence":
        return ""
    threshold = f"{100 * config.saflex.evidence_threshold:.0f} %"
    return (
        f"Evidence of the pretrained model before training ({kinds}) finds no class more than {threshold} likely "
        "(saflex.evidence_threshold)."
    )


def reason(decision: Decision, config: Config | None, names: Mapping[int, str]) -> str:
    """Return why an edit was dropped or relabelled at its last visit; empty if it was not.

    Args:
        decision: with its gain or posterior.
        config: options of the run; None: they are not known.
        names: class names by index.
    """
    if decision.fate == "kept" or config is None:
        return ""
    label = names.get(decision.label, f"class {decision.label}")
    if decision.gain is not None and not math.isfinite(decision.gain):
        return "One of its gains was not finite."
    settings = config.saflex
    if decision.fate == "relabelled":
        lower = f"Its learned label lowers the validation loss more than {label} does{_gain(decision)}."
        return _posterior(decision, label) if settings.evidence else lower
    if settings.weight_rule == "evidence":
        return _posterior(decision, label)
    if _rule_drops(decision, config):
        return f"{GAIN_RULES[settings.weight_rule]}{_gain(decision)}{_vote(config, label)}."
    if config.augment.filter != "none":
        return f"The filter augment.filter = {config.augment.filter} dropped it{_gain(decision)}."
    if settings.agreement == "require":
        return f"The model under training did not predict {label}{_gain(decision)}."
    return ""


def _rule_drops(decision: Decision, config: Config) -> bool:
    """Return whether the weight rule explains the drop: its own gain is asked only by rules that look at the own label."""
    rule = config.saflex.weight_rule
    if rule in ("upstream", "soft"):
        return decision.gain is not None and (decision.gain < 0 or (rule == "soft" and decision.gain == 0))
    return rule in GAIN_RULES


def _gain(decision: Decision) -> str:
    return "" if decision.gain is None else f" (gain of its own label: {decision.gain:+.3g})".replace("-", "\N{MINUS SIGN}")


def _vote(config: Config, label: str) -> str:
    """Return the model's vote: with `keep`, a dropped edit is one whose label the model did not predict."""
    if config.saflex.agreement != "keep" or config.augment.filter != "none":
        return ""
    return f", and the model under training did not predict {label}"


def _posterior(decision: Decision, label: str) -> str:
    """Return what evidence said about one edit; less of it in logs of earlier versions, which hold no posterior."""
    if decision.own_posterior is None or decision.none_posterior is None:
        return f"Evidence: {label} is not likely enough." if decision.fate == "dropped" else ""
    return f"Evidence: {label} {_percent(decision.own_posterior)}, none of the classes {_percent(decision.none_posterior)}."


def _percent(share: float) -> str:
    return "below 1 %" if share < 0.01 else f"{100 * share:.0f} %"
