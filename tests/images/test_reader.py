"""Scaled decoding is the exact one within a bound, for every kind of JPEG; everything else is exact."""

from __future__ import annotations

import io
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from flyp_saflex.config import DataConfig
from flyp_saflex.errors import DataError
from flyp_saflex.images import decode
from flyp_saflex.images.augmentation import OPERATIONS, augmentation
from flyp_saflex.images.decode import read_image, read_picture
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.images.reader import ImageReader, open_reader
from flyp_saflex.records import Sample
from flyp_saflex.training.batches import BatchReader
from flyp_saflex.training.sampling import Plan

SIDE = 48
SETTINGS = {"size": SIDE, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "interpolation": "bicubic", "resize_mode": "shortest"}
TRANSFORM = image_transform_v2(PreprocessCfg(**SETTINGS), is_train=False)


@cache
def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw what has a photograph's spectrum (amplitude falls as 1/f, less a lens' blur), edges, a gradient, sensor noise."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    lens = np.exp(-((frequency / 0.3) ** 2))
    frequency[0, 0] = np.inf
    spectrum = lens / frequency**1.2
    layers = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * spectrum, s=(height, width)) for _ in range(3)]
    pixels = np.stack([layers[0] / layers[0].std() + 0.4 * layer / layer.std() for layer in layers], axis=2) * 35 + 120
    y, x = np.mgrid[:height, :width]
    pixels += 50 * (x / width - 0.5)[..., None]
    for _ in range(5):
        left, top, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.05, 0.2) * height
        pixels[(x - left) ** 2 + (y - top) ** 2 < radius**2] += rng.normal(0, 30, 3)
    return Image.fromarray((pixels + rng.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8))


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, "JPEG", **({"quality": 92} | options))
    return path


def exact(path: Path, box=None) -> torch.Tensor:
    return TRANSFORM(read_image(path, box=box))


def agree(a: torch.Tensor, b: torch.Tensor, psnr: float = 50.0) -> bool:
    """Whether two images in 0..1 differ by at most 1/255 on average, and by no more than the given PSNR."""
    error = (a - b).double()
    return float(error.abs().mean()) <= 1 / 255 and float(error.square().mean()) <= 10 ** (-psnr / 10)


def scaled() -> ImageReader:
    return ImageReader(TRANSFORM, SETTINGS, scaled=True)


def reduced(path: Path, box=None) -> bool:
    return not scaled().picture(path, box=box).whole


@pytest.mark.parametrize("size", [(257, 217), (217, 257), (223, 223), (321, 217), (1001, 541), (541, 777), (256, 216)])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True, "quality": 80}])
def test_odd_sizes_agree_with_exact_decoding(tmp_path, size, options):
    path = save(tmp_path / "a.jpg", photo(*size), **options)
    assert reduced(path)
    reader = scaled()
    assert agree(reader.tensor(reader.picture(path)), exact(path))


def test_real_photographs_that_are_sharp_to_the_last_pixel_agree_on_average(tmp_path):
    """Detail at the finest scale of the file is where a smaller decoding differs: at half the size 47 dB, not 50."""
    from sklearn.datasets import load_sample_images

    for number, pixels in enumerate(load_sample_images().images):
        image = Image.fromarray(pixels)
        for size, psnr in ((image.size, 50), ((217, 325), (46, 48)[number])):
            path = save(tmp_path / "a.jpg", image.resize(size, Image.Resampling.LANCZOS))
            assert reduced(path)
            reader = scaled()
            assert agree(reader.tensor(reader.picture(path)), exact(path), psnr=psnr)


def test_the_size_alone_would_not_do(tmp_path):
    """The bound tells the exact source box from resizing whatever was decoded."""
    path = save(tmp_path / "a.jpg", photo(1001, 541))
    assert not agree(TRANSFORM(scaled().picture(path).pixels), exact(path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_flags_and_boxes_are_followed(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.jpg", photo(541, 423), exif=exif)
    reader = scaled()
    for box in (None, (31, 17, 301, 225), (100.4, 150.6, 250.2, 400)):
        assert reduced(path, box)
        picture = reader.picture(path, box=box)
        assert picture.size == read_image(path, box=box).size
        assert agree(reader.tensor(picture), exact(path, box))
    assert not reduced(path, (31, 17, 150, 150)), "a small box is decoded whole"
    assert agree(reader.tensor(reader.picture(path, box=(31, 17, 150, 150))), exact(path, (31, 17, 150, 150)))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk(tmp_path, mode):
    path = save(tmp_path / "a.jpg", photo(331, 251).convert(mode))
    assert reduced(path)
    reader = scaled()
    assert agree(reader.tensor(reader.picture(path)), exact(path))


def test_smaller_images_and_other_formats_are_decoded_whole(tmp_path):
    photo(401, 301).save(tmp_path / "a.png")
    save(tmp_path / "b.jpg", photo(300, int(4.5 * SIDE) - 1))
    save(tmp_path / "c.jpg", photo(30, 20))
    for name in ("a.png", "b.jpg", "c.jpg"):
        picture = scaled().picture(tmp_path / name)
        assert np.array_equal(picture.image(), read_image(tmp_path / name))
        assert torch.equal(scaled().tensor(picture), exact(tmp_path / name)), "to the last bit"
    assert reduced(save(tmp_path / "d.jpg", photo(300, int(4.5 * SIDE)))), "one row more, and half is enough"


def test_as_small_as_is_allowed_and_never_smaller(tmp_path):
    path = save(tmp_path / "a.jpg", photo(807, 805))
    for at_least, width in ((403, 807), (402, 404), (162, 404), (161, 202), (1, 202), (None, 807)):
        assert read_picture(path, at_least_px=at_least).pixels.width == width


def test_exact_decoding_is_the_models_transform_to_the_last_bit(tmp_path):
    path = save(tmp_path / "a.jpg", photo(401, 301))
    odd = SETTINGS | {"resize_mode": "longest"}
    for reader in (ImageReader(TRANSFORM), ImageReader(TRANSFORM, SETTINGS), ImageReader(TRANSFORM, odd, scaled=True)):
        assert not reader.scaled
        assert torch.equal(reader.tensor(reader.picture(path)), exact(path))
    for decoding in ("exact", "scaled"):
        reader = open_reader(DataConfig(decoding=decoding), TRANSFORM, SETTINGS, [])
        assert reader.scaled == (decoding == "scaled")


@pytest.mark.parametrize("size", [(401, 301), (301, 401), (1001, 541)])
def test_random_operations_draw_the_same_from_a_smaller_decoding(tmp_path, size):
    path = save(tmp_path / "a.jpg", photo(*size))
    reader = scaled()
    for names in (["random-crop"], ["flip"], ["flip", "random-crop"], ["random-crop", "flip"]):
        operations = [augmentation(name, SIDE) for name in names]
        for seed in range(6):
            small, image = reader.picture(path), read_image(path)
            assert not small.whole
            for operation in operations:
                small, image = operation.on(small, seed), operation(image, seed)
            assert agree(reader.tensor(small), TRANSFORM(image)), (names, seed)


def test_policies_see_the_image_at_the_models_size(tmp_path):
    """They are not continuous (a threshold may fall to the other side), so what they are given is compared."""
    path = save(tmp_path / "a.jpg", photo(401, 301))
    seen: list[Image.Image] = []
    operation = augmentation("randaugment", SIDE)
    operation._policy = lambda image: (seen.append(image), image)[1]
    operation.on(scaled().picture(path), 0)
    operation(read_image(path), 0)
    small, whole = (transforms.functional.to_tensor(image) for image in seen)
    assert small.shape == whole.shape == (3, SIDE, 63)
    assert agree(small, whole)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [(60, 40), (41, 90), (30, 20)])
def test_operations_on_whole_images_are_torchvisions(name, size):
    bicubic, rng = transforms.InterpolationMode.BICUBIC, torch.random.get_rng_state()
    theirs = {
        "randaugment": transforms.RandAugment(),
        "autoaugment": transforms.AutoAugment(),
        "autoaugment-cifar10": transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
        "autoaugment-svhn": transforms.AutoAugment(transforms.AutoAugmentPolicy.SVHN),
        "augmix": transforms.AugMix(),
        "trivialaugment": transforms.TrivialAugmentWide(),
        "random-crop": transforms.RandomResizedCrop(32, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), interpolation=bicubic),
        "flip": transforms.RandomHorizontalFlip(),
    }[name]
    image = photo(*size)
    start = image
    if name not in ("random-crop", "flip") and min(size) > 32:
        start = transforms.Resize(32, interpolation=bicubic)(image)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = theirs(start)
        assert np.array_equal(augmentation(name, 32)(image, seed), expected)
    torch.random.set_rng_state(rng)


def test_broken_files_fail_alike(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    photo(401, 301).save(buffer, "JPEG", quality=80)
    data, outcomes = buffer.getvalue(), set()
    for end in (*range(0, len(data), len(data) // 60), *range(len(data) - 40, len(data) + 1)):
        path = tmp_path / f"{end}.jpg"
        path.write_bytes(data[:end])
        found = []
        for reader in (scaled(), ImageReader(TRANSFORM)):
            try:
                found.append(reader.picture(path).size)
            except DataError as error:
                found.append(str(error))
        assert found[0] == found[1], end
        outcomes.add(isinstance(found[0], str))
    assert outcomes == {True, False}
    whole = save(tmp_path / "a.jpg", photo(401, 301))
    with pytest.raises(DataError, match="lies outside of its 401 x 301 pixels"):
        scaled().picture(whole, box=(500, 500, 5, 5))
    monkeypatch.setattr(decode, "MAX_PIXELS", 100_000)
    with pytest.raises(DataError, match="too large: 401 x 301 pixels, at most 100000"):
        scaled().picture(whole)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    paths = [save(tmp_path / f"{n}.jpg", photo(261 + n, 241 + 3 * n, seed=n)) for n in range(8)]
    paths[3].write_bytes(b"no image")
    return [Sample(sample_id=path.name, item=path, label=0, box=(10, 10, 230, 225)) for path in paths]


@pytest.mark.parametrize("box_crop", [False, True])
def test_workers_change_nothing(samples, box_crop):
    """Loader of batches in order, and reader of training batches with random operations."""
    reader = pickle.loads(pickle.dumps(scaled()))  # as a worker that is not forked gets it
    loaded, batches = [], []
    plan = Plan(seed=1, train=samples, edits=None, batch_size=4, num_augmented=3)
    for workers in (0, 2):
        loader = ImageLoader(reader, batch_size=3, workers=workers, max_unreadable=0.2, box_crop=box_crop)
        loaded.append([*loader.batches(samples), [path for path, _ in loader.unreadable]])
        steps = BatchReader(
            plan.step,
            4,
            samples,
            None,
            reader,
            on_train=[augmentation("random-crop", SIDE)],
            on_augmented=[augmentation("flip", SIDE), augmentation("randaugment", SIDE)],
            box_crop=box_crop,
        )
        batches.append(list(DataLoader(steps, batch_size=None, num_workers=workers, generator=torch.Generator())))
    (*first, unreadable), (*second, unreadable_too) = loaded
    assert unreadable == unreadable_too == [str(samples[3].path)]
    assert [positions for positions, _ in first] == [positions for positions, _ in second] == [[0, 1, 2], [4, 5], [6, 7]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.indices, b.indices)
        assert (a.rows, a.unreadable) == (b.rows, b.unreadable)
    image = exact(samples[0].path, samples[0].box if box_crop else None)
    assert agree(first[0][1][0], image)
