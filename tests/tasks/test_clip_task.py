"""CLIP as a task: captions by id, label spaces, class logits, what a run leaves and another one loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flyp_saflex.clip.model import load_clip
from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.config import Config, ModelConfig, TrainConfig
from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.records import Dataset, Edit, Sample, Split
from flyp_saflex.tables import METHODS, TASKS
from flyp_saflex.tasks import clip_task
from flyp_saflex.tasks.clip_task import HEAD, MAX_LOGIT_SCALE, ClipTask, LinearClipTask
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.tasks.task import TaskInputs

CLASSES, TEMPLATES = ("cat", "dog", "bird"), ("a photo of a {}.", "{}")
OWN = Sample(sample_id="own", item=Path("own.png"), label=1, caption="two horses")
PLAIN = Sample(sample_id="plain", item=Path("plain.png"), label=2)


def dataset(classes=CLASSES, samples=(OWN, PLAIN)):
    train = Split(name="train", role="train", shift="id", samples=tuple(samples))
    return Dataset(name="made up", root=Path(), class_names=tuple(classes), splits={"train": train}, templates=TEMPLATES)


def config_of(folder, **train):
    return Config(model=ModelConfig(name=f"local-dir:{folder}", pretrained=""), train=TrainConfig(**train))


def build(folder, *, run=None, data=None, **train):
    config = config_of(folder, **train)
    kind = TASKS[METHODS[config.train.method].task]
    return kind.build(TaskInputs(config=config, dataset=data or dataset(), run=run))


def rows_of(captions, labels, num_train):
    captions_N, labels_N = torch.tensor(captions), torch.tensor(labels)
    return Rows(torch.zeros(len(captions), 1), captions_N, labels_N, torch.arange(len(captions)), num_train)


def alone(tensor):
    return tensor


def pictures(count, seed=0):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_a_row_has_its_own_caption_or_its_class_in_a_template_that_the_seed_picks(tiny_clip_dir):
    task = build(tiny_clip_dir)
    texts = task.captions.texts
    assert texts[task.caption_of(OWN, 5)] == "two horses"
    assert [texts[task.caption_of(PLAIN, seed)] for seed in (0, 1, 2)] == ["a photo of a bird.", "bird", "a photo of a bird."]
    edit = Edit(aug_id="e", path=Path("e.png"), source_id="own", label=1)
    assert texts[task.caption_of(edit, 1)] == "dog", "an edit shows something else than its source's caption says"
    assert [texts[int(caption)] for caption in task.class_caption(torch.tensor([2, 0]))] == [
        "a photo of a bird.",
        "a photo of a cat.",
    ]


def test_a_label_of_either_space_names_its_class(tiny_clip_dir):
    task = build(tiny_clip_dir)
    for label in range(3):
        assert task.class_of(label, "classes") == label
        assert [task.class_of(caption, "captions") for caption in (2 * label, 2 * label + 1)] == [label, label]
    assert task.class_of(task.caption_of(OWN, 0), "captions") is None


def test_label_spaces_are_the_captions_of_the_batch_or_the_classes(tiny_clip_dir):
    task = build(tiny_clip_dir)
    rows = rows_of([4, 6, 4], [2, 1, 2], 2)
    captions = task.label_space(rows, "captions", 0, alone)
    assert captions.labels_K.tolist() == [4, 6]
    assert torch.equal(captions.tokens_UL, task.clip.tokenizer(["a photo of a bird.", "two horses"]))
    classes = task.label_space(rows, "classes", 1, alone)
    assert classes.labels_K.tolist() == [0, 1, 2]
    assert torch.equal(classes.tokens_UL, task.clip.tokenizer(["cat", "dog", "bird"])), "in the template of the seed"
    assert torch.equal(task.class_tokens(), task.clip.tokenizer([f"a photo of a {name}." for name in CLASSES]))


@pytest.mark.parametrize("proxies", ["captions", "batch"])
def test_validation_rows_are_told_apart_by_their_own_captions(tiny_clip_dir, proxies):
    task = build(tiny_clip_dir, proxies=proxies)
    space = task.validation_space(torch.tensor([4, 0, 4]))
    assert torch.equal(space.tokens_UL, task.clip.tokenizer(["a photo of a cat.", "a photo of a bird."]))
    expected = torch.eye(3) if proxies == "batch" else torch.tensor([[0.0, 1], [1, 0], [0, 1]])
    assert torch.equal(space.assignment_VC, expected)
    assert space.inverse_C.tolist() == ([1, 0, 1] if proxies == "batch" else [0, 1])


def test_class_logits_are_those_of_the_zero_shot_head(tiny_clip_dir):
    task, clip = build(tiny_clip_dir), load_clip(f"local-dir:{tiny_clip_dir}")
    images = pictures(3)
    with torch.no_grad():
        head_KD = zero_shot_head(clip, CLASSES, TEMPLATES)
        expected = clip.model.logit_scale.exp() * clip.model.encode_image(images, normalize=True) @ head_KD.T
    torch.testing.assert_close(task.predictor()(images), expected, rtol=0, atol=1e-5)
    lowered = build(tiny_clip_dir, freeze_image_blocks=1)
    hidden = lowered.network.lower(images)
    torch.testing.assert_close(lowered.predictor(lowered=True)(hidden), expected, rtol=0, atol=1e-5)


def test_the_zero_shot_head_follows_the_weights(tiny_clip_dir):
    task = build(tiny_clip_dir)
    images, before = pictures(3), task.predictor()(pictures(3))
    kept = task.computed()
    assert torch.equal(task.predictor()(images), before)
    with torch.no_grad():
        task.clip.model.text_projection.mul_(-1)
    task.after_step()
    torch.testing.assert_close(task.predictor()(images), -before, rtol=0, atol=1e-4)
    task.weights_changed(kept)
    assert torch.equal(task.predictor()(images), before), "a head that is handed back is not computed again"


@pytest.mark.parametrize("frozen", [True, False])
def test_the_zero_shot_head_is_made_once_per_change_of_the_text_tower(tiny_clip_dir, monkeypatch, frozen):
    made = []
    monkeypatch.setattr(clip_task, "zero_shot_head", lambda *args: (made.append(1), zero_shot_head(*args))[1])
    task, images = build(tiny_clip_dir), pictures(3)
    for _ in range(3):
        with torch.no_grad():
            task.clip.model.visual.conv1.weight.mul_(1.01)
            task.clip.model.logit_scale.add_(0.01)
            if not frozen:
                task.clip.model.positional_embedding.mul_(1.01)
        task.after_step()
        logits = task.predictor()(images)
    assert len(made) == (1 if frozen else 3)
    head_KD = zero_shot_head(task.clip, task.dataset.class_names, task.dataset.templates)
    with torch.no_grad():
        expected = task.clip.model.logit_scale.exp() * task.clip.model.encode_image(images, normalize=True) @ head_KD.T
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_precision_of_the_image_tower(tiny_clip_dir):
    task, images = build(tiny_clip_dir, data=dataset(("cat", "dog"), ())), pictures(3)
    exact = task.predictor()(images)
    low = task.predictor(precision="bf16")(images)
    assert exact.dtype == low.dtype == torch.float32
    assert not torch.equal(exact, low)
    scale = float(task.clip.model.logit_scale.detach().exp())
    torch.testing.assert_close(low / scale, exact / scale, atol=0.05, rtol=0)  # bf16 has 8 bits, cosines are below 1


def test_logit_scale_stays_within_clips_bound(tiny_clip_dir):
    task = build(tiny_clip_dir)
    with torch.no_grad():
        task.clip.model.logit_scale.fill_(9.0)
    task.after_step()
    assert float(task.clip.model.logit_scale.detach()) == pytest.approx(MAX_LOGIT_SCALE)
    assert task.log_row() == {"logit_scale": pytest.approx(100.0)}


def test_phases_train_what_they_say(tiny_clip_dir):
    task = build(tiny_clip_dir, method="lp-ft", freeze_image_blocks=1)

    def trained():
        return {name for name, parameter in task.network.named_parameters() if parameter.requires_grad}

    task.begin_phase(only_head=True)
    assert trained() == {"head.weight", "head.bias"}
    task.begin_phase(only_head=False)
    assert "clip.visual.proj" in trained()
    assert not any("resblocks.0" in name and "visual" in name for name in trained())


def test_the_linear_head_starts_as_the_zero_shot_classifier(tiny_clip_dir):
    linear, zero_shot, images = build(tiny_clip_dir, method="ce-linear"), build(tiny_clip_dir), pictures(4)
    torch.testing.assert_close(linear.predictor()(images), zero_shot.predictor()(images), rtol=0, atol=1e-4)
    assert isinstance(linear, LinearClipTask)
    assert type(zero_shot) is ClipTask


@pytest.mark.parametrize("method", ["flyp", "ce-linear"])
def test_a_saved_task_loads_with_the_same_logits_and_the_same_start(tiny_clip_dir, tmp_path, method):
    task, images = build(tiny_clip_dir, method=method), pictures(4)
    start = task.initial_state()
    assert start.keys() == task.network.state_dict().keys()
    assert all(torch.equal(value, task.network.state_dict()[name]) for name, value in start.items())
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.add_(0.01)
    task.weights_changed()
    task.save(tmp_path / "model", tmp_path)
    assert all((tmp_path / name).is_file() for name in task.files)
    again = build(tiny_clip_dir, run=tmp_path, method=method)
    assert torch.equal(again.predictor()(images), task.predictor()(images))
    later = again.initial_state()
    assert all(torch.equal(later[name], value) for name, value in start.items()), "what training started from, not what it made"


def test_a_head_that_does_not_fit_is_refused(tiny_clip_dir, tmp_path):
    task = build(tiny_clip_dir, method="ce-linear")
    task.save(tmp_path / "model", tmp_path)
    with pytest.raises(RunError, match="has 3 classes, but the dataset has 2"):
        build(tiny_clip_dir, run=tmp_path, data=dataset(("cat", "dog"), ()), method="ce-linear")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / HEAD)
    del tensors["initial_bias"]
    save_file(tensors, tmp_path / HEAD)
    with pytest.raises(RunError, match=r"has no tensor 'initial_bias'.*train again"):
        build(tiny_clip_dir, run=tmp_path, method="ce-linear")


def test_random_weights_are_no_start_to_average_with(tiny_clip_dir):
    task = ClipTask(
        build(tiny_clip_dir).clip,
        build(tiny_clip_dir).network,
        dataset(),
        Config(model=ModelConfig(name="x", pretrained="random")),
    )
    with pytest.raises(ConfigError, match=r"model\.pretrained = random.*nothing to average with"):
        task.initial_state()


def test_every_image_block_is_frozen_where_none_is_trained(tiny_clip_dir):
    for options, expected in (
        ({"freeze_image": True}, 2),
        ({"method": "linear-probe"}, 2),
        ({"freeze_image_blocks": 1}, 1),
        ({}, 0),
    ):
        assert build(tiny_clip_dir, **options).network.num_frozen == expected
    assert isinstance(build(tiny_clip_dir, method="linear-probe").network.head, nn.Linear)
