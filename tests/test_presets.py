"""Presets: one declaration of every option, starting points that a recipe overrides, both readings of the paper."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flyp_saflex import recipe
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError
from flyp_saflex.presets import DEFAULT, PRESETS, SaflexSettings, preset
from flyp_saflex.saflex.closed_form import gains, keep_sum, probability_gains


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_that_names_a_preset_has_its_values(name: str) -> None:
    config = recipe.load("folder", [f"saflex.preset={name}"])
    assert config.saflex.settings == PRESETS[name]
    again = recipe.load("folder", [f"saflex.preset={name}", "saflex.temperature=0.3"]).saflex.settings
    assert again == dataclasses.replace(PRESETS[name], temperature=0.3)


def test_a_recipe_without_one_has_the_default() -> None:
    assert recipe.load("folder").saflex == Config().saflex
    assert Config().saflex.settings == PRESETS[DEFAULT]


def test_a_written_recipe_tells_only_what_differs_from_its_preset(tmp_path) -> None:
    config = recipe.load("folder", ["saflex.preset=paper-log", "saflex.refresh_every=7"])
    text = recipe.dumps(config)
    assert "refresh_every = 7" in text
    assert "weight_rule" not in text
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    assert recipe.load(str(path)).saflex == config.saflex
    assert recipe.load(str(path), ["saflex.preset=robust"]).saflex.settings == preset("robust", refresh_every=7)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"name": "robst"}, "saflex.preset = 'robst': expected one of .*did you mean 'robust'"),
        ({"temprature": 1.0}, "saflex has no option 'temprature'.*did you mean 'temperature'"),
        ({"temperature": 0.0}, "saflex.temperature = 0.0: Expected `float` > 0.0"),
        ({"average": 1.0}, "saflex.average = 1.0: Expected `float` < 1.0"),
        ({"weight_rule": "upstrem"}, "saflex.weight_rule = 'upstrem'"),
        ({"evidence": ("sauce",)}, "saflex.evidence = 'sauce': expected one of .*did you mean 'source'"),
    ],
)
def test_mistakes_are_one_line(values: dict, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        preset(**values)


def test_only_decisions_that_read_gains_need_them() -> None:
    assert not SaflexSettings(weight_rule="evidence", agreement="ignore").needs_gains
    assert SaflexSettings(weight_rule="evidence", agreement="ignore", penalty=1.0).needs_gains
    assert SaflexSettings(weight_rule="all", agreement="require").needs_gains
    assert all(PRESETS[name].needs_gains for name in PRESETS)


def test_read_as_probabilities_the_printed_rule_drops_nothing() -> None:
    """Sums that are zero but for rounding are zero: read as log-probabilities the same rule drops about half."""
    generator = torch.Generator().manual_seed(0)
    logits, tangent = (10 * torch.randn(500, 40, generator=generator) for _ in range(2))
    log = gains(logits, tangent)
    prob = probability_gains(logits, log)
    none = torch.zeros_like(log)
    assert keep_sum(prob, none, none, 0.0).all()
    assert 0.2 < float(keep_sum(log, none, none, 0.0).mean()) < 0.8
