"""Runs whose steps are two passes train what runs of one pass train, log it, go on after a kill, and refuse what is not exact."""

import json
import math

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from vanishing import train_until

from flyp_saflex.clip.model import Clip, load_clip, save_clip
from flyp_saflex.errors import ConfigError
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.training import train as train_module
from flyp_saflex.training.train import train

# Of six augmented rows one to four are kept, so that there is something to leave out.
SAFLEX = (
    "augment.upstream=randaugment",
    "saflex.enabled=true",
    "saflex.preset=robust",
    "saflex.weight_rule=sum",
    "saflex.refresh_every=3",
)
EXACT = ("train.eps=1e-3", "train.select_split=", "train.log_augmented=true")  # eps: AdamW blows up rounding otherwise


def steps(run):
    return [row for row in RunDir(run, lock=False).read_rows() if "loss" in row]


def assert_same_training(one, other):
    """To 1e-6: sums over rows are taken in another order."""
    for folder in (one, other):
        assert all(math.isfinite(row["loss"]) for row in steps(folder))
    assert [row["loss"] for row in steps(one)] == pytest.approx([row["loss"] for row in steps(other)], abs=1e-5)
    decided = [
        [(row["step"], row["id"], row["weight"] > 0) for row in RunDir(run, lock=False).read_rows("augmented.jsonl")]
        for run in (one, other)
    ]
    assert decided[0] == decided[1]
    for name in ("model/open_clip_model.safetensors", "head.safetensors"):
        if (other / name).is_file():
            a, b = load_file(one / name), load_file(other / name)
            for key, value in b.items():
                torch.testing.assert_close(a[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


CASES = {
    "flyp": (*SAFLEX, "train.steps=4"),
    "one column per row, all parameters, in two parts": (
        *SAFLEX,
        "train.steps=3",
        "train.proxies=batch",
        "saflex.scope=all",
        "train.accumulation=2",
        "train.freeze_image_blocks=1",
        "train.gradient_checkpointing=true",
    ),
    "paper": (*SAFLEX, "saflex.preset=paper", "train.steps=3", "train.method=ce-text"),
    "linear probe, then finetuning": (*SAFLEX, "train.method=lp-ft", "train.probe_steps=2", "train.steps=3"),
    "a filter": ("augment.upstream=flip", "augment.filter=lowest-loss", "augment.keep_fraction=0.4", "train.steps=3"),
}


@pytest.mark.parametrize("case", CASES)
def test_two_passes_train_what_one_trains(make_config, tmp_path, case):
    one = ("saflex.select=never", "train.rows_at_once=0")
    for name, how in (("one", one), ("select", ("saflex.select=always",)), ("parts", ("train.rows_at_once=4",))):
        train(make_config(*CASES[case], *EXACT, *how), tmp_path / name)
    for name in ("select", "parts"):
        assert_same_training(tmp_path / name, tmp_path / "one")
    rows = {name: [row["selected"] for row in steps(tmp_path / name)] for name in ("one", "select", "parts")}
    probe = [False, False] if "lp-ft" in str(CASES[case]) else []  # images are frozen then: nothing to save
    assert not any(rows["one"])
    assert rows["select"] == probe + [True] * (len(rows["one"]) - len(probe))
    assert all(rows["parts"])
    assert any(row["kept_fraction"] < 1 for row in steps(tmp_path / "one"))


def test_auto_starts_where_few_are_kept_and_a_resumed_run_knows(make_config, tmp_path, monkeypatch):
    config = make_config(*SAFLEX, "train.select_split=", "train.steps=7", "train.checkpoint_every=2")
    train(config, tmp_path / "whole")
    chosen = [row["selected"] for row in steps(tmp_path / "whole")]
    assert chosen == [False, False, False, True, True, True, True], "the average falls below what pays in the third step"
    train_until(monkeypatch, 5, config, tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)  # from the checkpoint after step 4
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in steps(tmp_path / name)] for name in ("cut", "whole")]
    assert rows[0] == rows[1]
    a, b = (load_file(tmp_path / name / "model" / "open_clip_model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("how", [("saflex.select=always",), ("train.rows_at_once=4",)], ids=["select", "parts"])
def test_two_passes_in_bf16_are_near_one(make_config, tmp_path, how):
    options = ("augment.upstream=flip", "saflex.enabled=true", "train.select_split=", "train.steps=3", "train.lr=1e-4")
    train(make_config(*options, "saflex.select=never", "train.precision=bf16"), tmp_path / "one")
    train(make_config(*options, *how, "train.precision=bf16"), tmp_path / "two")
    one, two = ([row["loss"] for row in steps(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=0.1)  # bf16 keeps 8 bits: logits of scale 14 are off by a few hundredths


@pytest.fixture
def odd_model(make_config, tmp_path):
    """`odd_model(...)`: `model.name` of a small ResNet, or of a ViT that drops patches at random."""

    def build(*, resnet):
        vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
        if not resnet:
            vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32, "patch_dropout": 0.5}
        text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
        clip = load_clip(make_config().model.name)
        whole = {"model_cfg": config, "preprocess_cfg": clip.config["preprocess_cfg"]}
        save_clip(Clip(open_clip.CLIP(**config), clip.preprocess, clip.tokenizer, whole), tmp_path / "odd")
        return f"model.name=local-dir:{tmp_path / 'odd'}"

    return build


@pytest.mark.parametrize(
    ("resnet", "options", "message"),
    [
        (
            True,
            ["train.freeze_batchnorm=false", "train.rows_at_once=2"],
            r"train\.rows_at_once = 2: .*set train\.freeze_batchnorm",
        ),
        (True, ["train.freeze_batchnorm=false", "saflex.select=always"], r'saflex\.select = "always": .*statistics of the whole'),
        (False, ["train.rows_at_once=2"], r"train\.rows_at_once = 2: clip\.visual\.patch_dropout \(PatchDropout\) is random"),
        (False, ["saflex.select=always"], r'saflex\.select = "always": clip\.visual\.patch_dropout .* or saflex\.select="auto"'),
    ],
)
def test_what_is_not_exact_is_refused_before_anything_is_written(make_config, odd_model, tmp_path, resnet, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        train(make_config(odd_model(resnet=resnet), *SAFLEX, *options), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_auto_is_off_where_it_is_not_exact_and_on_a_resnet_with_fixed_statistics_it_is_on(make_config, odd_model, tmp_path):
    name = odd_model(resnet=True)
    drop_all = (*SAFLEX, "saflex.agreement=require", "train.select_split=", "train.steps=3")
    for frozen in ("true", "false"):
        train(make_config(name, *drop_all, f"train.freeze_batchnorm={frozen}"), tmp_path / frozen)
        assert steps(tmp_path / frozen)[0]["kept_fraction"] < 0.6
    assert [row["selected"] for row in steps(tmp_path / "true")][1:] == [True, True]
    assert not any(row["selected"] for row in steps(tmp_path / "false"))


def test_parts_larger_than_the_batch_are_said_to_have_no_effect(make_config, tmp_path, capsys):
    train(make_config(*SAFLEX, "train.rows_at_once=12"), tmp_path / "run", dry_run=True)
    assert "train.rows_at_once = 12 has no effect: a part of a step has 12 rows" in capsys.readouterr().out
    train(make_config(*SAFLEX, "train.rows_at_once=11"), tmp_path / "run", dry_run=True)
    assert "no effect" not in capsys.readouterr().out


def test_a_diverged_step_leaves_no_trace_in_the_running_average(make_config, tmp_path, monkeypatch):
    config = make_config(*SAFLEX, "train.select_split=", "train.steps=3", "train.rows_at_once=4")
    build = train_module.RowBuilder.build

    def poison(self, batch, step, part):
        rows = build(self, batch, step, part)
        if step == 1:
            rows.inputs = rows.inputs * float("nan")
        return rows

    with monkeypatch.context() as patch, pytest.raises(train_module.RunError, match="step 2: the loss is nan"):
        patch.setattr(train_module.RowBuilder, "build", poison)
        train(config, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step-00000001.pt", weights_only=True)
    assert saved["selecting"]["kept"] == pytest.approx(steps(tmp_path / "run")[0]["kept_fraction"])
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["diverged"]
    train(config, tmp_path / "run", resume=True)
