"""Evidence on edits equals what open_clip's own functions give, image by image."""

import pytest
import torch
from PIL import Image

from flyp_saflex.clip.zero_shot import zero_shot_head
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.tables import EVIDENCE
from flyp_saflex.tasks.clip_evidence import edit_evidence, instruction_groups
from flyp_saflex.training.setup import prepare


@pytest.fixture
def setup(make_config, edits):
    return prepare(make_config("augment.upstream=cache"))


def test_zero_shot_evidence_is_open_clips(setup):
    clip, dataset = setup.task.clip, setup.dataset
    found = edit_evidence(clip, ["zero-shot"], dataset, setup.edits, setup.loader())["zero-shot"]
    head = zero_shot_head(clip, dataset.class_names, dataset.templates)
    for row, edit in zip(found, setup.edits, strict=True):
        with torch.no_grad(), Image.open(edit.path) as image:
            feature = clip.model.encode_image(clip.preprocess(image.convert("RGB"))[None], normalize=True)[0]
            expected = (clip.model.logit_scale.exp() * feature @ head.T).log_softmax(dim=0)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_every_kind_scores_every_class_and_processes_share_the_images(setup, monkeypatch):
    dataset, kinds = setup.dataset, list(EVIDENCE)
    whole = edit_evidence(setup.task.clip, kinds, dataset, setup.edits, setup.loader())
    assert all(scores.shape == (24, 3) and scores.isfinite().all() for scores in whole.values())
    parts = []

    def gather(values):  # the second call sees what both processes put in
        parts.extend(values)
        return parts if len(parts) == 2 else values

    monkeypatch.setattr("flyp_saflex.tasks.clip_evidence.gather_object", gather)
    with pytest.raises((RuntimeError, IndexError)):  # half of the images alone is not enough
        edit_evidence(setup.task.clip, kinds, dataset, setup.edits, setup.loader(), rank=0, num_processes=2)
    shared = edit_evidence(setup.task.clip, kinds, dataset, setup.edits, setup.loader(), rank=1, num_processes=2)
    for kind in kinds:
        torch.testing.assert_close(shared[kind], whole[kind], rtol=1e-4, atol=1e-4)


def test_an_unreadable_edit_says_nothing_and_the_others_do(setup):
    setup.edits[3].path.write_bytes(b"no image")
    loader = ImageLoader(setup.source, batch_size=5, max_unreadable=1.0)
    for scores in edit_evidence(setup.task.clip, list(EVIDENCE), setup.dataset, setup.edits, loader).values():
        assert not scores[3].isfinite().any()
        assert scores[[0, 1, 2, 4, 5]].isfinite().all()


def test_instructions_are_grouped_without_the_class_name(setup):
    from dataclasses import replace

    names = setup.dataset.class_names
    texts = ["put the {} in snow", "put the {} in fog", "put the {} in snow"]
    edits = [replace(edit, instruction=text.format(names[edit.label])) for edit, text in zip(setup.edits, texts, strict=False)]
    assert instruction_groups(edits, names).tolist() == [0, 1, 0]
