"""Stored activations are those of computing them again, survive kills and writers side by side, and follow the image."""

import multiprocessing

import pytest
import torch
from safetensors.torch import load_file

from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.evaluation.evaluate import evaluate
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.records import Sample
from flyp_saflex.storage.run_folder import RunDir
from flyp_saflex.tasks.feature_cache import FeatureCache, fingerprint
from flyp_saflex.training.setup import prepare
from flyp_saflex.training.train import train

FIXED = ("augment.on_train=[]", "augment.upstream=cache", "saflex.enabled=true", "train.steps=3")


class Counter:
    """A lower tower that flattens images, and counts them."""

    def __init__(self):
        self.rows = 0

    def __call__(self, images):
        self.rows += len(images)
        return images.flatten(1)[:, :7].clone()


def to_tensor(image):
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.fixture
def samples(tiny_images_dir):
    paths = sorted(tiny_images_dir.rglob("*.png"))
    return [Sample(sample_id=str(number), item=path, label=0) for number, path in enumerate(paths)]


def open_cache(folder):
    lower = Counter()
    return FeatureCache(folder / "v1", lower, ImageLoader(to_tensor, batch_size=5, max_unreadable=0.5)), lower


def whole(cache, samples):
    return torch.cat([rows for _, rows in cache.batches(samples)])


def direct(samples):
    return torch.cat([images.flatten(1)[:, :7] for _, images in ImageLoader(to_tensor, batch_size=5).batches(samples)])


@pytest.mark.parametrize(
    "options",
    [
        ("train.freeze_image_blocks=1",),
        ("train.freeze_image=true",),
        pytest.param(("train.method=linear-probe",), marks=pytest.mark.slow),
    ],
)
def test_a_run_with_stored_activations_equals_the_run_without(make_config, edits, tmp_path, options):
    """To 1e-6: the frozen blocks run on other groupings of rows, whose matrix products may sum in another order."""
    for name, cache in (("without", ""), ("with", str(tmp_path / "activations"))):
        train(make_config(*FIXED, *options, "train.eps=1e-3", f"train.frozen_cache={cache}"), tmp_path / name)
    for file in ("model/open_clip_model.safetensors", "head.safetensors"):
        if (tmp_path / "with" / file).is_file():
            a, b = load_file(tmp_path / "without" / file), load_file(tmp_path / "with" / file)
            for key in a:
                torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-6)
    losses = [[row["loss"] for row in RunDir(tmp_path / n, lock=False).read_rows() if "loss" in row] for n in ("without", "with")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    (folder,) = (tmp_path / "activations").iterdir()
    before = (folder / "rows.bin").stat().st_size
    rows = [evaluate(tmp_path / name)["results"] for name in ("without", "with")]
    assert [{k: v for k, v in row.items() if k != "ece"} for row in rows[0]] == [
        {k: v for k, v in row.items() if k != "ece"} for row in rows[1]
    ]
    assert [folder] == list((tmp_path / "activations").iterdir()), "evaluation uses the entry that training made"
    assert (folder / "rows.bin").stat().st_size > before, "and adds the test images to it"


def test_every_image_is_computed_once(samples, tmp_path):
    cache, lower = open_cache(tmp_path)
    assert torch.equal(whole(cache, samples), direct(samples))
    assert lower.rows == len(samples)
    again, other = open_cache(tmp_path)
    assert torch.equal(whole(again, samples[::-1]), direct(samples[::-1]))
    assert torch.equal(again.read(samples[3]), direct(samples)[3])
    assert other.rows == 0


def test_a_changed_image_gets_a_new_row(samples, tmp_path):
    cache, _ = open_cache(tmp_path)
    cache.ensure(samples)
    samples[2].path.write_bytes(samples[9].path.read_bytes())
    samples[4].path.unlink()
    from PIL import Image

    Image.new("RGB", (48, 40), (1, 2, 3)).save(samples[5].path)
    again, lower = open_cache(tmp_path)
    left = [sample for sample in samples if sample.path.exists()]
    assert torch.equal(whole(again, samples), direct(left))
    assert lower.rows == 1, "the copy of a known image has its content, and its row"
    assert list(again.unreadable) == [str(samples[4].path)]


@pytest.mark.parametrize("cut", [1, 40])
def test_what_a_killed_writer_left_is_ignored_and_overwritten(samples, tmp_path, cut):
    cache, _ = open_cache(tmp_path)
    cache.ensure(samples[:10])
    index, rows = cache.folder / "index.jsonl", cache.folder / "rows.bin"
    index.write_bytes(index.read_bytes()[:-cut])  # a line cut off
    rows.write_bytes(rows.read_bytes() + b"\1" * 13)  # and half a row that no line names
    again, lower = open_cache(tmp_path)
    assert torch.equal(whole(again, samples), direct(samples))
    assert lower.rows == len(samples) - 9
    last, lower = open_cache(tmp_path)  # what was written after the cut is whole
    assert torch.equal(whole(last, samples), direct(samples))
    assert lower.rows == 0


def _write(folder, samples):
    torch.set_num_threads(1)
    cache, _ = open_cache(folder)
    for sample in samples:  # one at a time: as many turns as there can be
        cache.ensure([sample])


def test_two_writers_at_once_do_not_corrupt_it(samples, tmp_path):
    context = multiprocessing.get_context("fork")
    orders = (samples, samples[::-1], samples[10:] + samples[:10])
    writers = [context.Process(target=_write, args=(tmp_path, order)) for order in orders]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    cache, lower = open_cache(tmp_path)
    assert torch.equal(whole(cache, samples), direct(samples))
    assert lower.rows == 0
    assert len((cache.folder / "index.jsonl").read_text().splitlines()) == len({s.path.read_bytes() for s in samples})


def test_fingerprint_follows_frozen_weights_only(make_config):
    def name(change=None, blocks=1, crop=False, scaled=False):
        task = prepare(make_config(f"train.freeze_image_blocks={blocks}")).task
        if change:
            with torch.no_grad():
                task.clip.model.get_parameter(change).add_(1)
        return fingerprint(task.clip, task.network.tower, box_crop=crop, scaled=scaled)

    same = name()
    assert same == name() == name("visual.transformer.resblocks.1.mlp.c_fc.weight") == name("text_projection")
    others = [
        name("visual.transformer.resblocks.0.mlp.c_fc.weight"),
        name("visual.conv1.weight"),
        name(blocks=2),
        name(crop=True),
        name(scaled=True),
    ]
    assert len({same, *others}) == 6


def test_random_operations_are_refused(make_config):
    with pytest.raises(ConfigError, match=r"train\.frozen_cache holds fixed activations"):
        make_config("train.frozen_cache=x", "train.freeze_image_blocks=1", "augment.on_train=flip")


def test_a_folder_that_cannot_be_written_is_named(samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"train\.frozen_cache: cannot write .*choose another folder"):
        FeatureCache(tmp_path / "file" / "v1", Counter(), ImageLoader(to_tensor, batch_size=5))
