"""`export`: other tools load the folder and give the run's logits; the card tells the run; mistakes are one line."""

import json
from typing import ClassVar

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flyp_saflex import cli, extras
from flyp_saflex.errors import ModelError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.evaluation.load_run import classes_of, load_clip_run, open_run
from flyp_saflex.evaluation.other_sets import evaluate_on
from flyp_saflex.exporting import export_run as module
from flyp_saflex.exporting import onnx_graph
from flyp_saflex.exporting.export_run import export_run
from flyp_saflex.exporting.transformers_clip import check_architecture
from flyp_saflex.training.train import train

NO_ONNX = "onnx, onnxscript and onnxruntime are in the extra `onnx`: pip install 'flyp-saflex[onnx]'"
TEXTS = ["a photo of a circle.", "Stripes, at night!"]


@pytest.fixture
def run(make_config, tmp_path):
    folder = tmp_path / "run"
    train(make_config(), folder)
    return folder


def task_of(run, alpha=1.0):
    config = open_run(run)
    return load_clip_run(run, config, classes_of(run, None, ""), alpha=alpha)


def pictures(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.rglob("*.png"))[:5]]


def test_open_clip_loads_the_folder_and_gives_the_same_logits(run, tiny_images_dir, tmp_path, capsys):
    out = export_run(run, to="open_clip", out=tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "classes.json", "open_clip_config.json", "open_clip_model.safetensors",
    ]  # fmt: skip
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    images = torch.stack([preprocess(picture) for picture in pictures(tiny_images_dir)])
    with torch.no_grad():
        found = model.eval().encode_image(images, normalize=True)
    assert torch.allclose(found, task_of(run).embedder()(images), atol=1e-5)
    assert json.loads((out / "classes.json").read_text())["class_names"] == ["circle", "square", "stripes"]
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_gives_equal_logits_from_its_own_processor(
    quick_gelu, make_config, tiny_clip_dir, tiny_images_dir, tmp_path
):
    from transformers import CLIPModel, CLIPProcessor

    path = tiny_clip_dir / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["quick_gelu"] = quick_gelu
    path.write_text(json.dumps(config))
    run = tmp_path / "run"
    train(make_config(), run)
    out = export_run(run, to="transformers", out=tmp_path / "out")
    model, processor = CLIPModel.from_pretrained(out).eval(), CLIPProcessor.from_pretrained(out)
    clip = task_of(run).clip
    images = pictures(tiny_images_dir)
    inputs = processor(text=TEXTS, images=images, return_tensors="pt", padding=True)
    own = torch.stack([clip.preprocess(image) for image in images])
    # the processor resizes with torchvision on tensors, open_clip with Pillow: at most two grey levels apart
    assert (inputs["pixel_values"] - own).abs().max() < 2.5 / 255 / 0.26
    tokens = clip.tokenizer(TEXTS)
    for row, given in zip(tokens.tolist(), inputs["input_ids"].tolist(), strict=True):
        length = row.index(49407) + 1
        assert given[:length] == row[:length]
    with torch.no_grad():
        image, text = clip.model.encode_image(own, normalize=True), clip.model.encode_text(tokens, normalize=True)
        expected = clip.model.logit_scale.exp() * image @ text.T
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=own)
    assert torch.allclose(found.logits_per_image, expected, atol=1e-4)
    assert expected.std() > 0.01, "logits that differ"


@pytest.mark.parametrize("method", ["flyp", "linear-probe"])
def test_onnxruntime_gives_the_class_logits_of_any_number_of_images(method, make_config, tiny_images_dir, tmp_path):
    pytest.importorskip("onnx", reason=NO_ONNX)
    pytest.importorskip("onnxscript", reason=NO_ONNX)
    runtime = pytest.importorskip("onnxruntime", reason=NO_ONNX)
    run = tmp_path / "run"
    train(make_config(f"train.method={method}"), run)
    out = export_run(run, to="onnx", out=tmp_path / "out")
    assert not (out / "head.safetensors").exists()
    task = task_of(run)
    session = runtime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    import onnx

    assert onnx.load(out / "model.onnx").opset_import[0].version == onnx_graph.OPSET
    images = torch.stack([task.clip.preprocess(picture) for picture in pictures(tiny_images_dir)])
    for count in (1, 5):
        logits, embeddings = session.run(["logits", "embeddings"], {"images": images[:count].numpy()})
        assert np.abs(logits - task.predictor()(images[:count]).numpy()).max() < 1e-4
        assert np.abs(embeddings - task.embedder()(images[:count]).numpy()).max() < 1e-4


def test_a_linear_head_lies_beside_a_model_that_has_none(make_config, tiny_images_dir, tmp_path, capsys):
    run = tmp_path / "run"
    train(make_config("train.method=linear-probe"), run)
    out = export_run(run, to="open_clip", out=tmp_path / "out")
    assert "head.safetensors holds it" in capsys.readouterr().out
    head, task = load_file(out / "head.safetensors"), task_of(run)
    images = torch.stack([task.clip.preprocess(picture) for picture in pictures(tiny_images_dir)])
    assert torch.allclose(
        task.embedder()(images) @ head["weight"].T + head["bias"], task.predictor()(images), atol=1e-5
    )  # float sums in another order


def test_the_card_tells_the_run_and_no_path_of_the_machine(make_config, edits, tmp_path):
    run = tmp_path / "run"
    train(make_config("saflex.enabled=true", "augment.upstream=cache"), run)
    out = export_run(run, to="open_clip", out=tmp_path / "before")
    assert "not evaluated" in (out / "README.md").read_text()
    evaluate(run, overrides=["evaluate.bootstrap=50"])
    card = (export_run(run, to="open_clip", out=tmp_path / "out", licence="mit") / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: open_clip\n")
    results = json.loads((run / "results.json").read_text())["results"]
    (night,) = [row for row in results if row["split"] == "night"]
    low, high = (f"{100 * edge:.1f}" for edge in night["accuracy_interval"])
    assert f"| night | test | 24 | {100 * night['accuracy']:.1f} [{low}, {high}] |" in card
    shares = [
        row["kept_fraction"]
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "kept_fraction" in row
    ]
    assert f"SAFLEX (preset `posterior`) kept {100 * sum(shares) / len(shares):.1f} % of the augmented rows (cache)" in card
    for words in ("`circle`, `square`, `stripes`", "| train | train | 12 |", "train.lr", "## Limits"):
        assert words in card
    assert str(tmp_path) not in card


def test_wise_weights_are_exported(run, tmp_path):
    out = export_run(run, to="open_clip", out=tmp_path / "out", alpha=0.5)
    start = load_file(tmp_path / "tiny_clip" / "open_clip_model.safetensors")
    end = load_file(run / "model" / "open_clip_model.safetensors")
    found = load_file(out / "open_clip_model.safetensors")
    for name, value in found.items():
        assert torch.allclose(value, (start[name] + end[name]) / 2, atol=1e-6)
    assert "WiSE-FT, 0.5 of the way" in (out / "README.md").read_text()


def used(out, picture):
    """Run the card's own Python on a picture, and return the logits that it ends with."""
    card = (out / "README.md").read_text(encoding="utf-8")
    text = card.split("```python\n")[1].split("```")[0]
    space = {"__name__": "card"}
    exec(compile(text.replace("FOLDER", str(out)).replace("image.jpg", str(picture)), "card", "exec"), space)
    return torch.as_tensor(space["logits"]).detach()


@pytest.mark.parametrize("to", ["open_clip", "transformers", "onnx"])
@pytest.mark.parametrize("method", ["flyp", "ce-linear"])
def test_the_cards_python_gives_the_runs_logits(to, method, make_config, tiny_images_dir, tmp_path, capsys):
    if to == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason=NO_ONNX)
    run = tmp_path / "run"
    train(make_config(f"train.method={method}"), run)
    out = export_run(run, to=to, out=tmp_path / "out")
    capsys.readouterr()
    picture, task = tiny_images_dir / "night" / "circle" / "0.png", task_of(run)
    expected = task.predictor()(task.clip.preprocess(Image.open(picture).convert("RGB"))[None])
    found = used(out, picture)
    assert found.shape == expected.shape == (1, 3)
    # transformers' processor and ImageOps.fit round pixels in another way than open_clip's preprocessing
    assert torch.allclose(found, expected, atol=1e-4 if to == "open_clip" else 0.05)
    assert capsys.readouterr().out.strip() in ("circle", "square", "stripes")
    card = (out / "README.md").read_text(encoding="utf-8")
    fixed = to == "onnx" or method == "ce-linear"
    assert ("pipeline_tag: image-classification" in card) == fixed
    assert ("(forgetting)" in card) != fixed


def test_the_card_tells_before_and_after_the_choice_of_alpha_and_other_sets(make_config, tiny_images_dir, tmp_path):
    run = tmp_path / "run"
    train(make_config(), run)
    evaluate(run, wise_alphas=(0.0, 0.5), overrides=["evaluate.calibrate=true"])
    evaluate_on(run, [f"dusk={tiny_images_dir / 'night'}"])
    own = json.loads((run / "results.json").read_text())
    card = (export_run(run, to="open_clip", out=tmp_path / "out", alpha=0.0) / "README.md").read_text()
    accuracy = {row["wise_alpha"]: f"{100 * row['accuracy']:.1f}" for row in own["results"] if row["split"] == "night"}
    assert card.startswith("---\nlicense: unknown\n")
    assert "# tiny_clip, finetuned on images of 3 classes" in card
    assert f"| dusk, test | 24 | {accuracy[0.0]} | {accuracy[0.0]} |" in card, "the pretrained weights themselves"
    assert "its figures are too good" in card
    assert "calibrated after dividing the logits by" in card
    other = next(alpha for alpha in (0.5, 1.0) if alpha != own["chosen_alpha"])
    card = (export_run(run, to="open_clip", out=tmp_path / "other", alpha=other) / "README.md").read_text()
    assert f"alpha {own['chosen_alpha']:g} was the best on id_val; these are of {other:g}" in card
    after, before = card.split("The pretrained weights on the same images:")
    assert f"| night | test | 24 | {accuracy[other]} " in after
    assert f"| night | test | 24 | {accuracy[0.0]} " in before
    assert "- `train.lr = 0.001` (default `1e-05`)" in card
    assert "log_every" not in card


class Hub:
    """Local fake of `huggingface_hub.HfApi`: keeps what is uploaded."""

    repositories: ClassVar[dict] = {}
    failure = None

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        if self.failure is not None:
            raise self.failure
        self.repositories[repo_id] = {"private": private, "exist_ok": exist_ok}
        return f"https://hub.invalid/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        from pathlib import Path

        self.repositories[repo_id]["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


def test_push_uploads_the_whole_folder_to_a_private_repository(run, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    hub = type("Fake", (Hub,), {"repositories": {}})
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    out = export_run(run, to="open_clip", out=tmp_path / "out", push_to="hf://anna/clip-shapes")
    assert hub.repositories["anna/clip-shapes"] == {
        "private": True,
        "exist_ok": True,
        "files": {path.name: path.read_bytes() for path in out.iterdir()},
    }
    assert "uploaded to https://hub.invalid/anna/clip-shapes" in capsys.readouterr().out
    hub.failure = OSError("401 Client Error\nmore")
    assert cli.main(["export", str(run), "--to", "open_clip", "--out", str(tmp_path / "b"), "--push", "hf://anna/x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the upload failed (401 Client Error)" in error
    assert (tmp_path / "b" / "README.md").is_file()


@pytest.mark.parametrize(
    ("model_cfg", "words"),
    [
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 12}}, r"vision_cfg\.layers = \[1, 1, 1, 1\] \(a ResNet\)"),
        ({"vision_cfg": {"timm_model_name": "convnext_base", "layers": 1}}, "timm_model_name = convnext_base"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "text_cfg.hf_model_name = roberta-base"),
        ({"init_logit_bias": -10}, "init_logit_bias = -10"),
        ({"vision_cfg": {"layers": 1, "pool_type": "avg"}}, "pool_type = avg"),
    ],
)
def test_an_architecture_that_transformers_lacks_is_told(model_cfg, words):
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"vision_cfg": {"layers": 1}, "text_cfg": {}} | model_cfg
    with pytest.raises(ModelError, match=f"CLIPModel has no such architecture .*{words}.* use --to open_clip"):
        check_architecture({"model_cfg": config, "preprocess_cfg": preprocess})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/none", "--to", "onnx", "--out", "{tmp}/o"], ["pip install 'flyp-saflex[onnx]'"]),
        (["{tmp}/none", "--to", "open_clip", "--out", "{tmp}/o"], ["none: there is no such folder"]),
        (["{tmp}", "--to", "open_clip", "--out", "{tmp}/o"], ["is not a run folder"]),
        (["{tmp}/none", "--to", "open_clap", "--out", "{tmp}/o"], ["--to open_clap", "did you mean 'open_clip'?"]),
        (["{tmp}/none", "--to", "open_clip", "--out", "{tmp}"], ["is there already"]),
        (["{tmp}/none", "--to", "open_clip", "--out", "{tmp}/o", "--push", "anna/x"], ["expected hf://USER/NAME"]),
        (["{tmp}/none", "--to", "open_clip", "--out", "{tmp}/o", "--licence", "a: b"], ["--licence", "apache-2.0"]),
    ],
)
def test_a_mistake_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    (tmp_path / "file").write_text("")
    assert cli.main(["export", *(part.format(tmp=tmp_path) for part in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "o").exists()


def test_an_interrupted_export_leaves_no_folder(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, to="open_clip", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
