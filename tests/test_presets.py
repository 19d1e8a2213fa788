"""Options of SAFLEX: values of the presets, one declaration for recipes and loops, mistakes in one line."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest

from flyp_saflex.config import Config, SaflexConfig
from flyp_saflex.errors import ConfigError
from flyp_saflex.presets import DEFAULT, PRESETS, SaflexSettings, preset
from flyp_saflex.saflex.losses import VALIDATION_LOSSES
from flyp_saflex.tables import WEIGHT_RULES


def test_presets_have_the_papers_values():
    paper = PRESETS["paper"]
    assert (paper.temperature, paper.penalty, paper.weight_rule, paper.gain_scale) == (0.1, 0.0, "sum", "none")
    assert (paper.validation_loss, paper.scope, paper.refresh_every, paper.average) == ("train", "all", 1, 0.0)
    assert (paper.estimator, paper.validation_rows) == ("exact", 256)
    assert preset("paper", temperature=0.01, penalty=None) == dataclasses.replace(paper, temperature=0.01)


def test_robust_looks_at_no_more_rows_than_training_does():
    robust = PRESETS["robust"]
    assert (robust.estimator, robust.scope, robust.validation_rows, robust.validation_renewed) == ("auto", "head", 256, 16)


def test_settings_are_the_recipes_options_by_name_and_default():
    recipe = {field.name: field.default for field in dataclasses.fields(SaflexConfig)}
    for name in ("enabled", "preset", "validation_split", "select"):
        del recipe[name]
    assert {field.name: field.default for field in dataclasses.fields(SaflexSettings)} == recipe
    assert Config().saflex.preset == DEFAULT
    assert Config().saflex.settings == PRESETS[DEFAULT]


def test_every_validation_loss_and_weight_rule_can_be_asked_for():
    assert {*VALIDATION_LOSSES, "train"} == set(get_args(get_type_hints(SaflexSettings)["validation_loss"]))
    for rule in WEIGHT_RULES:
        assert preset("paper", weight_rule=rule).weight_rule == rule


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("robustt", {}, "did you mean 'robust'"),
        ("paper", {"temprature": 1.0}, "did you mean 'temperature'"),
        ("paper", {"weight_rule": "upstrem"}, "did you mean 'upstream'"),
        ("paper", {"temperature": 0.0}, r"saflex.temperature = 0.0: Expected `float` > 0.0"),
        ("paper", {"penalty": -1.0}, "saflex.penalty = -1.0: Expected `float` >= 0.0"),
        ("paper", {"refresh_every": 0}, "saflex.refresh_every = 0: Expected `int` >= 1"),
        ("paper", {"average": 1.0}, "saflex.average = 1.0: Expected `float` < 1.0"),
        ("paper", {"validation_rows": -1}, "saflex.validation_rows = -1: Expected `int` >= 0"),
        ("paper", {"validation_renewed": -1}, "saflex.validation_renewed = -1: Expected `int` >= 0"),
        ("paper", {"check_every": -1}, "saflex.check_every = -1: Expected `int` >= 0"),
        ("paper", {"class_balance": 1.5}, "saflex.class_balance = 1.5: Expected `float` <= 1.0"),
        ("paper", {"estimator": "eksact"}, "saflex.estimator = 'eksact': expected one of auto, exact, .*did you mean 'exact'"),
    ],
)
def test_wrong_settings_are_named_with_the_fix(name, values, message):
    with pytest.raises(ConfigError, match=message) as error:
        preset(name, **values)
    assert "\n" not in str(error.value)
