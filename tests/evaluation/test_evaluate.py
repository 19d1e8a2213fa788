"""Evaluation of a run folder: rows, WiSE-FT, predictions, merging, and every mistake a user can make."""

import json
from dataclasses import replace

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from children import run_ranks
from PIL import Image
from safetensors.torch import save_file

from flyp_saflex import recipe
from flyp_saflex.clip.image_tower import ImageTower
from flyp_saflex.clip.model import load_clip, save_clip
from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError, DataError, ModelError, RunError
from flyp_saflex.evaluation import metrics
from flyp_saflex.evaluation.evaluate import evaluate, evaluate_split
from flyp_saflex.evaluation.load_run import load_run
from flyp_saflex.evaluation.scoring import scores_of
from flyp_saflex.evaluation.weight_averaging import interpolate
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.storage.run_folder import RunDir

CONTRACT = {"split", "role", "shift", "wise_alpha", "n", "accuracy", "macro_f1", "worst_group_accuracy"}
SPLITS = ["id_val", "id_test", "night"]


@pytest.fixture
def run(tiny_clip_dir, tiny_images_dir, tmp_path):
    """A run as `train` leaves it, started from the tiny CLIP."""
    return make_run(tmp_path / "run", tiny_clip_dir, tiny_images_dir)


FINETUNED = {}


def finetune(clip, images):
    """Fifteen steps on all images: enough that alphas differ. The start is seeded, so the result is kept for all tests."""
    if not FINETUNED:
        names = ("circle", "square", "stripes")
        files = [(label, path) for label, name in enumerate(names) for path in sorted(images.glob(f"*/{name}/*"))]
        batch = torch.stack([clip.preprocess(Image.open(path).convert("RGB")) for _, path in files])
        labels = torch.tensor([label for label, _ in files])
        tokens = clip.tokenizer([f"a photo of a {name}." for name in names])
        optimizer = torch.optim.Adam(clip.model.parameters(), lr=1e-3)
        for _ in range(15):
            texts = clip.model.encode_text(tokens, normalize=True)
            logits = 20 * clip.model.encode_image(batch, normalize=True) @ texts.T
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
        FINETUNED.update(clip.model.state_dict())
    clip.model.load_state_dict(FINETUNED)


def make_run(folder, model, images, *extra, noise=0.0):
    config = recipe.load(
        "folder",
        [
            f"data.root={images}",
            "data.train_domains=day",
            "data.test_domains=night",
            "data.select_fraction=0.25",
            "data.test_fraction=0.25",
            f"model.name=local-dir:{model}",
            "model.pretrained=",
            "evaluate.batch_size=5",
            "evaluate.bootstrap=50",
            "seed=3",
            *extra,
        ],
    )
    clip = load_clip(config.model.name)
    finetune(clip, images)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    with RunDir(folder) as run_dir:
        run_dir.write_config(config)
        save_clip(clip, run_dir.model)
        run_dir.mark_done()
    return folder


def read(run):
    return json.loads((run / "results.json").read_text())


def by_hand(run, split, alpha=1.0):
    """Logits one image at a time, with open_clip alone and the weights of `alpha`."""
    with RunDir(run, lock=False) as folder:
        config = folder.read_config()
    dataset = load_dataset(config.data, seed=config.seed)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run / 'model'}")
    start = open_clip.create_model(config.model.name)
    model.load_state_dict(interpolate(start.state_dict(), model.state_dict(), alpha))
    model.eval()
    clip = replace(load_clip(config.model.name), model=model)
    samples = dataset.splits[split].samples
    with torch.no_grad():
        head = zero_shot_head(clip, dataset.class_names, dataset.templates)
        features = [model.encode_image(preprocess(Image.open(s.path).convert("RGB"))[None], normalize=True)[0] for s in samples]
        return samples, model.logit_scale.exp() * torch.stack(features) @ head.T


def test_every_split_but_train_with_the_rows_of_the_contract(run, capsys):
    results = evaluate(run)
    assert results == read(run)
    assert (results["recipe"], results["seed"], results["chosen_alpha"]) == ("folder", 3, None)
    assert [(row["split"], row["role"], row["shift"]) for row in results["results"]] == [
        ("id_val", "select", "id"),
        ("id_test", "test", "id"),
        ("night", "test", "ood"),
    ]
    for row in results["results"]:
        assert list(row)[:4] == ["split", "role", "shift", "wise_alpha"]
        assert row.keys() >= CONTRACT | {"ece", "accuracy_interval", "macro_f1_interval", "unreadable"}
        samples, logits = by_hand(run, row["split"])
        labels = [sample.label for sample in samples]
        assert row["n"] == len(samples)
        assert row["accuracy"] == metrics.accuracy(labels, logits.argmax(dim=1))
        assert row["macro_f1"] == pytest.approx(metrics.macro_f1(labels, logits.argmax(dim=1)))
        assert row["accuracy_interval"][0] <= row["accuracy"] <= row["accuracy_interval"][1]
    table = capsys.readouterr().out
    assert all(name in table for name in [*SPLITS, "macro-F1"])


def test_train_is_evaluated_on_request_and_one_split_merges_into_the_others(run):
    evaluate(run, splits=["night"])
    assert [row["split"] for row in read(run)["results"]] == ["night"]
    before = read(run)["results"]
    evaluate(run, splits=["train", "id_val"])
    assert [row["split"] for row in read(run)["results"]] == ["train", "id_val", "night"]
    assert read(run)["results"][2:] == before
    assert set(json.loads((run / "details.json").read_text())) == {"train", "id_val", "night"}


def test_wise_sweep_equals_models_that_hold_the_weights_and_alpha_is_chosen_on_the_select_split(run):
    alphas = (0.0, 0.5)
    results = evaluate(run, wise_alphas=alphas)
    rows = {(row["split"], row["wise_alpha"]): row for row in results["results"]}
    assert sorted(rows) == sorted((split, alpha) for split in SPLITS for alpha in (*alphas, 1.0))
    for (split, alpha), row in rows.items():
        samples, logits = by_hand(run, split, alpha)
        expected = {"n": len(samples), **metrics.metric_row(scores_of(samples, logits))}
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5), (split, alpha)
    assert len({row["accuracy"] for (split, _), row in rows.items() if split == "id_val"}) > 1, "nothing to choose from"
    best = max((row["accuracy"], alpha) for (split, alpha), row in rows.items() if split == "id_val")
    assert (results["select_split"], results["select_metric"]) == ("id_val", "accuracy")
    assert results["chosen_alpha"] == best[1]

    # alpha = 1 is the finetuned model, whether or not others are evaluated beside it
    alone = evaluate(run, wise_alphas=())
    assert {row["split"]: row for row in alone["results"] if row["wise_alpha"] == 1} == {
        split: rows[split, 1.0] for split in SPLITS
    }
    assert len(alone["results"]) == len(rows), "the sweep's rows stay"
    assert alone["chosen_alpha"] == results["chosen_alpha"]


def test_predictions_are_those_of_alpha_1_and_of_the_chosen_one(run):
    results = evaluate(run, wise_alphas=(0.0, 0.5), overrides=["train.select_metric=macro_f1"])
    chosen = results["chosen_alpha"]
    for split in SPLITS:
        table = pq.read_table(run / "predictions" / f"{split}.parquet").to_pandas()
        assert set(table["alpha"]) == {1.0, chosen}
        for alpha in {1.0, chosen}:
            part = table[table["alpha"] == alpha]
            samples, logits = by_hand(run, split, alpha)
            assert part["sample_id"].tolist() == [sample.sample_id for sample in samples]
            assert part["label"].tolist() == [sample.label for sample in samples]
            assert part["prediction"].tolist() == logits.argmax(dim=1).tolist()
            assert part["confidence"].tolist() == pytest.approx(logits.softmax(dim=1).max(dim=1).values.tolist(), rel=1e-3)
            assert part["label_name"].tolist() == [sample.sample_id.split("/")[1] for sample in samples]
            assert part["domain"].tolist() == [sample.domain for sample in samples]
            assert set(part["prediction_name"]) <= {"circle", "square", "stripes"}
    details = json.loads((run / "details.json").read_text())
    rows = details["night"]["1"]["per_class"]
    assert [row["name"] for row in rows] == ["circle", "square", "stripes"]
    assert sum(row["n"] for row in rows) == 24
    assert details["night"]["1"]["per_group"][0]["group"] == "night"


def test_predictions_can_be_left_out(run):
    evaluate(run, overrides=["evaluate.save_predictions=false"], splits=["id_val"])
    assert not (run / "predictions").exists()


def test_linear_head_is_used_and_interpolated(tiny_clip_dir, tiny_images_dir, tmp_path):
    run = make_run(tmp_path / "run", tiny_clip_dir, tiny_images_dir, "train.method=ce-linear")
    with pytest.raises(RunError, match=r"has no head.safetensors: its training has not finished; go on with"):
        evaluate(run)
    generator = torch.Generator().manual_seed(4)
    head = {"weight": torch.randn(3, 32, generator=generator), "bias": torch.randn(3, generator=generator)}
    head |= {f"initial_{name}": -tensor for name, tensor in head.items()}
    save_file(head, run / "head.safetensors")
    results = evaluate(run, splits=["night"], wise_alphas=(0.5,))
    rows = {row["wise_alpha"]: row["accuracy"] for row in results["results"]}
    clip = load_clip(f"local-dir:{run / 'model'}")
    dataset = load_dataset(RunDir(run, lock=False).read_config().data)
    samples = dataset.splits["night"].samples
    with torch.no_grad():
        images = torch.stack([clip.preprocess(Image.open(sample.path).convert("RGB")) for sample in samples])
        logits = clip.model.encode_image(images, normalize=True) @ head["weight"].T + head["bias"]
    labels = [sample.label for sample in samples]
    assert rows[1.0] == metrics.accuracy(labels, logits.argmax(dim=1))
    # half way between -h and h every logit is 0 and the first class wins
    assert rows[0.5] == metrics.accuracy(labels, [0] * len(labels))
    save_file({name: tensor[:2].contiguous() for name, tensor in head.items()}, run / "head.safetensors")
    with pytest.raises(RunError, match="has 2 classes, but the dataset has 3"):
        evaluate(run)


def test_unreadable_images_are_left_out_and_counted(run, tiny_images_dir, capsys):
    (tiny_images_dir / "night" / "square" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="max_unreadable"):
        evaluate(run, splits=["night"])
    results = evaluate(run, splits=["night"], overrides=["data.max_unreadable=0.1"])
    (row,) = results["results"]
    assert (row["n"], row["unreadable"]) == (23, 1)
    table = pq.read_table(run / "predictions" / "night.parquet").to_pandas()
    assert "night/square/3.png" not in set(table["sample_id"])
    assert len(table) == 23
    assert "unreadable images left out: night 1" in capsys.readouterr().out


def test_a_quick_look_is_marked_and_replaces_the_sweep_of_its_split_only(run):
    evaluate(run, wise_alphas=(0.5,))
    results = evaluate(run, splits=["id_val"], limit=4)
    rows = {(row["split"], row["wise_alpha"]): row for row in results["results"]}
    assert rows["id_val", 1.0]["limit"] == 4
    assert rows["id_val", 1.0]["n"] == 4
    assert ("id_val", 0.5) not in rows, "4 images and 6 cannot choose an alpha together"
    assert ("night", 0.5) in rows
    assert results["chosen_alpha"] is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluate.select_split=night"], "evaluate.select_split = night cannot pick alpha.*test splits never select"),
        (["train.select_split=id_test"], "train.select_split = id_test cannot pick alpha"),
        (["evaluate.select_split=id_vall"], "no split 'id_vall'; did you mean 'id_val'"),
    ],
)
def test_alpha_is_never_chosen_on_a_test_split(run, overrides, words):
    with pytest.raises(ConfigError, match=words):
        evaluate(run, wise_alphas=(0.5,), overrides=overrides)
    assert not (run / "results.json").exists()


def test_without_a_select_split_all_alphas_are_shown_and_none_is_chosen(run):
    results = evaluate(run, splits=["night"], wise_alphas=(0.5,), overrides=["train.select_split="])
    assert [row["wise_alpha"] for row in results["results"]] == [0.5, 1.0]
    assert results["chosen_alpha"] is None


def test_mistakes_are_named(run, tmp_path):
    with pytest.raises(DataError, match="no split 'nihgt'; did you mean 'night'"):
        evaluate(run, splits=["nihgt"])
    with pytest.raises(RunError, match="there is no such folder"):
        evaluate(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="is not a run folder"):
        evaluate(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"model\.pretrained = random: there are none"):
        evaluate(run, wise_alphas=(0.5,), overrides=["model.pretrained=random"])
    with pytest.raises(ModelError, match="cannot be loaded"):
        evaluate(run, wise_alphas=(0.5,), overrides=[f"model.name=local-dir:{tmp_path / 'gone'}"])
    (run / "model" / "open_clip_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"has no model/open_clip_model.safetensors.* go on with `flyp-saflex train .* --resume`"):
        evaluate(run)


def test_weights_that_are_nan_name_the_split_and_keep_earlier_results(run):
    evaluate(run, splits=["id_val"])
    before = read(run)
    clip = load_clip(f"local-dir:{run / 'model'}")
    with torch.no_grad():
        clip.model.visual.proj.fill_(float("nan"))
    save_clip(clip, run / "model")
    with pytest.raises(RunError, match="split night: 24 of 24 images have logits that are NaN"):
        evaluate(run, splits=["night"])
    assert read(run) == before


def test_dry_run_checks_and_writes_nothing(run, capsys):
    files = sorted(run.rglob("*"))
    evaluate(run, wise_alphas=(0.0, 0.5), dry_run=True)
    assert "would evaluate id_val (6), id_test (6), night (24) at alpha 0, 0.5, 1" in capsys.readouterr().out
    assert sorted(run.rglob("*")) == files
    with pytest.raises(DataError, match="no split"):
        evaluate(run, splits=["x"], dry_run=True)


def test_models_of_several_runs_share_one_pass_over_the_images(run, tiny_clip_dir, tiny_images_dir, tmp_path):
    other = make_run(tmp_path / "other", tiny_clip_dir, tiny_images_dir, "seed=4", noise=0.02)
    dataset = load_dataset(RunDir(run, lock=False).read_config().data)
    tasks = {path: load_run(path, RunDir(path, lock=False).read_config(), dataset) for path in (run, other)}
    reads = []
    preprocess = tasks[run].clip.preprocess
    loader = ImageLoader(lambda image: (reads.append(1), preprocess(image))[1], batch_size=7)
    scored = evaluate_split({path: task.predictor for path, task in tasks.items()}, dataset.splits["night"], loader)
    assert len(reads) == 24
    for path, part in scored.items():
        (row,) = evaluate(path, splits=["night"])["results"]
        assert part.row["accuracy"] == row["accuracy"]
        assert part.row["ece"] == pytest.approx(row["ece"], abs=1e-5)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "changed after all"])
def test_a_sweep_runs_a_frozen_image_tower_once(tiny_clip_dir, tiny_images_dir, tmp_path, monkeypatch, frozen):
    run = make_run(tmp_path / "run", tiny_clip_dir, tiny_images_dir, "train.freeze_image=true")
    clip, start = load_clip(f"local-dir:{run / 'model'}"), load_clip(f"local-dir:{tiny_clip_dir}")
    clip.model.visual.load_state_dict(start.model.visual.state_dict())
    if not frozen:
        with torch.no_grad():
            clip.model.visual.transformer.resblocks[0].mlp.c_fc.bias.add_(0.1)
    save_clip(clip, run / "model")
    passes = []
    lower = ImageTower.lower
    monkeypatch.setattr(ImageTower, "lower", lambda self, images: (passes.append(len(images)), lower(self, images))[1])
    results = evaluate(run, splits=["night"], wise_alphas=(0.0, 0.3, 0.6))["results"]
    evaluated = sum(number for number in passes if number > 1)  # the check at load takes one image
    assert evaluated == (24 if frozen else 4 * 24), "once for all alphas, or once for each where the two ends differ"
    assert [row["wise_alpha"] for row in results] == [0.0, 0.3, 0.6, 1.0]
    for row in results:
        samples, logits = by_hand(run, "night", row["wise_alpha"])
        expected = metrics.metric_row(scores_of(samples, logits))
        assert row["accuracy"] == expected["accuracy"]
        assert row["ece"] == pytest.approx(expected["ece"], abs=1e-5), "which the logits' sizes decide"
    assert len({row["ece"] for row in results}) == 4


def test_batch_size_and_workers_change_nothing(run):
    first = evaluate(run, splits=["night"])["results"]
    assert evaluate(run, splits=["night"], overrides=["evaluate.batch_size=24"])["results"][0]["accuracy"] == first[0]["accuracy"]


@pytest.mark.slow
def test_two_processes_equal_one(run, tmp_path):
    one = evaluate(run, wise_alphas=(0.5,))
    (run / "results.json").unlink()
    out, _ = run_ranks(["evaluate", str(run), "--wise-alphas", "0.5"], tmp_path)
    two = read(run)
    assert out.count("macro-F1") == 1, "only the main process prints"
    for a, b in zip(one["results"], two["results"], strict=True):
        assert (a["split"], a["wise_alpha"], a["n"], a["accuracy"], a["macro_f1"]) == (
            b["split"],
            b["wise_alpha"],
            b["n"],
            b["accuracy"],
            b["macro_f1"],
        )
