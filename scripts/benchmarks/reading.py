"""Compare ways to read an image for CLIP: torchvision's, scaled decoding, and resized copies; images/s as ratios.

    python scripts/benchmarks/reading.py [--repeats 15]

Photo-like JPEGs are drawn here (amplitude falls as 1/f, less a lens' blur; edges, a gradient, sensor noise). All ways take
turns in one process, in CPU time of one thread; every ratio is of neighbours in time, shown as median [quartiles]. Errors are
against torchvision's way, at 224 px, in units of 1/255.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, features
from torch import Tensor
from torchvision import transforms

from flyp_saflex.images.augmentation import augmentation
from flyp_saflex.images.decode import read_image, read_picture
from flyp_saflex.images.picture import Picture
from flyp_saflex.images.preprocessing import Preprocessing
from flyp_saflex.images.reader import ImageReader
from flyp_saflex.images.resized_copies import ResizedImages
from flyp_saflex.images.resized_writer import materialise
from flyp_saflex.records import Sample

SIDE, COPY_PX, QUALITY = 224, 256, 90
SIZES = ((1920, 1080), (1080, 1920), (2048, 1536), (1921, 1079), (1024, 747), (640, 480))
TARGETS = {"scaled": 1.9, "resized copy": 8.0}
"""Of a 1920 x 1080 JPEG."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SETTINGS = {"size": SIDE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
TORCHVISION = transforms.Compose(
    [
        transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(SIDE),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Draw an image with a photograph's spectrum."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    lens = np.exp(-((frequency / 0.3) ** 2))
    frequency[0, 0] = np.inf
    layers = [
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * lens / frequency**1.2, s=(height, width)) for _ in range(3)
    ]
    pixels = np.stack([layers[0] / layers[0].std() + 0.4 * layer / layer.std() for layer in layers], axis=2) * 35 + 120
    y, x = np.mgrid[:height, :width]
    pixels += 50 * (x / width - 0.5)[..., None]
    for _ in range(8):
        left, top, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.03, 0.2) * height
        pixels[(x - left) ** 2 + (y - top) ** 2 < radius**2] += rng.normal(0, 30, 3)
    return Image.fromarray((pixels + rng.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8))


def take_turns(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return CPU seconds of every way, repeat by repeat."""
    for call in ways.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            started = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - started)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> tuple[float, str]:
    """Return how many times as many images per second, and the same with its spread."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def error(found: Tensor, expected: Tensor) -> str:
    """Return PSNR, mean and largest difference of two normalised images."""
    difference = (found - expected).double() * torch.tensor(STD)[:, None, None] * 255
    mse = float(difference.square().mean())
    psnr = 10 * np.log10(255**2 / mse) if mse else np.inf
    return f"{psnr:.1f} dB | {float(difference.abs().mean()):.2f} | {float(difference.abs().max()):.0f}"


def shares(parts: dict[str, list[float]]) -> str:
    """Return the part of the time that each step takes."""
    medians = {name: statistics.median(seconds) for name, seconds in parts.items()}
    return ", ".join(f"{name} {seconds / sum(medians.values()):.0%}" for name, seconds in medians.items())


def compare(size: tuple[int, int], folder: Path, repeats: int) -> dict[str, float]:
    """Print the rows of one size and return its ratios."""
    width, height = size
    path = folder / f"{width}x{height}.jpg"
    photo(width, height, seed=sum(size)).save(path, quality=QUALITY)
    sample = Sample(sample_id=path.name, item=path, label=0)
    copies = folder / f"copies-{width}x{height}"
    materialise([sample], copies, dataset="benchmark", shorter_side_px=COPY_PX)
    scaled = ImageReader(TORCHVISION, SETTINGS, scaled=True)
    resized = ImageReader(TORCHVISION, SETTINGS, resized=ResizedImages.open(copies, [sample], box_crop=False, image_size_px=SIDE))
    crop = augmentation("random-crop", SIDE)
    usual = Preprocessing.of(SETTINGS)
    assert usual is not None

    def torchvisions() -> Tensor:
        with Image.open(path) as image:
            return TORCHVISION(image.convert("RGB"))

    ways = {
        "torchvision": torchvisions,
        "exact": lambda: usual(read_picture(path)),
        "scaled": lambda: scaled.tensor(scaled.picture(path)),
        "resized copy": lambda: resized.tensor(resized.picture(path)),
    }
    with_crop = {
        "torchvision": lambda: TORCHVISION(crop(read_image(path), 0)),
        "exact": lambda: usual(crop.on(read_picture(path), 0)),
        "scaled": lambda: scaled.tensor(crop.on(scaled.picture(path), 0)),
        "resized copy": lambda: resized.tensor(crop.on(resized.picture(path), 0)),
    }
    found = {}
    for title, calls in (("", ways), (" + random-crop", with_crop)):
        expected = calls["torchvision"]()
        seconds = take_turns(calls, repeats)
        for name in list(calls)[1:]:
            middle, shown = ratio(seconds["torchvision"], seconds[name])
            print(f"| {width} x {height}{title} | {name} | {shown} | {error(calls[name](), expected)} |", flush=True)
            if not title:
                found[name] = middle
    picture = scaled.picture(path)
    square = Picture.of(usual.square(picture))
    whole = read_image(path)
    resize_and_crop = transforms.Compose(TORCHVISION.transforms[:2])
    steps = {
        "torchvision": {
            "decode": lambda: read_image(path),
            "resize": lambda: resize_and_crop(whole),
            "to tensor": lambda: transforms.Compose(TORCHVISION.transforms[2:])(square.pixels),
        },
        "scaled": {
            "decode": lambda: scaled.picture(path),
            "resize": lambda: usual.square(picture),
            "to tensor": lambda: usual(square),
        },
    }
    for name, parts in steps.items():
        print(f"<!-- {width} x {height}, {name}: {shares(take_turns(parts, repeats))} -->")
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="repetitions of every way (default: 15)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    turbo = f"libjpeg-turbo {features.version('libjpeg_turbo')}" if features.check_feature("libjpeg_turbo") else "libjpeg"
    print(
        f"{platform.processor() or platform.machine()}, one thread; Pillow {PIL.__version__} with {turbo}, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}; JPEG quality {QUALITY}, {repeats} repetitions\n"
    )
    print("| JPEG | way | images/s, ratio to torchvision | PSNR | mean | max |\n|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        found = {size: compare(size, Path(folder), repeats) for size in SIZES}
    print()
    for name, target in TARGETS.items():
        reached = found[1920, 1080][name]
        print(f"{name}, 1920 x 1080: {reached:.2f}, target {target}: {'met' if reached >= target else 'MISSED'}")


if __name__ == "__main__":
    main()
