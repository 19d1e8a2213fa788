"""Recipes of model families: open_clip has the weights that they name, and a shrunk model of the family trains by them."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import zoo_models

from flyp_saflex import recipe
from flyp_saflex.cli import main

FAMILIES = {
    "siglip2": "SigLIP 2",
    "bioclip2": "ViT",
    "vit-l-14-336": "ViT, QuickGELU",
    "convnext": "ConvNeXt",
    "mobileclip": "MobileCLIP2, FastViT",
}
"""Family of every recipe in `zoo_models.py`."""
SMALL = {"freeze_image_blocks": 1, "rows_at_once": 2}
"""Values for a model of two blocks and a batch of six, where the recipe has the option at all."""


@pytest.mark.parametrize("name", FAMILIES)
def test_open_clip_has_the_model_and_its_weights(name: str) -> None:
    model = recipe.load(name).model
    if model.name.startswith("hf-hub:"):
        assert not model.pretrained, "the repository includes its weights"
        return
    assert (model.name, model.pretrained) in open_clip.list_pretrained()
    size = open_clip.get_model_config(model.name)["vision_cfg"]["image_size"]
    assert recipe.load(name).data.materialised_px >= size


def test_siglip_is_trained_with_its_own_loss() -> None:
    train = recipe.load("siglip2").train
    assert (train.objective, train.weight_decay, train.betas[1]) == ("sigmoid", 0.0, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_shrunk_model_of_the_family_trains_and_is_evaluated(name: str, tiny_images_dir: Path, tmp_path: Path, capsys) -> None:
    start = zoo_models.build(zoo_models.FAMILIES[FAMILIES[name]], tmp_path / "start")
    train = recipe.load(name).train
    options = [f"train.{key}={value}" for key, value in SMALL.items() if getattr(train, key)]
    options += [f"model.name=local-dir:{start}", "model.pretrained=", "train.steps=2", "train.batch_size=6", "train.precision=no"]
    options += [f"data.root={tiny_images_dir}", "data.train_domains=day", "data.test_domains=night", "evaluate.bootstrap=0"]
    run = tmp_path / "run"
    assert main(["train", name, *(f"--set={one}" for one in options), "--run-dir", str(run)]) == 0, capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("logit_bias" in row for row in rows) == (name == "siglip2"), "the sigmoid loss trains the bias"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["recipe"] == name
    assert {row["split"] for row in results["results"]} == {"id_val", "id_test", "night"}
