"""What a run trains, saves and says: plain FLYP to the last bit, every method, every source of augmented rows."""

import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from flyp_saflex import recipe
from flyp_saflex.clip.image_tower import ImageTower
from flyp_saflex.clip.model import Clip, load_clip, save_clip
from flyp_saflex.clip.text_tower import encode_text
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.runtime import ProgressLines
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tasks.network import parameter_groups
from flyp_saflex.training import model_selection
from flyp_saflex.training.batches import read_steps
from flyp_saflex.training.rows import soft_label
from flyp_saflex.training.setup import prepare
from flyp_saflex.training.train import train

SAFLEX = ("saflex.enabled=true", "saflex.preset=robust", "saflex.refresh_every=2", "train.log_augmented=true")


def weights(run):
    return load_file(run / "model" / "open_clip_model.safetensors")


def metrics(run):
    return RunDir(run, lock=False).read_rows()


def losses(run):
    return [row["loss"] for row in metrics(run) if "loss" in row]


def assert_same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def plain_flyp(config, *, published):
    """FLYP as a loop of its own around open_clip's model and torch's AdamW; only the order of the rows is the run's."""
    setup = prepare(config)
    model, options = open_clip.create_model(config.model.name), config.train
    decayed = [p for p in model.parameters() if p.ndim >= 2 or options.decayed == "all"]
    other = [p for p in model.parameters() if p.ndim < 2 and options.decayed != "all"]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=not published)
    contrast = open_clip.loss.ClipLoss()
    known = [f"a photo of a {name}." for name in setup.dataset.class_names]
    model.train()
    for step, (batch,) in enumerate(read_steps(setup, None, 0, options.steps)):
        labels = torch.tensor([setup.dataset.train.samples[i].label for i in batch.indices])
        scale = model.logit_scale.exp()
        images = F.normalize(model.encode_image(batch.inputs) if published else ImageTower(model.visual)(batch.inputs), dim=-1)
        if published:
            captions = [known[label] for label in labels]
            loss = contrast(images, model.encode_text(setup.task.clip.tokenizer(captions), normalize=True), scale)
        else:
            distinct, inverse = labels.unique(return_inverse=True)
            encoded = encode_text(model, setup.task.clip.tokenizer([known[label] for label in distinct]))
            logits = scale * images @ F.normalize(encoded, dim=-1)[inverse].T
            own = torch.arange(len(labels))
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        loss.backward()
        if options.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        warm = min(options.warmup_steps, options.steps // 10)
        progress = (step - warm) / (options.steps - warm)
        rate = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
    return model.state_dict()


@pytest.mark.parametrize("published", [False, True], ids=["same sums", "as published"])
def test_off_equals_plain_flyp(make_config, tmp_path, published):
    """To the last bit where the loop runs the towers and computes the logits once, as the trainer does.

    As published (open_clip's towers, every caption and its whole context; `ClipLoss`, which computes the logits twice) the
    same sums are taken in other orders and gradients differ by about 1e-7 of their size. A large epsilon keeps
    AdamW from turning that into parts of a step (1e-3) where a gradient is next to nothing.
    """
    config = make_config("train.proxies=batch", "augment.on_train=[]", "train.select_split=", "train.eps=1e-3")
    train(config, tmp_path / "run")
    expected = plain_flyp(config, published=published)
    assert_same(weights(tmp_path / "run"), expected, tolerance=1e-6 if published else 0.0)
    assert not torch.equal(expected["visual.proj"], open_clip.create_model(config.model.name).state_dict()["visual.proj"])


def test_the_iwildcam_recipe_takes_the_steps_of_flyps_code(make_config, tiny_clip_dir, tmp_path):
    """Twenty steps end within 1e-4 of the way from those of the published step with the published optimiser.

    The biases of the attention keys are left out: their gradient is zero, and AdamW with an eps of 1e-8 makes steps of the
    rounding. With open_clip's betas, eps, decay and clipping the distance is 7e-2.
    """
    recipes = recipe.load("iwildcam").train
    names = ("proxies", "weight_decay", "decayed", "betas", "eps", "clip_norm", "min_lr")
    published = [f"train.{name}={json.dumps(getattr(recipes, name))}" for name in names]
    other = ["augment.on_train=[]", "train.select_split=", "train.lr=1e-5", "train.steps=20"]
    start = load_file(tiny_clip_dir / "open_clip_model.safetensors")

    def way(after):
        moved = {name: after[name] - start[name] for name in sorted(start)}
        for name, step in moved.items():
            if name.endswith("in_proj_bias"):
                queries, _, values = step.chunk(3)
                moved[name] = torch.cat([queries, values])
        return torch.cat([part.flatten() for part in moved.values()])

    config = make_config(*published, *other)
    train(config, tmp_path / "run")
    train(make_config("train.proxies=batch", *other), tmp_path / "other optimiser")
    expected, names = way(plain_flyp(config, published=True)), ("run", "other optimiser")
    distances = [
        float((way(weights(tmp_path / name)) - expected).norm() / expected.norm()) for name in ("run", "other optimiser")
    ]
    assert distances[0] < 1e-4 < 1e-2 < distances[1]


def test_saflex_that_keeps_every_row_and_label_equals_trusted_augmentation(make_config, edits, tmp_path):
    options = ("augment.upstream=cache", "train.select_split=")
    train(make_config(*options), tmp_path / "trusted")
    # A label is the row's own exactly: the softmax of 1e9 is one-hot.
    train(make_config(*options, *SAFLEX, "saflex.weight_rule=all", "saflex.penalty=1e9"), tmp_path / "saflex")
    assert_same(weights(tmp_path / "saflex"), weights(tmp_path / "trusted"))
    assert losses(tmp_path / "saflex") == losses(tmp_path / "trusted")
    assert "mean_gain" in metrics(tmp_path / "saflex")[0]


def test_permuted_gains_are_the_same_gains_on_other_rows(make_config, edits, tmp_path):
    options = ("augment.upstream=cache", "train.steps=1", *SAFLEX)
    train(make_config(*options), tmp_path / "saflex")
    train(make_config(*options, "saflex.permute_gains=true"), tmp_path / "permuted")
    rows = [RunDir(tmp_path / name, lock=False).read_rows("augmented.jsonl") for name in ("saflex", "permuted")]
    own, moved = ({row["id"]: row["gain"] for row in found} for found in rows)
    assert sorted(own.values()) == sorted(moved.values())
    assert all(own[identity] != moved[identity] for identity in own)


def test_saflex_changes_the_run(make_config, edits, tmp_path):
    options = ("augment.upstream=cache", "train.select_split=")
    train(make_config(*options), tmp_path / "trusted")
    train(make_config(*options, *SAFLEX, "saflex.weight_rule=upstream"), tmp_path / "saflex")
    assert losses(tmp_path / "saflex") != losses(tmp_path / "trusted")
    rows = RunDir(tmp_path / "saflex", lock=False).read_rows("augmented.jsonl")
    assert [row["step"] for row in rows] == sorted([1, 2, 3, 4, 5] * 6)
    assert {row["id"] for row in rows} <= {edit.aug_id for edit in edits.edits}
    assert {row["weight"] > 0 for row in rows} == {True, False}
    # Kept where the gain of the row's own label is not negative.
    assert all((row["weight"] > 0) == (row["gain"] >= 0) for row in rows)
    assert all(row["learned_label"] == row["label"] for row in rows)
    assert all(row["soft_labels"] == [[row["label"], 1.0]] for row in rows)  # a penalty of 1e6 retains labels exactly


def test_soft_labels_are_told_by_class(make_config, edits, tmp_path):
    options = ("augment.upstream=cache", "train.select_split=", *SAFLEX, "saflex.penalty=0", "saflex.temperature=10")
    train(make_config(*options), tmp_path / "saflex")
    rows = RunDir(tmp_path / "saflex", lock=False).read_rows("augmented.jsonl")
    assert all(row["soft_labels"][0][0] == row["learned_label"] for row in rows)
    assert all(sum(share for _, share in row["soft_labels"]) <= 1.01 for row in rows)  # each is rounded to three decimals
    assert max(len(row["soft_labels"]) for row in rows) > 1
    assert soft_label([3, 1, 3, None, 2], [0.4, 0.3, 0.2, 0.098, 0.002]) == [(3, 0.6), (1, 0.3), (None, 0.098)]


@pytest.mark.parametrize("method", ["flyp", "ce-text", "ce-linear", "linear-probe", "lp-ft"])
def test_every_method_trains_and_is_evaluated(make_config, tiny_clip_dir, tmp_path, method):
    run = tmp_path / "run"
    config = make_config(f"train.method={method}", "train.probe_steps=3", "augment.upstream=flip", *SAFLEX)
    summary = train(config, run)
    assert summary["steps"] == (8 if method == "lp-ft" else 5)
    assert all(math.isfinite(loss) for loss in losses(run))
    start = load_file(tiny_clip_dir / "open_clip_model.safetensors")
    changed = {name for name, value in weights(run).items() if not torch.equal(value, start[name])}
    linear = method in ("ce-linear", "linear-probe", "lp-ft")
    assert (run / "head.safetensors").is_file() == linear
    if linear:
        head = load_file(run / "head.safetensors")
        assert head["weight"].shape == (3, 32)
        assert not torch.equal(head["weight"], head["initial_weight"])
    assert bool(changed) == (method != "linear-probe")
    assert all(name.startswith("visual.") for name in changed) == linear
    rows = evaluate(run, wise_alphas=(0.0,))["results"]
    final = next(row for row in rows if (row["split"], row["wise_alpha"]) == ("id_val", 1.0))
    assert final["accuracy"] == pytest.approx(summary["best"])


def test_lp_ft_starts_finetuning_from_the_probe(make_config, tmp_path):
    options = ("train.select_split=", "train.probe_steps=3")
    train(make_config("train.method=lp-ft", *options, "train.epochs=0", "train.steps=0"), tmp_path / "lp")
    train(make_config("train.method=linear-probe", *options, "train.steps=3"), tmp_path / "probe")
    assert_same(load_file(tmp_path / "lp" / "head.safetensors"), load_file(tmp_path / "probe" / "head.safetensors"))
    assert_same(weights(tmp_path / "lp"), weights(tmp_path / "probe"))


@pytest.mark.parametrize(
    ("upstream", "method"),
    [("randaugment", "flyp"), ("mixup", "flyp"), ("cutmix", "flyp"), ("mixup", "ce-text"), ("cutmix", "ce-linear")]
    + [pytest.param(name, "flyp", marks=pytest.mark.slow) for name in ("autoaugment", "augmix", "trivialaugment", "random-crop")],
)
def test_every_source_of_augmented_rows_works_with_saflex(make_config, tmp_path, upstream, method):
    options = (f"augment.upstream={upstream}", f"train.method={method}", "train.steps=2", "train.select_split=")
    train(make_config(*options, *SAFLEX, "saflex.scope=all"), tmp_path / "run")
    rows = RunDir(tmp_path / "run", lock=False).read_rows("augmented.jsonl")
    assert len(rows) == 12
    assert all(math.isfinite(row["gain"]) for row in rows)
    assert any(row["gain"] != 0 for row in rows)


def test_operations_follow_the_cache_in_order(make_config, edits, tmp_path):
    options = ("train.steps=2", "train.select_split=", "train.log_augmented=true")
    for name, upstream in (("plain", '["cache"]'), ("more", '["cache", "flip", "mixup"]')):
        train(make_config(f"augment.upstream={upstream}", *options), tmp_path / name)
    plain, more = (RunDir(tmp_path / name, lock=False).read_rows("augmented.jsonl") for name in ("plain", "more"))
    assert [row["id"] for row in plain] == [row["id"] for row in more]
    assert losses(tmp_path / "plain") != losses(tmp_path / "more")


def test_accumulated_parts_of_cross_entropy_equal_the_whole_batch(make_config, tmp_path):
    """For the contrastive loss each part is its own problem; cross entropy is a mean over rows. 1e-6: order of sums."""
    options = ("train.method=ce-linear", "train.select_split=", "augment.on_train=[]", "train.clip_norm=0", "train.steps=2")
    for parts in (1, 3):
        train(make_config(*options, f"train.accumulation={parts}", "train.eps=1e-3"), tmp_path / str(parts))
    assert_same(weights(tmp_path / "3"), weights(tmp_path / "1"), tolerance=1e-6)
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), abs=1e-5)


@pytest.mark.parametrize("scope", [pytest.param("head", marks=pytest.mark.slow), "all"])
def test_gradient_checkpointing_changes_nothing(make_config, tmp_path, scope):
    options = ("augment.upstream=flip", *SAFLEX, f"saflex.scope={scope}", "train.select_split=", "train.steps=3")
    for name in ("false", "true"):
        train(make_config(*options, f"train.gradient_checkpointing={name}"), tmp_path / name)
    assert_same(weights(tmp_path / "true"), weights(tmp_path / "false"), tolerance=1e-6)


def test_bf16_runs_on_a_cpu_near_the_float32_run(make_config, tmp_path):
    options = ("augment.upstream=flip", *SAFLEX, "train.select_split=", "train.steps=3", "train.lr=1e-4")
    for precision in ("no", "bf16"):
        train(make_config(*options, f"train.precision={precision}"), tmp_path / precision)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "no")
    # bf16 keeps 8 bits: logits of scale 14 are off by a few hundredths.
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "no"), abs=0.1)
    assert {value.dtype for value in weights(tmp_path / "bf16").values()} == {torch.float32}


FROZEN = {
    "train.freeze_text=true": lambda name: not name.startswith("visual.") and name != "logit_scale",
    "train.freeze_image=true": lambda name: name.startswith("visual."),
    "train.freeze_token_embedding=true": lambda name: name == "token_embedding.weight",
    "train.freeze_image_blocks=1": lambda name: name.startswith(
        ("visual.conv1", "visual.class_emb", "visual.positional", "visual.ln_pre", "visual.transformer.resblocks.0.")
    ),
}


@pytest.mark.parametrize("option", FROZEN)
def test_exactly_the_frozen_parameters_stay(make_config, tiny_clip_dir, tmp_path, option):
    train(make_config(option, "train.select_split=", "train.steps=2"), tmp_path / "run")
    start, after = load_file(tiny_clip_dir / "open_clip_model.safetensors"), weights(tmp_path / "run")
    same = {name for name in start if torch.equal(start[name], after[name])}
    assert same == {name for name in start if FROZEN[option](name)}


def test_balanced_sampling_draws_every_class_equally(make_config, tiny_images_dir, tmp_path):
    for path in list((tiny_images_dir / "day" / "circle").iterdir())[3:]:
        path.unlink()
    setup = prepare(make_config("train.balanced_sampling=true", "train.batch_size=3"))
    labels = [setup.dataset.train.samples[row.index].label for step in range(4) for row in setup.plan.step(step)]
    assert len(set(setup.dataset.train.class_counts().values())) > 1, "nothing to balance"
    assert [labels.count(label) for label in range(3)] == [4, 4, 4]


def test_shots_cut_the_training_split_only(make_config):
    setup = prepare(make_config("data.shots=2", "train.batch_size=6"))
    assert set(setup.dataset.train.class_counts().values()) == {2}
    assert len(setup.dataset.splits["id_val"]) == 6


def test_best_weights_are_kept_not_the_last(make_config, tmp_path, monkeypatch):
    values, metric_row = iter((0.2, 0.6, 0.4, 0.6, 0.1)), model_selection.metric_row
    monkeypatch.setattr(model_selection, "metric_row", lambda scores: metric_row(scores) | {"macro_f1": next(values)})
    run = tmp_path / "run"
    options = ("train.evaluate_every=1", "train.select_metric=macro_f1", "train.checkpoint_every=1", "train.keep_checkpoints=5")
    assert train(make_config(*options), run)["best"] == 0.6
    second = torch.load(run / "checkpoints" / "step-00000002.pt", weights_only=True)["learner"]
    assert_same(weights(run), {name: second[f"clip.{name}"] for name in weights(run)})


def test_without_a_select_split_the_last_weights_are_kept(make_config, tmp_path):
    run = tmp_path / "run"
    summary = train(make_config("train.select_split=", "train.evaluate_every=1"), run)
    assert summary["best"] is None
    assert all("split" not in row for row in metrics(run))
    last = torch.load(max((run / "checkpoints").glob("step-*.pt")), weights_only=True)
    assert_same({name: last["learner"][f"clip.{name}"] for name in weights(run)}, weights(run))


def test_early_stopping(make_config, tmp_path, capsys):
    config = make_config("train.steps=50", "train.evaluate_every=1", "train.patience=2", "train.lr=1e-9")
    assert train(config, tmp_path / "run")["steps"] == 3, "accuracy cannot change: the first evaluation stays the best"
    assert "stopped early after step 3" in capsys.readouterr().out


def test_no_step_leaves_the_pretrained_model(make_config, tiny_clip_dir, tmp_path):
    summary = train(make_config("train.steps=0", "train.epochs=0"), tmp_path / "run")
    assert summary["steps"] == 0
    assert_same(weights(tmp_path / "run"), load_file(tiny_clip_dir / "open_clip_model.safetensors"))


def test_reader_processes_change_nothing(make_config, tmp_path):
    options = ("augment.upstream=randaugment", "train.steps=2", "train.select_split=")
    for workers in (0, 1):
        train(make_config(*options, f"data.workers={workers}"), tmp_path / str(workers))
    assert_same(weights(tmp_path / "1"), weights(tmp_path / "0"))


def test_dry_run_writes_nothing(make_config, tmp_path, capsys):
    train(make_config("train.tracker=none"), tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    assert "12 images of 3 classes: 5 steps of 6 training rows" in out
    assert "all checks passed" in out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own imports
def test_tensorboard_gets_the_metrics(make_config, tmp_path):
    pytest.importorskip("tensorboard")
    train(make_config("train.tracker=tensorboard", "train.steps=2", "train.select_split="), tmp_path / "run")
    events = list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert events
    assert any(b"grad_norm" in file.read_bytes() for file in events)


def test_env_json_says_what_ran(make_config, tmp_path):
    train(make_config("train.steps=1", "train.select_split=", "train.batch_size=3"), tmp_path / "run", limit=5)
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert (env["limit"], env["steps"], env["processes"], env["unreadable"]) == (5, 1, 1, {})
    assert "torch" in env["packages"]


def test_groups_decay_matrices_only(make_config):
    setup = prepare(make_config("train.method=ce-linear"))
    groups = parameter_groups(setup.task.network, lr=1.0, head_lr=2.0, weight_decay=0.1)
    names = {id(p): name for name, p in setup.task.network.named_parameters()}
    kinds = {(g["peak_lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert kinds[2.0, 0.1] == {"head.weight"}
    assert kinds[2.0, 0.0] == {"head.bias"}
    assert "clip.logit_scale" in kinds[1.0, 0.0]
    assert all(not name.endswith("bias") for name in kinds[1.0, 0.1])


@pytest.mark.parametrize("frozen", [True, False])
def test_batchnorm_statistics_stay_unless_asked(make_config, tmp_path, frozen):
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    folder = tmp_path / "resnet"
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    clip = load_clip(make_config().model.name)
    preprocess = clip.config["preprocess_cfg"]
    save_clip(
        Clip(open_clip.CLIP(**config), clip.preprocess, clip.tokenizer, {"model_cfg": config, "preprocess_cfg": preprocess}),
        folder,
    )
    options = (f"train.freeze_batchnorm={str(frozen).lower()}", "train.steps=2", "augment.upstream=flip", *SAFLEX)
    train(make_config(f"model.name=local-dir:{folder}", *options), tmp_path / "run")
    start, after = load_file(folder / "open_clip_model.safetensors"), weights(tmp_path / "run")
    running = [name for name in start if "running_" in name]
    assert len(running) > 10
    assert {torch.equal(start[name], after[name]) for name in running} == {frozen}
    assert not torch.equal(start["visual.conv1.weight"], after["visual.conv1.weight"])
    assert not torch.equal(start["visual.bn1.weight"], after["visual.bn1.weight"]), "scale and shift are trained either way"


def test_a_log_file_gets_a_line_per_evaluation_and_per_interval(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ProgressLines.__init__, "__kwdefaults__", {"shown": True, "every": 0.0})
    train(make_config("train.steps=4", "train.evaluate_every=2"), tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    assert [line.split(",")[0] for line in lines if " of 4 steps" in line] == [f"training: {n} of 4 steps" for n in (1, 2, 3, 4)]
    evaluations = [line for line in lines if line.startswith("training: after step")]
    values = [row["accuracy"] for row in metrics(tmp_path / "run") if "accuracy" in row]
    assert [line.partition(";")[0] for line in evaluations] == [
        f"training: after step {step} accuracy {value:.4f} on id_val" for step, value in zip((2, 4), values, strict=True)
    ]
    assert all(f"; best {max(values[: n + 1]):.4f} after step" in line for n, line in enumerate(evaluations))
