"""Resized copies: right pixels, small images untouched, changes noticed, and kills at any moment leave no trace."""

from __future__ import annotations

import io
import os
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flyp_saflex.errors import DataError
from flyp_saflex.images import resized_writer
from flyp_saflex.images.augmentation import augmentation
from flyp_saflex.images.decode import read_image
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.images.preprocessing import Preprocessing
from flyp_saflex.images.reader import ImageReader
from flyp_saflex.images.resized_copies import ResizedImages, read_index
from flyp_saflex.images.resized_writer import materialise
from flyp_saflex.records import Sample

SIDE, PX = 32, 40
SETTINGS = {"size": SIDE, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "interpolation": "bicubic", "resize_mode": "shortest"}


def smooth(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Large and small, lying and standing, turned by a flag, grey, CMYK, with transparency, broken; in two folders."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(201, 133, 0).save(root / "a.jpg", quality=92)
    smooth(91, 173, 1).save(root / "sub" / "a.jpg", quality=92)
    smooth(151, 99, 2).save(root / "turned.jpg", quality=92, exif=exif)
    smooth(45, 38, 3).save(root / "small.jpg", quality=92)
    smooth(37, 61, 4).save(root / "small_turned.jpg", quality=92, exif=exif)
    smooth(120, 90, 5).convert("L").save(root / "grey.jpg", quality=92)
    smooth(120, 91, 6).convert("CMYK").save(root / "cmyk.jpg", quality=92)
    rgba = smooth(101, 77, 7).convert("RGBA")
    rgba.putalpha(128)
    rgba.save(root / "rgba.png")
    (root / "broken.jpg").write_bytes(b"no image")
    names = (
        "a.jpg",
        "sub/a.jpg",
        "turned.jpg",
        "small.jpg",
        "small_turned.jpg",
        "grey.jpg",
        "cmyk.jpg",
        "rgba.png",
        "broken.jpg",
    )
    return [Sample(sample_id=name, item=root / name, label=0, box=(11, 9, 70, 51)) for name in names]


def make(samples, folder, **options):
    return materialise(samples, folder, **({"dataset": "d", "shorter_side_px": PX} | options))


def open_copies(samples, folder, **options) -> ResizedImages:
    return ResizedImages.open(folder, samples, **({"box_crop": False, "image_size_px": SIDE} | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def agree(found: Image.Image, expected: Image.Image) -> bool:
    """Whether smooth pictures differ by JPEG's loss only; a shift by half a pixel of the copy gives 3 on average."""
    return float(abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float)).mean()) < 1.5


@pytest.mark.parametrize("box_crop", [False, True])
def test_copies_stand_for_their_images(samples, tmp_path, box_crop):
    made = make(samples, tmp_path / "copies", box_crop=box_crop)
    assert [Path(path).name for path, _ in made.unreadable] == ["broken.jpg"]
    assert (made.resized, made.copied) == ((8, 0) if box_crop else (6, 2))
    copies = open_copies(samples, tmp_path / "copies", box_crop=box_crop)
    assert (copies.found, copies.missing, copies.changed) == (8, 1, 0)
    square, crop = Preprocessing.of(SETTINGS).square, augmentation("random-crop", SIDE)
    for sample in samples[:-1]:
        box = sample.box if box_crop else None
        image, picture = read_image(sample.path, box=box), copies.picture(sample.path, box)
        assert picture.size == image.size
        assert picture.pixels.mode == "RGB"
        assert min(picture.pixels.size) == min(PX, *image.size)
        whole = ImageReader(lambda pixels: pixels, SETTINGS, scaled=True).picture(sample.path, box=box)
        assert agree(square(picture), square(whole)), sample.sample_id
        for seed in range(3):
            assert agree(crop.on(picture, seed).image(), crop(image, seed)), "the same crops are drawn"
        if not box_crop and sample.sample_id.startswith("small"):
            assert np.array_equal(picture.image(), image), "small images do not change"
    assert copies.picture(samples[-1].path, samples[-1].box if box_crop else None) is None


def test_small_files_are_stored_byte_for_byte(samples, tmp_path):
    make(samples, tmp_path / "copies")
    rows = {row.id: row for row in read_index(tmp_path / "copies")}
    shard = (tmp_path / "copies" / "shard-00000.bin").read_bytes()
    for sample in samples[3:5]:
        row = rows[sample.sample_id]
        assert shard[row.offset : row.offset + row.length] == sample.path.read_bytes()
    assert sum(row.length for row in rows.values()) == len(shard)
    for row in rows.values():
        with Image.open(io.BytesIO(shard[row.offset : row.offset + row.length])) as stored:
            assert min(stored.size) <= PX


def test_copies_with_boxes_and_without_stand_side_by_side(samples, tmp_path):
    make(samples, tmp_path / "copies")
    assert open_copies(samples, tmp_path / "copies", box_crop=True).missing == 9
    make(samples, tmp_path / "copies", box_crop=True)
    assert open_copies(samples, tmp_path / "copies", box_crop=True).found == 8
    plain = open_copies(samples, tmp_path / "copies")
    assert plain.found == 8
    assert plain.picture(samples[0].path, samples[0].box) is None, "an image that was not cut does not stand for one that is"


def test_the_second_time_nothing_is_done(samples, tmp_path):
    make(samples, tmp_path / "copies")
    before = contents(tmp_path / "copies")
    made = make([*samples, samples[0]], tmp_path / "copies")
    assert (made.kept, made.resized, made.copied, len(made.unreadable)) == (8, 0, 0, 1)
    assert contents(tmp_path / "copies") == before
    made = make(samples, tmp_path / "copies", dry_run=True)
    assert (made.kept, made.todo) == (8, 1)
    assert make(samples, tmp_path / "none", dry_run=True).todo == 9
    assert not (tmp_path / "none").exists()


def test_a_changed_source_is_noticed_and_done_again(samples, tmp_path):
    folder = tmp_path / "copies"
    make(samples, folder)
    same_size = samples[5].path.stat().st_size
    smooth(120, 90, 9).convert("L").save(samples[5].path, quality=92)
    if samples[5].path.stat().st_size == same_size:
        os.utime(samples[5].path, ns=(1, 1))
    status = samples[0].path.stat()
    os.utime(samples[0].path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))  # touched, not changed
    stale = open_copies(samples, folder)
    assert (stale.found, stale.missing, stale.changed) == (6, 1, 2)
    assert "1 have no copy and 2 changed since" in stale.note()
    assert stale.picture(samples[5].path, None) is None
    size = (folder / "shard-00000.bin").stat().st_size
    made = make(samples, folder)
    assert (made.kept, made.resized, made.copied) == (7, 1, 0), "what was only touched is not written again"
    assert (folder / "shard-00000.bin").stat().st_size == size + made.stored_bytes
    fresh = open_copies(samples, folder)
    assert (fresh.found, fresh.changed) == (8, 0)
    square = Preprocessing.of(SETTINGS).square
    reader = ImageReader(lambda pixels: pixels, SETTINGS, scaled=True)
    for sample in samples[:-1]:
        assert agree(square(fresh.picture(sample.path, None)), square(reader.picture(sample.path)))


def _make_and_die(samples: list[Sample], folder: Path, writes: int) -> None:
    """Kill this process, as kill -9 does, in the `writes`-th moment at which a file is flushed or replaced."""
    left = [writes]

    def dying(original):
        def call(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        return call

    os.fsync, os.replace, os.truncate = dying(os.fsync), dying(os.replace), dying(os.truncate)
    make(samples, folder)


def test_killed_at_any_moment_and_started_again_the_files_are_the_same(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(resized_writer, "CHUNK", 2)
    monkeypatch.setattr(resized_writer, "SHARD_BYTES", 3000)
    make(samples, tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) > 4, "several shards"
    killed = 0
    for writes in range(1, 100):
        folder = tmp_path / f"killed-{writes}"
        for attempt in (writes, 2):  # and once more while it mends what the first kill left
            process = get_context("fork").Process(target=_make_and_die, args=(samples, folder, attempt))
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            killed += process.exitcode != 0
        if folder.is_dir() and (folder / "settings.json").is_file():
            copies = open_copies(samples, folder)  # what is half done can be read
            for sample in samples[:-1]:
                copies.picture(sample.path, None)
        make(samples, folder)
        assert contents(folder) == expected, writes
        if attempt and process.exitcode == 0:
            break
    assert killed >= 10
    assert process.exitcode == 0, "the last one ran to its end"


def test_half_a_row_and_bytes_without_a_row_are_cut_off(samples, tmp_path):
    folder = tmp_path / "copies"
    make(samples, folder)
    expected = contents(folder)
    (folder / "index.jsonl").write_bytes(expected["index.jsonl"][:-30])
    with open(folder / "shard-00000.bin", "ab") as file:
        file.write(b"half a copy")
    (folder / "shard-00001.bin").write_bytes(b"and a shard of which no row knows")
    assert open_copies(samples, folder).found == 7
    make(samples, folder)
    assert contents(folder) == expected


def test_what_is_damaged_is_named(samples, tmp_path):
    folder = tmp_path / "copies"
    make(samples, folder)
    shard = folder / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    copies = open_copies(samples, folder)
    with pytest.raises(DataError, match=r"shard-00000\.bin: the copy of .*a\.jpg is damaged .*materialise` again"):
        copies.picture(samples[0].path, None)
    assert copies.picture(samples[1].path, None) is not None
    shard.write_bytes(bytes(data[:500]))
    with pytest.raises(DataError, match="500 bytes, its index expects"):
        make([*samples, Sample(sample_id="new", item=samples[0].path, label=0)], folder)
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_copies(samples, folder).picture(samples[0].path, None)
    (folder / "index.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"index\.jsonl line 1: .*remove the folder"):
        open_copies(samples, folder)


def test_folders_that_do_not_fit_are_refused_in_one_line(samples, tmp_path):
    folder = tmp_path / "copies"
    nothing = open_copies(samples, folder)
    assert nothing.picture(samples[0].path, None) is None
    assert nothing.note().startswith(f"0 of 9 images are read from {folder}; of the others 9 have no copy")
    make(samples[:1], folder)
    with pytest.raises(DataError, match=r"shorter side of 40 px, the model takes 56 px: .*data\.materialised_px=64"):
        open_copies(samples, folder, image_size_px=56)
    with pytest.raises(DataError, match="made otherwise \\(shorter_side_px: 40 -> 50\\)"):
        make(samples, folder, shorter_side_px=50)
    with pytest.raises(DataError, match="made otherwise \\(dataset: d -> e\\)"):
        make(samples, folder, dataset="e")
    with resized_writer._alone(folder), pytest.raises(DataError, match="is being written by another process"):
        make(samples, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.materialised = .* cannot be written: .*choose another folder"):
        make(samples, tmp_path / "file" / "copies")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(samples, tmp_path, monkeypatch):
    make(samples, tmp_path / "undisturbed")
    monkeypatch.setattr(resized_writer, "CHUNK", 3)
    real, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; free disk space"):
        make(samples, tmp_path / "copies")
    make(samples, tmp_path / "copies")
    assert contents(tmp_path / "copies") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("scaled", [False, True])
def test_a_reader_takes_copies_where_there_are_any(samples, tmp_path, scaled):
    make(samples[:2], tmp_path / "copies")
    preprocess = lambda image: torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1) / 255  # noqa: E731
    reader = ImageReader(preprocess, SETTINGS, scaled=scaled, resized=open_copies(samples, tmp_path / "copies"))
    assert reader.notes[0].startswith(f"2 of 9 images are read from {tmp_path / 'copies'} (shorter side 40 px); of the others 7")
    assert not reader.picture(samples[0].path).whole
    assert np.array_equal(reader.picture(samples[2].path).image(), read_image(samples[2].path))
    keys = [reader.key(sample) for sample in samples]
    plain = [ImageReader(preprocess).key(sample) for sample in samples]
    assert len(set(keys)) == 9
    assert [a == b for a, b in zip(keys, plain, strict=True)] == [False] * 2 + [True] * 7
    loads = [list(ImageLoader(reader, batch_size=3, workers=workers, max_unreadable=0.2).batches(samples)) for workers in (0, 2)]
    assert [len(images) for _, images in loads[0]] == [3, 3, 2]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*loads, strict=True))
    unusual = ImageReader(preprocess, {}, scaled=scaled, resized=open_copies(samples, tmp_path / "copies"))
    assert "data.materialised has no effect" in unusual.notes[0]
    assert unusual.picture(samples[0].path).whole


def test_a_moved_dataset_keeps_its_copies(samples, tmp_path):
    make(samples, tmp_path / "copies")
    shutil.copytree(tmp_path / "images", tmp_path / "moved")  # keeps the times of change
    moved = [Sample(sample_id=s.sample_id, item=tmp_path / "moved" / s.sample_id, label=0) for s in samples]
    assert open_copies(moved, tmp_path / "copies").found == 8
