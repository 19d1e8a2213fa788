"""Every family of open_clip's zoo, shrunk: loss, gradient and gains are those of open_clip's own functions, and runs reload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
import zoo_models
from open_clip.loss import ClipLoss, SigLipLoss
from torch.func import functional_call
from zoo_models import FAMILIES

from flyp_saflex.cli import main
from flyp_saflex.clip.image_tower import ImageTower, num_blocks
from flyp_saflex.clip.model import Clip, load_clip
from flyp_saflex.config import Config, TrainConfig
from flyp_saflex.errors import ModelError
from flyp_saflex.records import Dataset, Split
from flyp_saflex.saflex.saflex import Saflex
from flyp_saflex.step.step import StepLoss
from flyp_saflex.step.validation_gradient import Validation
from flyp_saflex.tables import OBJECTIVES
from flyp_saflex.tasks.clip_choices import reads_bias
from flyp_saflex.tasks.clip_network import ClipNetwork
from flyp_saflex.tasks.clip_task import ClipTask
from flyp_saflex.tasks.label_space import Rows

QUICK = ("ViT", "SigLIP 2", "EVA02", "RoBERTa", "Hiera")
"""Families of the quick suite: a plain tower, a sigmoid model, rotary embeddings, a text tower of transformers, a guarded cut."""
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
TEXT_TOWERS = [name for name, family in FAMILIES.items() if family.text is not None and "SigLIP" not in name]
CAPTIONS = ["a photo of a circle.", "a photo of a square.", "a photo of the stripes."]


@pytest.fixture
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> Clip:
    """The family that the test names, in float64."""
    clip = load_clip(f"local-dir:{zoo_models.build(FAMILIES[request.param], tmp_path / 'start')}")
    clip.model.double()
    return clip


def make_task(clip: Clip) -> ClipTask:
    splits = {"train": Split(name="train", role="train", shift="id", samples=())}
    dataset = Dataset(name="captions", root=Path(), class_names=tuple(CAPTIONS), splits=splits, templates=("{}",))
    config = Config(train=TrainConfig(proxies="batch"))
    network = ClipNetwork(clip.model, fixed=clip.fixed, with_bias=reads_bias(config, clip))
    task = ClipTask(clip, network, dataset, config)
    task.begin_phase(only_head=False)
    return task


def make_step(task: ClipTask, saflex: Saflex | None = None) -> StepLoss:
    """A step with the loss that a recipe without `train.objective` has."""
    return StepLoss(task, OBJECTIVES[task.objective_name(task.config)], saflex=saflex)


def untrimmed(
    model: torch.nn.Module, images: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        model.encode_image(images, normalize=True),
        model.encode_text(tokens, normalize=True),
        model.logit_scale.exp(),
    )


@pytest.mark.parametrize(
    ("name", "clip"), [pytest.param(n.values[0], n.values[0], marks=n.marks) for n in EACH], indirect=["clip"]
)
def test_loss_gradient_and_gains_are_those_of_open_clips_functions(name: str, clip: Clip) -> None:
    torch.manual_seed(0)
    model, size, num_train = clip.model, clip.image_size_px, 3
    images, captions = torch.randn(5, 3, size, size, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    tokens = clip.tokenizer(CAPTIONS)
    assert len(torch.unique(tokens, dim=0)) == len(CAPTIONS), "the tokenizer tells captions apart"
    task = make_task(clip)
    parameters = task.network.parameters_in("all")
    names, leaves = [key.removeprefix("clip.") for key in parameters], list(parameters.values())
    # Plain step: loss and gradient.
    step, is_sigmoid = make_step(task), "SigLIP" in name
    rows = Rows(images, captions, captions, torch.arange(5), 5)
    loss = step(rows).loss
    whole = untrimmed(model, images, tokens[captions])
    expected = SigLipLoss()(*whole, model.logit_bias) if is_sigmoid else ClipLoss()(*whole)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    found, wanted = (torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) for value in (loss, expected))
    for key, ours, theirs in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
    assert ("logit_bias" in names) == is_sigmoid, "trained with the loss that sees it"
    assert sum(float(theirs.abs().max()) > 1e-6 for theirs in wanted) > len(wanted) / 2
    # SAFLEX: gains along the validation gradient, against differences of the untrimmed logits.
    saflex = Saflex(scope="all", validation_loss="ce", estimator="exact", gain_scale="none", average=0.0)
    step = make_step(task, saflex)
    labels = torch.tensor([0, 1, 2])
    validation = torch.randn(3, 3, size, size, dtype=torch.float64)
    step.refresh(Validation(validation, labels, labels))
    direction = saflex.state_dict()["gradient"]
    image, text, scale = untrimmed(model.eval(), validation, tokens)
    theirs = torch.autograd.grad(
        torch.nn.functional.cross_entropy(scale * image @ text.T, labels), leaves, allow_unused=True, materialize_grads=True
    )
    for key, value in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(direction[key], value, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
    result = step(Rows(images, captions, captions, torch.arange(5), num_train))

    def rewards(length: float) -> torch.Tensor:
        """Minus the loss of every row for every label."""
        moved = {
            f"model.{key}": value.detach() + length * direction[f"clip.{key}"] for key, value in zip(names, leaves, strict=True)
        }
        image, text, scale = functional_call(Untrimmed(model), moved, (images[num_train:], tokens[captions]))
        if is_sigmoid:
            logits = scale * image @ text.T + moved["model.logit_bias"]
            return logits - torch.nn.functional.softplus(logits).sum(dim=1, keepdim=True)
        return (scale * image @ text.T).log_softmax(dim=1)

    with torch.no_grad():
        size = 1e-5 / max(1e-3, float(torch.stack([value.norm() for value in direction.values()]).norm()))
        slope_AC = (rewards(-size) - rewards(size)) / (2 * size)
    own = torch.stack([slope_AC[row, captions == captions[num_train + row]].mean() for row in range(2)])
    # T5's norms take the variance in float32, which a difference magnifies.
    torch.testing.assert_close(result.gains_A, own, rtol=1e-3, atol=1e-6 * float(slope_AC.abs().max()))


class Untrimmed(torch.nn.Module):
    """open_clip's two encoders as one module, so that its parameters can be exchanged."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return untrimmed(self.model, images, tokens)


@pytest.mark.parametrize("mode", ["frozen", "recomputed"])
@pytest.mark.parametrize(
    "clip", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TEXT_TOWERS], indirect=True
)
def test_text_towers_of_transformers_give_the_same_gains_frozen_and_recomputed(clip: Clip, mode: str) -> None:
    """They have dropout, some by a function and of whole layers; gains are those of evaluation mode all the same."""
    images, labels, found = torch.randn(5, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0]), []
    for estimator in ("exact", "one-sided"):
        for changed in (False, True):
            task = make_task(clip)
            task.network.freeze(text=mode == "frozen")
            if changed and mode == "recomputed":
                task.network.recompute()
            task.network.set_mode(training=changed, freeze_batchnorm=True)
            saflex = Saflex(scope="all", validation_loss="ce", estimator=estimator, gain_scale="none", average=0.0, check_every=1)
            step = make_step(task, saflex)
            step.refresh(Validation(images[:3], labels[:3], labels[:3]))
            result = step(Rows(images, labels, labels, torch.arange(5), 3))
            assert torch.autograd.grad(result.loss, task.network.clip.visual.proj)[0].isfinite().all()
            found.append(result.gains_A)
    for gains in found[1:]:
        torch.testing.assert_close(gains, found[0], rtol=0.02, atol=0.02 * float(found[0].abs().max()))


def test_the_token_embedding_of_a_text_tower_of_transformers_can_be_frozen(tmp_path: Path) -> None:
    clip = load_clip(f"local-dir:{zoo_models.build(FAMILIES['RoBERTa'], tmp_path / 'start')}")
    network = ClipNetwork(clip.model)
    network.freeze(token_embedding=True)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"clip.text.transformer.embeddings.word_embeddings.weight"}


@pytest.mark.parametrize("name", ["coca_base", "coca_ViT-B-32", "coca_roberta-ViT-B-32"])
def test_coca_is_refused_by_its_configuration_whatever_its_name(name: str, tmp_path: Path) -> None:
    model_cfg = open_clip.get_model_config(name)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"size": 224}}))
    with pytest.raises(ModelError, match="CoCa's captioning loss has no place in FLYP"):
        load_clip(f"local-dir:{tmp_path}", "random")
    with pytest.raises(ModelError, match="CoCa's captioning loss has no place in FLYP"):
        load_clip(name, "random")


def test_a_cut_that_differs_is_not_used_and_told(tiny_clip_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return 1.1 * hidden[:, :1]

    monkeypatch.setattr("flyp_saflex.clip.image_tower.run_block_for_first", differs)
    monkeypatch.setattr("flyp_saflex.clip.blocks.rest", lambda block, hidden, mixed: hidden)
    clip = load_clip(f"local-dir:{tiny_clip_dir}")
    image, text = clip.notes
    assert "image tower VisionTransformer: cut into blocks it gives another embedding (relative difference" in image
    assert "text tower CLIP: without its padding it gives another embedding" in text
    network, images, tokens = ClipNetwork(clip.model), torch.randn(2, 3, 32, 32), clip.tokenizer(CAPTIONS)
    out = network(images, tokens)
    assert torch.equal(out.images_ND, clip.model.encode_image(images, normalize=True))
    assert torch.equal(out.columns_CD, clip.model.encode_text(tokens, normalize=True))
    with pytest.raises(ModelError, match=r"train\.freeze_image_blocks = 1: "):
        ClipNetwork(clip.model, num_frozen=1)


def test_a_cut_that_fails_is_not_used_and_told(tmp_path: Path) -> None:
    clip = load_clip(f"local-dir:{zoo_models.build(FAMILIES['Hiera'], tmp_path / 'start')}")
    assert any(note.startswith("image tower Hiera: cut into blocks it fails (") for note in clip.notes)
    assert ImageTower(clip.model.visual).has_projection, "it is cut before its projection all the same"


def test_fixed_position_embeddings_are_never_trained(tiny_clip_dir: Path) -> None:
    path = tiny_clip_dir / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["pos_embed_type"] = "sin_cos_2d"
    path.write_text(json.dumps(config))
    clip = load_clip(f"local-dir:{tiny_clip_dir}")
    task = make_task(clip)
    for _ in range(2):  # a second phase, too
        frozen = {name for name, parameter in task.network.named_parameters() if not parameter.requires_grad}
        assert frozen == {"clip.visual.positional_embedding"}
        task.begin_phase(only_head=False)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows that tests add, printed at the end."""
    rows: list[str] = []
    yield rows
    print("\n" + "\n".join(["family | image tower | text tower | tokenizer | accuracy", *sorted(rows)]))


@pytest.mark.parametrize("name", EACH)
def test_a_family_trains_with_saflex_is_evaluated_offline_and_reloads(
    name: str, tiny_options: list[str], edits: object, tmp_path: Path, table: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start, run = zoo_models.build(FAMILIES[name], tmp_path / "start"), tmp_path / "run"
    options = [option for option in tiny_options if not option.startswith(("model.", "train.steps"))]
    options += [
        f"model.name=local-dir:{start}",
        "model.pretrained=",
        "train.steps=2",
        "saflex.enabled=true",
        'augment.upstream=["cache"]',
    ]
    sets = [word for option in options for word in ("--set", option)]
    assert main(["train", "folder", *sets, "--run-dir", str(run)]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2
    assert any("logit_bias" in row for row in rows) == ("SigLIP" in name), "the sigmoid loss, by itself"
    before = load_clip(f"local-dir:{start}")
    shutil.rmtree(start)  # with its tokenizer, and the configuration of its text tower
    assert main(["evaluate", str(run)]) == 0, capsys.readouterr().err
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["results"]
    clip = load_clip(f"local-dir:{run / 'model'}")
    assert torch.equal(clip.tokenizer(CAPTIONS), before.tokenizer(CAPTIONS))
    moved = [key for key, value in clip.model.state_dict().items() if not torch.equal(value, before.model.state_dict()[key])]
    assert any(key.startswith("visual.") for key in moved)
    assert any(not key.startswith("visual.") and "logit" not in key for key in moved)
    if FAMILIES[name].text is None:
        assert open_clip.create_model(f"local-dir:{run / 'model'}").state_dict().keys() == clip.model.state_dict().keys()
    assert num_blocks(clip.model.visual) == FAMILIES[name].blocks
    tower = f"{FAMILIES[name].blocks} blocks" if FAMILIES[name].blocks else "whole"
    tower += "" if ImageTower(clip.model.visual).has_projection else ", no projection"
    text = type(getattr(clip.model, "text", clip.model)).__name__
    table.append(f"{name} | {tower} | {text} | {type(clip.tokenizer).__name__} | {results[0]['accuracy']:.2f}")
