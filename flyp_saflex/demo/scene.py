"""Synthetic camera-trap image, rendered from a complete description of its scene.

The same scene at another place, `at(scene, "snow")`, is the ground truth of an edit that changes the background only.

Shapes: S side of the canvas in pixels, `SUPERSAMPLING` times the side of the image.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from flyp_saflex.demo.animals import PATTERNS, Part, Pose, draw
from flyp_saflex.demo.places import PLACES, Place, backdrop

SUPERSAMPLING = 2
BARE, COAT = 128, 255  # mask of an animal: parts without and with the pattern of the coat
BAR = 0.085
"""Height of the timestamp bar, as a fraction of the image."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Complete description of an image; equal scenes give equal pixels.

    Attributes:
        species: one of `animals.SPECIES`; None: no animal.
        place: one of `places.PLACES`.
        camera: number of the camera, which determines the backdrop.
        x: centre of the animal, as a fraction of the width.
        y: position of its feet, as a fraction of the height from the top.
        size: longer side of the animal, as a fraction of the side of the image.
        facing: 1: right; -1: left.
        phase: phase of the walking cycle, 0..1.
        head: height of the head, from 0 (raised) to 1 (grazing).
        tone: brightness of the coat, -1..1.
        occlusion: height of the plants in front of the animal, from 0 (none) to 1 (up to its belly).
        blur_px: radius of the Gaussian blur, in pixels of an image of 64 pixels.
        exposure: factor of the brightness; 1: normal.
        time: timestamp, `2014-06-03 05:12:44`.
        individual: seed of the hue of the animal and of the plants; equal for all images of a burst.
        seed: seed of the sensor noise.
    """

    species: str | None
    place: str
    camera: int = 0
    x: float = 0.5
    y: float = 0.8
    size: float = 0.6
    facing: int = 1
    phase: float = 0.0
    head: float = 0.0
    tone: float = 0.0
    occlusion: float = 0.0
    blur_px: float = 0.0
    exposure: float = 1.0
    time: str = "2014-06-03 12:00:00"
    individual: int = 0
    seed: int = 0


def render(scene: Scene, size_px: int = 64) -> Image.Image:
    """Render a scene as an RGB image of `size_px` x `size_px` pixels; equal scenes give equal pixels."""
    place, canvas = PLACES[scene.place], size_px * SUPERSAMPLING
    rng = np.random.default_rng(scene.individual)
    hue = rng.uniform(0.94, 1.06, size=3).astype(np.float32)
    pixels = backdrop(scene.place, scene.camera, canvas).copy()
    if scene.species is not None:
        _paint_animal(pixels, scene, place, hue)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if scene.occlusion > 0:
        _paint_growth(image, scene, place, rng)
    image = image.resize((size_px, size_px), Image.Resampling.BOX)
    if scene.blur_px > 0:
        image = image.filter(ImageFilter.GaussianBlur(scene.blur_px * size_px / 64))
    pixels = np.asarray(image, dtype=np.float32)
    if place.infrared:
        pixels = _infrared(pixels)
    noise = np.random.default_rng(scene.seed).standard_normal((size_px, size_px, 1), dtype=np.float32)
    pixels = 255 * (pixels * scene.exposure / 255).clip(0, 1) ** 0.95 + noise * (9 if place.infrared else 4)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    _paint_bar(image, scene)
    return image


def at(scene: Scene, place: str) -> Scene:
    """Return the same scene at another place: the ground truth of an edit such as `put it in the snow`.

    Raises:
        KeyError: unknown place.
    """
    if place not in PLACES:
        raise KeyError(place)
    return dataclasses.replace(scene, place=place)


def _paint_animal(pixels: NDArray[np.float32], scene: Scene, place: Place, hue: NDArray[np.float32]) -> None:
    """Draw the animal and its shadow into `pixels` [S, S, 3]."""
    assert scene.species is not None, "an empty scene has no animal to paint"
    side = pixels.shape[0]
    parts = draw(scene.species, Pose(phase=scene.phase, head=scene.head))
    outline = np.concatenate([part.points for part in parts])
    (left, bottom), (right, top) = outline.min(axis=0), outline.max(axis=0)
    # The size is mostly the longer side, and partly the shorter one: otherwise tall thin animals would look too small.
    scale = scene.size * side / (0.75 * max(right - left, top - bottom) + 0.25 * min(right - left, top - bottom))
    middle = (left + right) / 2
    ground_y = scene.y * side

    def to_pixels(part: Part) -> list[tuple[float, float]]:
        x = scene.x * side + scene.facing * (part.points[:, 0] - middle) * scale
        y = ground_y - part.points[:, 1] * scale
        return list(zip(x.tolist(), y.tolist(), strict=True))

    polygons = [to_pixels(part) for part in parts]
    reach = 0.6 * (right - left) * scale + 4
    box = (scene.x * side - reach, ground_y - top * scale - 2, scene.x * side + reach, ground_y + 0.09 * scale + 4)
    x0, y0, x1, y1 = (int(np.clip(edge, 0, side)) for edge in box)
    if x0 >= x1 or y0 >= y1:
        return  # the animal is outside of the image

    colours, mask = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    paint_colour, paint_mask = ImageDraw.Draw(colours).polygon, ImageDraw.Draw(mask).polygon
    for part, polygon in zip(parts, polygons, strict=True):
        paint_colour(polygon, fill=part.colour)
        paint_mask(polygon, fill=COAT if part.coat else BARE)
    animal = np.asarray(colours.crop((x0, y0, x1, y1)), dtype=np.float32).copy()
    kind = np.asarray(mask.crop((x0, y0, x1, y1)))
    columns = np.arange(x0, x1, dtype=np.float32)[None, :] - scene.x * side
    rows = ground_y - np.arange(y0, y1, dtype=np.float32)[:, None]
    if scene.species in PATTERNS:
        dark, pattern = PATTERNS[scene.species]
        animal[(kind == COAT) & pattern(scene.facing * columns / scale + middle, rows / scale)] = dark
    light = 0.72 + 0.36 * np.clip(rows / scale / top, 0, 1)[:, :, None]
    animal = animal * (light * (1 + 0.16 * scene.tone) * np.asarray(place.light, dtype=np.float32) * hue) + place.glow
    shadow = (columns / (0.5 * (right - left) * scale)) ** 2 + (rows / (0.07 * scale + 2)) ** 2
    view = pixels[y0:y1, x0:x1]
    view *= 1 - 0.38 * np.clip(1.6 * (1 - shadow), 0, 1)[:, :, None]
    view[kind > 0] = animal[kind > 0]


def _paint_growth(image: Image.Image, scene: Scene, place: Place, rng: np.random.Generator) -> None:
    """Draw blades of grass in front of the feet of the animal."""
    painter, side = ImageDraw.Draw(image), image.width
    base, height = (scene.y + 0.06) * side, scene.occlusion * scene.size * side * 0.42
    num_blades = int(24 + 60 * scene.occlusion)
    x = (scene.x + rng.normal(0, 0.28, size=num_blades)) * side
    lean = x + rng.normal(0, 0.03, size=num_blades) * side
    tip = base - height * rng.uniform(0.4, 1.15, size=num_blades) - 0.06 * side
    colours = (np.array(place.growth) * rng.uniform(0.75, 1.2, size=(num_blades, 1))).clip(0, 255).astype(int)
    for foot_x, tip_x, tip_y, colour in zip(x.tolist(), lean.tolist(), tip.tolist(), colours.tolist(), strict=True):
        painter.line([(foot_x, base), (tip_x, tip_y)], fill=tuple(colour), width=max(2, side // 48))


def _infrared(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Convert to grey with a bright centre, as with a flash."""
    side = pixels.shape[0]
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    grey = pixels @ np.array([0.45, 0.35, 0.2], dtype=np.float32)
    flash = 1.18 - 0.55 * np.sqrt(rows**2 + columns**2)
    return np.repeat((grey * flash)[:, :, None], 3, axis=2)


def _paint_bar(image: Image.Image, scene: Scene) -> None:
    """Draw a black bar with time and camera at the bottom."""
    side = image.width
    height = max(4, round(BAR * side))
    painter = ImageDraw.Draw(image)
    painter.rectangle((0, side - height, side, side), fill=(8, 8, 8))
    text = f"{scene.time[5:16]}  C{scene.camera:02d}"
    painter.text((1, side - height - math.ceil(height * 0.12)), text, fill=(225, 225, 225), font=_font(height))


def _font(height_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=height_px)
