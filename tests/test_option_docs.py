"""The command `options`: every option with type, default and meaning, in 80 columns, found by section, name or word."""

from __future__ import annotations

import dataclasses

import pytest

from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError
from flyp_saflex.option_docs import describe, options, sections
from flyp_saflex.presets import PRESETS, SaflexSettings


def keys(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith(" ")]


def by_key(key: str):
    (option,) = [option for option in options() if option.key == key]
    return option


def test_every_option_is_told_once() -> None:
    declared = [f"{section}.{field.name}" for section, part in sections().items() for field in dataclasses.fields(part)]
    told = [option.key for option in options()]
    assert sorted(told) == sorted([*declared, "seed", "recipe"])
    assert all(option.type and option.default and option.meaning for option in options())


def test_no_line_is_wider_than_a_terminal() -> None:
    texts = [describe(), *(describe(section) for section in sections())]
    assert max(len(line) for text in texts for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("train.lr", "number above 0", "1e-05"),
        ("train.steps", "integer of 0 or more", "0"),
        ("train.batch_size", "integer of 1 or more", "256"),
        ("train.betas", "list of numbers from 0 to below 1", "[0.9, 0.98]"),
        ("data.box_crop", "true or false", "false"),
        ("data.root", "text", '""'),
        ("augment.filter", "one of none, scores, argmax, lowest-loss, random", '"none"'),
        ("augment.on_train", "list of random-crop, flip", '["random-crop"]'),
        ("editor.steps", "integer of 1 or more or unset", "unset"),
        ("compare.seeds", "list of integers, not empty", "[0, 1, 2, 3, 4]"),
        ("compare.conditions", "table of lists of texts", "{}"),
        ("evaluate.wise_alphas", "list of numbers from 0 to 1", "[]"),
    ],
)
def test_types_and_defaults_are_in_words(key: str, kind: str, default: str) -> None:
    assert (by_key(key).type, by_key(key).default) == (kind, default)


def test_presets_that_differ_are_told() -> None:
    assert by_key("saflex.penalty").default == "1 (robust 1e+06, paper-log 0, paper-prob 0)"
    assert by_key("saflex.temperature").default == "0.1"
    for field in dataclasses.fields(SaflexSettings):
        alike = len({str(getattr(settings, field.name)) for settings in PRESETS.values()}) == 1
        assert ("(" in by_key(f"saflex.{field.name}").default) is not alike


def test_a_section_is_told_whole_and_alone() -> None:
    assert keys(describe("cache")) == [f"cache.{field.name}" for field in dataclasses.fields(Config().cache)]


@pytest.mark.parametrize("word", ["train.lr", "lr"])
def test_an_option_is_found_by_its_name_alone(word: str) -> None:
    assert keys(describe(word)) == ["train.lr"]


def test_a_word_is_looked_for_in_names_and_meanings() -> None:
    found = keys(describe("GradCache"))
    assert found == ["train.rows_at_once"]
    assert keys(describe("seed"))[0] == "seed"
    names = keys(describe("freeze"))
    assert names[0].startswith("train.freeze_")


@pytest.mark.parametrize(("word", "hint"), [("tarin", "did you mean 'train'?"), ("batch_sise", "did you mean 'batch_size'?")])
def test_an_unknown_word_tells_the_nearest(word: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="found no option") as error:
        describe(word)
    assert hint in str(error.value)
