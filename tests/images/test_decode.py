"""Reading images of every kind, and random operations that depend on image and seed only."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from flyp_saflex.errors import DataError
from flyp_saflex.images import decode
from flyp_saflex.images.augmentation import OPERATIONS, augmentation
from flyp_saflex.images.decode import read_image


def gradient(width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=2).astype(np.uint8))


def test_a_rotation_flag_is_followed(tmp_path: Path):
    image = gradient()
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        image.save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as stored:
            expected = ImageOps.exif_transpose(stored)
        assert np.array_equal(read_image(tmp_path / "a.png"), expected)


def test_a_box_is_cut_from_the_stored_image(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    gradient().save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png", box=(10, 5, 30, 20))
    expected = gradient().crop((10, 5, 40, 25)).transpose(Image.Transpose.ROTATE_270)
    assert found.size == (20, 30)
    assert np.array_equal(found, expected)
    assert read_image(tmp_path / "a.png", box=(50, 30, 500, 500)).size == (10, 10)  # cut to what is there


def test_every_mode_becomes_eight_bit_rgb(tmp_path: Path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "L.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "I16.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "F.tiff")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "I.tiff")
    for name in ("L.png", "I16.png", "F.tiff", "I.tiff"):
        found = np.asarray(read_image(tmp_path / name))
        assert found.shape == (16, 16, 3)
        assert np.array_equal(found[:, :, 0], grey), name
    gradient().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    gradient().convert("1").save(tmp_path / "1.png")
    gradient().convert("P").save(tmp_path / "P.gif")
    for name in ("cmyk.jpg", "1.png", "P.gif"):
        image = read_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (60, 40))
    difference = np.asarray(read_image(tmp_path / "cmyk.jpg"), dtype=int)[:, :, 0] - np.asarray(gradient(), dtype=int)[:, :, 0]
    assert abs(difference).mean() < 12  # lossy, but not inverted


def test_what_is_transparent_is_white(tmp_path: Path):
    half = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 2, 2))
    half.save(tmp_path / "rgba.png")
    half.convert("LA").save(tmp_path / "la.png")
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    palette.paste(1, (2, 0, 4, 2))
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("rgba.png", "la.png", "p.png"):
        assert read_image(tmp_path / name).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "p.png").getpixel((3, 1)) == (255, 0, 0)


def png(values: np.ndarray, bits: int, transparent: tuple[int, ...]) -> bytes:
    """Return a PNG of grey [H, W] or colour [H, W, 3] values with a transparent value, written by hand."""
    high, wide = values.shape[:2]
    if bits >= 8:
        rows = [row.astype(f">u{bits // 8}").tobytes() for row in values]
    else:
        spread = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[:, :, 8 - bits :].reshape(high, -1)
        rows = [np.packbits(row).tobytes() for row in spread]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", wide, high, bits, 2 if values.ndim == 3 else 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", data), chunk(b"IEND", b"")])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white_at_every_depth(bits: int, tmp_path: Path):
    top = 2**bits - 1
    values = np.linspace(0, top, 16).round().astype(np.uint16).reshape(4, 4)
    values[0, 0] = top
    for transparent in {0, int(values[1, 3]), top}:
        (tmp_path / "a.png").write_bytes(png(values, bits, (transparent,)))
        expected = np.where(values == transparent, 255, (values * (255 / top)).round())
        found = np.asarray(read_image(tmp_path / "a.png"))
        assert np.array_equal(found, np.repeat(expected[:, :, None], 3, axis=2)), transparent


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_white_at_every_depth(bits: int, tmp_path: Path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 250, size=(4, 4, 3)) * (257 if bits == 16 else 1)
    (tmp_path / "a.png").write_bytes(png(values, bits, tuple(values[1, 2])))
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert tuple(found[1, 2]) == (255, 255, 255)
    assert np.array_equal(found[0], values[0] // (257 if bits == 16 else 1))


@pytest.mark.parametrize("name", ["a.eps", "a.png", "a.jpg"])
def test_postscript_is_no_image_whatever_its_ending(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    gradient().convert("L").save(tmp_path / name, "EPS")
    with pytest.raises(DataError, match="no image format that is read here"):
        read_image(tmp_path / name)


def test_heic_says_what_to_do(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    with pytest.raises(DataError, match="it is HEIC, which Pillow does not read: convert it to JPEG"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".avif", ".jp2", ".ppm", ".webp", ".bmp", ".gif", ".tiff", ".apng"])
def test_other_endings_are_read(suffix: str, tmp_path: Path):
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".apng": "PNG"}.get(suffix)
    gradient().save(tmp_path / f"a{suffix}", format=kind)
    difference = np.abs(np.asarray(read_image(tmp_path / f"a{suffix}"), dtype=int) - np.asarray(gradient(), dtype=int))
    assert difference.mean() < 25  # GIF has 256 colours, the others lose less


@pytest.mark.parametrize("path", ["pipe.png", "/dev/zero", "folder.png", "a\0b.png"])
def test_only_regular_files_are_read(path: str, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for read in (read_image, decode.read_bytes):
        with pytest.raises(DataError, match=r"is no regular file|cannot be read"):
            read(tmp_path / path)


def test_broken_files_are_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    buffer = io.BytesIO()
    gradient().save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    buffer = io.BytesIO()
    gradient().save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[60:90] = bytes(30)
    (tmp_path / "garbled.png").write_bytes(bytes(data))
    gradient().save(tmp_path / "good.png")
    cases = {
        "cut.jpg": "(?i)truncated",
        "empty.jpg": "the file is empty",
        "text.png": "no image format",
        "garbled.png": "cannot be decoded",
        "nope.jpg": "No such",
    }
    for name, reason in cases.items():
        with pytest.raises(DataError, match=reason) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="lies outside of its 60 x 40 pixels"):
        read_image(tmp_path / "good.png", box=(100, 100, 5, 5))
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="too large: 60 x 40 pixels, at most 1000"):
        read_image(tmp_path / "good.png")


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_depend_on_image_and_seed_only(name: str):
    operation, image = augmentation(name, 32), gradient()
    first = {seed: np.asarray(operation(image, seed)) for seed in range(12)}
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    again = {seed: np.asarray(augmentation(name, 32)(image, seed)) for seed in reversed(range(12))}
    assert all(np.array_equal(first[seed], again[seed]) for seed in first)
    assert len({one.tobytes() for one in first.values()}) > 1
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    assert np.array_equal(np.asarray(operation(image, 3)), first[3])


@pytest.mark.slow  # imports torch in a second process
def test_another_process_draws_the_same():
    code = (
        "import sys, numpy as np, hashlib; from PIL import Image; from flyp_saflex.images.augmentation import *\n"
        "image = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(40, 60, 3))\n"
        "print(hashlib.sha256(b''.join(augmentation(n, 32)(image, 5).tobytes() for n in OPERATIONS)).hexdigest())"
    )
    image = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(40, 60, 3))
    here = hashlib.sha256(b"".join(augmentation(name, 32)(image, 5).tobytes() for name in OPERATIONS)).hexdigest()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == here


def test_sizes():
    image = gradient(200, 100)
    assert augmentation("random-crop", 32)(image, 0).size == (32, 32)
    assert augmentation("flip", 32)(image, 0).size == (200, 100)
    assert augmentation("randaugment", 32)(image, 0).size == (64, 32)
    assert augmentation("randaugment", 224)(image, 0).size == (200, 100)


def test_flip_flips_about_half():
    image = gradient()
    flipped = np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    count = sum(np.array_equal(augmentation("flip", 32)(image, seed), flipped) for seed in range(100))
    assert 30 < count < 70  # five standard deviations of a fair coin would be 25


def test_unknown_operation():
    with pytest.raises(DataError, match="unknown operation 'randaug'; did you mean 'randaugment'"):
        augmentation("randaug", 32)
