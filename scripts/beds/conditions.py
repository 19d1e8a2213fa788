"""Six conditions of camera-trap photographs, as image operations with a severity in 0..1; a test set and edits made with them.

Severity 0 changes nothing, and more of it takes the picture farther away: what is random (grain, direction, leaves, window) comes
from the generator in the same way at every severity. Shapes: H height, W width in pixels; images are RGB.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from photographs import edit_of
from PIL import Image, ImageDraw, ImageFilter

from flyp_saflex.demo.corruption import write_entry
from flyp_saflex.errors import DataError
from flyp_saflex.images.decode import read_image
from flyp_saflex.records import Dataset, Sample
from flyp_saflex.storage.augment_cache import AugmentCache
from flyp_saflex.storage.files import atomic_write
from flyp_saflex.training.sampling import derived_seed

Pixels = NDArray[np.float32]

GREY = np.array([0.45, 0.35, 0.2], dtype=np.float32)
"""Parts of red, green and blue in a picture without colours, in an infrared camera's order."""
MIST = np.array([196.0, 202.0, 206.0], dtype=np.float32)
NUM_LEAVES = 90


def night(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Infrared flash at night: no colours, a bright middle and dark corners, grain."""
    pixels = _pixels(image)
    grain = generator.standard_normal(pixels.shape[:2], dtype=np.float32)
    middle = generator.uniform(-0.2, 0.2, size=2)
    rows, columns = _grid(pixels, middle)
    flash = np.clip(1.0 - 0.75 * (rows**2 + columns**2), 0.05, None)
    grey = 255 * (pixels @ GREY / 255) ** 1.8 * flash
    pixels += min(1.0, 2 * severity) * ((pixels @ GREY)[:, :, None] - pixels)
    pixels += severity * (grey[:, :, None] - pixels)
    return _image(pixels + 40 * severity * grain[:, :, None])


def fog(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Mist in banks, thicker towards the top of the picture, where things are farther away."""
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    banks = _smooth_noise(generator, height, width, cells=4)
    depth = np.linspace(1.25, 0.75, height, dtype=np.float32)[:, None]
    clear = np.exp(-2.9 * severity * depth * np.clip(1 + 0.35 * banks, 0.3, None))[:, :, None]
    return _image(pixels * clear + MIST * (1 - clear))


def motion_blur(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Blur along a line in any direction, up to a quarter of the shorter side long."""
    angle = generator.uniform(0, math.pi)
    reach = 0.125 * severity * min(image.size)
    offsets = np.linspace(-reach, reach, 2 * math.ceil(reach) + 1)
    shifts = sorted({(round(offset * math.sin(angle)), round(offset * math.cos(angle))) for offset in offsets})
    margin = math.ceil(reach)
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    moved = (padded[margin + y : margin + y + height, margin + x : margin + x + width] for y, x in shifts)
    return _image(sum(moved, start=np.zeros_like(pixels)) / len(shifts))


def low_resolution(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Fewer pixels, down to a tenth of each side, and a JPEG of them that a modem could send; nothing is random."""
    if severity == 0:
        return image.copy()
    small = image.resize([max(1, round(side / (1 + 9 * severity))) for side in image.size], Image.Resampling.BOX)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=round(90 - 75 * severity))
    return Image.open(buffer).convert("RGB").resize(image.size, Image.Resampling.BILINEAR)


def foliage(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Leaves and blades close to the lens, out of focus, up to half of the picture."""
    width, height = image.size
    side = min(image.size)
    leaves, mask = image.copy(), Image.new("L", image.size)
    paint, cover = ImageDraw.Draw(leaves), ImageDraw.Draw(mask)
    tint = generator.uniform(0.7, 1.2)
    for number in range(NUM_LEAVES):
        x, y = generator.uniform(0, width), height * generator.beta(1.4, 1.0)
        length, slim = side * generator.uniform(0.1, 0.26), generator.uniform(0.12, 0.3)
        turn, light = generator.normal(0, 0.7), tint * generator.uniform(0.5, 1.1)
        if number < round(severity * NUM_LEAVES):
            outline = _leaf(x, y, length, slim, turn)
            paint.polygon(outline, fill=(int(62 * light), int(92 * light), int(38 * light)))
            cover.polygon(outline, fill=255)
    blur = ImageFilter.GaussianBlur(side / 110)
    return Image.composite(leaves.filter(blur), image, mask.filter(blur)) if severity else image.copy()


def tight_crop(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """A window somewhere in the picture, down to a fifth of each side: the animal is too close, half gone, or gone."""
    at_x, at_y = generator.random(2)
    part = 1 - 0.8 * severity
    width, height = (side * part for side in image.size)
    left, top = at_x * (image.width - width), at_y * (image.height - height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]
FAMILIES: dict[str, Operation] = {
    "night": night,
    "fog": fog,
    "motion-blur": motion_blur,
    "low-resolution": low_resolution,
    "foliage": foliage,
    "tight-crop": tight_crop,
}
INSTRUCTIONS = {
    "night": "make it an infrared photo at night",
    "fog": "add fog",
    "motion-blur": "blur it as if the camera had moved",
    "low-resolution": "make it a low resolution photo",
    "foliage": "add leaves in front of the {}",
    "tight-crop": "show a part of the {} from nearby",
}
TEST_SEVERITY, EDIT_SEVERITY = (0.75, 1.0), (0.2, 0.6)
EDITS_PER_PHOTO = 4


def write_test_domain(photos: Sequence[Sample], folder: Path) -> int:
    """Write every photograph under every condition as `folder/<class>/<name>-<condition>.jpg`; return how many there are.

    What is there is left alone. Severities are drawn from the photograph's id, so the test set is the same for every seed.

    Args:
        photos: held-out ones, with `sample_id` = `<domain>/<class>/<name>`.
        folder: the domain's, for `data.test_domains`.

    Raises:
        DataError: the folder holds other pictures, which could show photographs that are trained on.
    """
    wanted: dict[Path, tuple[Sample, str]] = {}
    for photo in photos:
        name = Path(photo.sample_id)
        wanted |= {folder / name.parts[1] / f"{name.stem}-{family}.jpg": (photo, family) for family in FAMILIES}
    there = set(folder.rglob("*.jpg"))
    if other := sorted(there - wanted.keys()):
        raise DataError(
            f"{folder} holds {len(other)} pictures that are not of these held-out photographs (first: {other[0].name}); "
            "the photographs or the recipe's split have changed: remove the folder, or give another --out"
        )
    for path, (photo, family) in wanted.items():
        if path not in there:
            generator = np.random.default_rng(derived_seed("test", photo.sample_id, family))
            image = FAMILIES[family](read_image(photo.path), generator.uniform(*TEST_SEVERITY), generator)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, "wb") as file:
                image.save(file, "JPEG", quality=90)
    return len(wanted)


def write_condition_edits(dataset: Dataset, root: Path, key: str, *, seed: int, rate: float) -> Path:
    """Write four edits of every training photograph, under four of the conditions, as the cache entry `key`.

    They are milder than the test set: severity 0.2 to 0.6 against 0.75 to 1.

    Args:
        dataset: photographs to train on.
        root: `cache.root`; see `flyp_saflex.demo.corruption` for what is where.
        key: `cache.key`.
        seed: of conditions, severities and corruption.
        rate: 0..1; what is corrupted at a rate is corrupted in the same way at every higher one.

    Returns:
        The entry's folder.
    """
    photos = sorted(dataset.train.samples, key=lambda sample: sample.sample_id)
    edits = []
    for photo in photos:
        chosen = np.random.default_rng(derived_seed(seed, photo.sample_id)).permutation(len(FAMILIES))[:EDITS_PER_PHOTO]
        for name in sorted(tuple(FAMILIES)[number] for number in chosen):
            edits.append(
                edit_of(
                    photo,
                    photos,
                    lambda image, generator, name=name: FAMILIES[name](image, generator.uniform(*EDIT_SEVERITY), generator),
                    file_name=AugmentCache.file_name(photo.sample_id, name, suffix=".jpg"),
                    instruction=INSTRUCTIONS[name].format(dataset.class_names[photo.label]),
                    domain=name,
                    seed=seed,
                    rate=rate,
                )
            )
    return write_entry(root, dataset.name, key, edits, made_by="image operation", seed=seed)


def _pixels(image: Image.Image) -> Pixels:
    return np.array(image, dtype=np.float32)


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray((pixels + 0.5).clip(0, 255).astype(np.uint8))


def _grid(pixels: Pixels, middle: NDArray[np.float64]) -> tuple[Pixels, Pixels]:
    """Return rows and columns [H, W] in -1..1, counted from `middle`."""
    height, width = pixels.shape[:2]
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    return rows - np.float32(middle[0]), columns - np.float32(middle[1])


def _smooth_noise(generator: np.random.Generator, height: int, width: int, cells: int) -> Pixels:
    """Return noise [H, W] with standard deviation about 1, `cells` blobs wide."""
    coarse = Image.fromarray(generator.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _leaf(x: float, y: float, length: float, slim: float, turn: float) -> list[tuple[float, float]]:
    """Return the outline of a leaf that grows upwards from (x, y), turned by `turn` radians."""
    along = np.linspace(0, 1, 9)
    across = slim * np.sin(np.pi * along)
    points = np.concatenate([np.stack([across, along], axis=1), np.stack([-across, along], axis=1)[::-1]]) * length
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x + a * cos + b * sin, y - b * cos + a * sin) for a, b in points.tolist()]
