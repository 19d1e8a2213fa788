"""Runs with LoRA: only updates move, the saved model is plain and merged, resume is exact, SAFLEX's gains are exact."""

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from vanishing import train_until

from flyp_saflex.errors import ConfigError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.saflex.estimators import fidelity
from flyp_saflex.saflex.jvp import directional_derivative
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training.setup import prepare
from flyp_saflex.training.train import train

LORA = ("train.adapter=lora", "train.lora_rank=2", "train.lr=1e-2")
SAFLEX = ("augment.upstream=flip", "saflex.enabled=true", "saflex.preset=robust", "saflex.refresh_every=2")


def weights(run):
    return load_file(run / "model" / "open_clip_model.safetensors")


def test_the_saved_model_is_plain_and_only_adapted_matrices_have_moved(make_config, tiny_clip_dir, tmp_path, capsys):
    run = tmp_path / "run"
    train(make_config(*LORA, "train.select_split="), run)
    assert "LoRA of rank 2 on 16 matrices (image and text tower): " in capsys.readouterr().out
    start, found = load_file(tiny_clip_dir / "open_clip_model.safetensors"), weights(run)
    assert found.keys() == start.keys()
    moved = {name for name, value in found.items() if not torch.equal(value, start[name])}
    ends = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight", "logit_scale")
    assert moved == {name for name in found if name.endswith(ends)}
    open_clip.create_model(f"local-dir:{run / 'model'}")
    assert {row["wise_alpha"] for row in evaluate(run, wise_alphas=(0.0, 1.0), splits=("night",))["results"]} == {0.0, 1.0}


@pytest.mark.parametrize("scope", ["head", "all"])
def test_a_run_with_saflex_resumes_bit_for_bit(make_config, tmp_path, monkeypatch, scope):
    config = make_config(*LORA, *SAFLEX, f"saflex.scope={scope}", "train.steps=4", "train.checkpoint_every=2")
    train(config, tmp_path / "whole")
    train_until(monkeypatch, 3, config, tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    one, other = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    rows = [row for row in RunDir(tmp_path / "whole", lock=False).read_rows() if "kept_fraction" in row]
    assert len(rows) == 4


@pytest.mark.parametrize("scope", ["head", "all"])
def test_one_sided_differences_agree_with_the_exact_derivative(make_config, scope):
    setup = prepare(make_config(*LORA))
    setup.task.begin_phase(only_head=False)
    network = setup.task.network.eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.02, generator=generator)
    parameters = network.parameters_in(scope)
    assert all("lora" in name or name.endswith("logit_scale") for name in parameters)
    assert any(".visual." in name for name in parameters) == (scope == "all")
    direction = {name: torch.randn(value.shape, generator=generator) for name, value in parameters.items()}
    images, tokens = torch.randn(4, 3, 32, 32, generator=generator), setup.task.class_tokens()

    def logits_fn(point):
        return torch.func.functional_call(network, point, (images, tokens), tie_weights=False).logits()

    exact, found = (
        directional_derivative(logits_fn, parameters, direction, estimator=estimator)[1] for estimator in ("exact", "one-sided")
    )
    assert exact.abs().max() > 0
    assert fidelity(found, exact, torch.zeros(4, dtype=torch.long)).row_cosine > 0.999


def test_a_linear_head_is_trained_beside_the_image_towers_updates(make_config, tmp_path):
    run = tmp_path / "run"
    train(make_config(*LORA, "train.method=ce-linear", "train.steps=2", "train.lora_targets=c_fc", "train.select_split="), run)
    head = load_file(run / "head.safetensors")
    assert not torch.equal(head["weight"], head["initial_weight"])
    evaluate(run, splits=("night",))


def test_what_cannot_be_adapted_is_refused_in_one_line(make_config):
    with pytest.raises(ConfigError, match=r"goes without train\.l2_sp"):
        make_config(*LORA, "train.l2_sp=1")
    with pytest.raises(ConfigError, match=r"nothing but logit_scale: set saflex\.scope=all"):
        make_config(*LORA, *SAFLEX, "saflex.scope=head", "train.freeze_text=true")
    with pytest.raises(ConfigError, match="every layer is frozen"):
        prepare(make_config(*LORA, "train.method=ce-linear", "train.freeze_image=true"))
