"""Recipes: round trip, overrides, messages, cross-checks, and that the shipped ones load."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from flyp_saflex import option_docs, recipe
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError
from flyp_saflex.presets import PRESETS, SaflexSettings, preset


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_loads_and_has_a_comment(name: str) -> None:
    config = recipe.load(name)
    assert config.recipe == name
    source = Path(recipe.__file__).parent / "recipes" / f"{name}.toml"
    assert source.read_text(encoding="utf-8").startswith("#")  # what it reproduces


def test_dumps_and_load_are_inverse(tmp_path: Path) -> None:
    config = recipe.load("folder", ["seed=3", "train.betas=[0.8, 0.99]", "saflex.temperature=0.25", "data.root=/images é"])
    path = tmp_path / "config.toml"
    for comments in (False, True):
        path.write_text(recipe.dumps(config, comments=comments), encoding="utf-8")
        assert recipe.load(str(path)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_unset_options_have_the_presets_values_and_stay_unset(name: str, tmp_path: Path) -> None:
    config = recipe.build({"saflex": {"preset": name, "average": 0.25}}, "here")
    assert config.saflex.settings == preset(name, average=0.25)
    text = recipe.dumps(config)
    assert "average = 0.25" in text
    assert not {field.name for field in dataclasses.fields(SaflexSettings)} - {"average"} & set(re.findall(r"^\w+", text, re.M))
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    assert recipe.load(str(tmp_path / "config.toml")).saflex == config.saflex


def test_no_options_are_the_defaults() -> None:
    assert recipe.build({}, "here") == Config()
    assert Config().saflex.settings == preset(Config().saflex.preset)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.lr=1e-4", lambda c: c.train.lr == 1e-4),
        ("train.lr=1", lambda c: c.train.lr == 1.0),
        ("saflex.enabled=false", lambda c: c.saflex.enabled is False),
        ("data.root=/images", lambda c: c.data.root == "/images"),
        ("data.root=a = b", lambda c: c.data.root == "a = b"),
        ("augment.upstream=randaugment", lambda c: c.augment.upstream == ("randaugment",)),
        ('augment.upstream=["cache", "flip"]', lambda c: c.augment.upstream == ("cache", "flip")),
        ("augment.on_train=[]", lambda c: c.augment.on_train == ()),
        ('augment.on_train=""', lambda c: c.augment.on_train == ()),
        ("evaluate.wise_alphas=[0, 0.5, 1]", lambda c: c.evaluate.wise_alphas == (0.0, 0.5, 1.0)),
    ],
)
def test_override_is_typed(override: str, read: object) -> None:
    assert read(recipe.load("folder", [override]))  # type: ignore[operator]


def test_last_override_wins() -> None:
    assert recipe.load("folder", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"batchsize": 4}}, "unknown key 'train.batchsize'; did you mean 'train.batch_size'?"),
        ({"train": {"temperature": 4}}, "did you mean 'saflex.temperature'?"),
        ({"train": 4}, "'train' is a section, found the value 4"),
        ({"seed": "one"}, "seed = 'one': Expected `int`, got `str`"),
        ({"train": {"batch_size": 0}}, "train.batch_size = 0: Expected `int` >= 1"),
        ({"train": {"betas": [0.9, 1.5]}}, "train.betas[1] = 1.5: Expected `float` < 1.0"),
        ({"train": {"betas": [0.9]}}, "train.betas = [0.9]: Expected `array` of length 2"),
        ({"data": {"max_unreadable": 2}}, "data.max_unreadable = 2: Expected `float` <= 1.0"),
        ({"saflex": {"weight_rule": "zum"}}, "'sum'"),
        ({"augment": {"upstream": ["randaug"]}}, "'randaugment'"),
        ({"train": {"steps": 2.5}}, "train.steps = 2.5: Expected `int`, got `float`"),
    ],
)
def test_error_names_the_key_and_the_fix(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe.build(values, "recipe mine.toml")
    message = str(caught.value)
    assert message.startswith("recipe mine.toml: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "both"),
    [
        (["saflex.enabled=true", "augment.upstream=[]"], ("saflex.enabled", "augment.upstream")),
        (["augment.filter=scores", "augment.upstream=flip"], ("augment.filter", "augment.upstream")),
        (['augment.upstream=["flip", "cache"]', "saflex.enabled=false"], ("augment.upstream", "cache")),
        (["train.batch_size=10", "train.accumulation=4"], ("train.batch_size", "train.accumulation")),
        (["train.freeze_image=true", "train.freeze_text=true"], ("train.freeze_image", "train.freeze_text")),
        (["train.frozen_cache=/acts", "train.freeze_image_blocks=2"], ("train.frozen_cache", "augment.on_train")),
        (
            ["train.frozen_cache=/acts", "train.freeze_image_blocks=2", "augment.on_train=[]", "train.freeze_batchnorm=false"],
            ("train.frozen_cache", "train.freeze_batchnorm"),
        ),
        (["train.frozen_cache=/acts", "augment.on_train=[]"], ("train.frozen_cache", "train.freeze_image_blocks")),
        (["train.select_split=id_val", "data.add_to_train=id_val"], ("train.select_split", "data.add_to_train")),
        (["augment.upstream=flip", "augment.per_train=0.05", "train.batch_size=8"], ("augment.per_train", "train.batch_size")),
        (["saflex.select=always"], ("saflex.select", "saflex.enabled")),
        (["saflex.select=always", "augment.filter=scores", "augment.upstream=cache"], ("saflex.select", "augment.filter")),
        (
            ["saflex.select=always", "augment.filter=argmax", "augment.upstream=flip", "train.freeze_image=true"],
            ("saflex.select", "train.freeze_image"),
        ),
        (
            ["saflex.select=always", "saflex.enabled=true", "augment.upstream=flip", "train.method=linear-probe"],
            ("saflex.select", "train.method"),
        ),
        (
            ["saflex.enabled=true", "augment.upstream=flip", "train.select_split=", "data.add_to_train=id_val"],
            ("saflex.validation_split", "data.add_to_train"),
        ),
    ],
)
def test_options_that_exclude_each_other_are_both_named(overrides: list[str], both: tuple[str, str]) -> None:
    base = ["augment.upstream=[]", "augment.filter=none", "saflex.enabled=false"]
    with pytest.raises(ConfigError) as caught:
        recipe.load("folder", base + overrides)
    for option in both:
        assert option in str(caught.value)


def test_differences_name_every_changed_option() -> None:
    old = Config()
    new = dataclasses.replace(old, seed=7, train=dataclasses.replace(old.train, lr=1.0))
    assert recipe.differences(old, old) == []
    assert recipe.differences(old, new) == ["seed: 0 -> 7", "train.lr: 1e-05 -> 1.0"]


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[train]\nlr = = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML: .*line 2"):
        recipe.load(str(path))


def test_every_option_is_documented() -> None:
    documented = option_docs.field_docs()
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
            assert documented.get((type(value).__name__, field.name)), f"{section.name}.{field.name}"


def test_iwildcam_trains_with_the_optimiser_of_flyps_code():
    """torch.optim.AdamW(all parameters, lr, weight_decay) in FLYP's src/models/flyp_loss.py, and no clipping."""
    train = recipe.load("iwildcam").train
    defaults = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert (train.betas, train.eps) == (defaults["betas"], defaults["eps"])
    assert (train.lr, train.weight_decay, train.decayed, train.clip_norm) == (1e-5, 0.2, "all", 0.0)
    assert (train.epochs, train.batch_size, train.warmup_steps, train.min_lr, train.proxies) == (20, 256, 500, 0.0, "batch")
