"""Ten kinds of places with a backdrop per camera, for the synthetic images of the demo.

A backdrop is float32 [S, S, 3] in 0..255. It depends on the place and the camera number only, because a fixed camera sees the
same background in every image. `PLACES` also has the light on an animal and the colour of the plants in front of it.

Shapes: S side of the image in pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.float32]
Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Kind of place: colours, light and scenery.

    Attributes:
        sky: colours at the top of the image and at the horizon.
        ground: colours at the horizon and at the bottom of the image.
        horizon: height of the horizon, as a fraction of the image from the top; it varies a little between cameras.
        light: factors for red, green and blue of an animal.
        glow: brightness added to an animal (fur is bright in infrared light).
        growth: colour of the plants that hide the feet of an animal.
        texture: strength of the noise on the ground, in units of 0..255.
        scenery: function that draws trees, boulders, dunes ... over the backdrop.
        infrared: whether the image is grey with a bright centre, as with a flash at night.
    """

    sky: tuple[Colour, Colour]
    ground: tuple[Colour, Colour]
    horizon: float
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    glow: float = 0.0
    growth: Colour
    texture: float = 9.0
    scenery: Callable[[ImageDraw.ImageDraw, np.random.Generator, int, int], None] | None = None
    infrared: bool = False


def smooth_noise(rng: np.random.Generator, size_px: int, cells: int) -> Pixels:
    """Return smooth noise [S, S] with standard deviation about 1, interpolated from `cells` x `cells` values."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size_px, size_px), Image.Resampling.BICUBIC))


def _ridge(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, base: float, height: float, colour: Colour) -> None:
    x = np.linspace(0, size, 33)
    waves = sum(rng.uniform(0.3, 1) * np.sin(x / size * 2 * np.pi * k + rng.uniform(0, 6.3)) / k for k in (1, 2, 3))
    y = base - height * (0.6 + 0.4 * np.asarray(waves))
    draw.polygon([(0, size), *zip(x.tolist(), y.tolist(), strict=True), (size, size)], fill=colour)


def _savanna(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int) -> None:
    for _ in range(rng.integers(1, 4)):
        x, scale = rng.uniform(0, size), rng.uniform(0.12, 0.3) * size
        draw.line([(x, horizon + 3), (x + 0.1 * scale, horizon - scale)], fill=(92, 70, 44), width=max(2, int(scale * 0.1)))
        for _ in range(3):
            dx, dy = rng.uniform(-0.5, 0.5) * scale, rng.uniform(-0.1, 0.15) * scale
            box = (
                x + dx - 0.6 * scale,
                horizon - scale + dy - 0.14 * scale,
                x + dx + 0.6 * scale,
                horizon - scale + dy + 0.14 * scale,
            )
            draw.ellipse(box, fill=(96, 112, 50))
    for _ in range(70):
        x, y = rng.uniform(0, size), rng.uniform(horizon, size)
        draw.line([(x, y), (x + rng.uniform(-3, 3), y - rng.uniform(3, 9))], fill=(206, 172, 96), width=1)


def _trunks(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int, bark: Colour, crowns: list[Colour]
) -> None:
    for _ in range(90):
        x, y, r = rng.uniform(0, size), rng.uniform(-0.1, 1.0) * horizon, rng.uniform(0.03, 0.09) * size
        draw.ellipse((x - r, y - r, x + r, y + r), fill=crowns[int(rng.integers(len(crowns)))])
    for depth in np.sort(rng.uniform(0.4, 1.4, size=rng.integers(6, 11))):
        x, width, shade = rng.uniform(0, size), 0.045 * size * depth, 0.55 + 0.35 * depth
        colour = tuple(int(min(255, c * shade)) for c in bark)
        draw.rectangle((x, -1, x + width, horizon + 0.1 * size * depth), fill=colour)


def _forest(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int) -> None:
    _trunks(draw, rng, size, horizon, (78, 62, 46), [(34, 72, 36), (48, 96, 44), (26, 54, 32), (66, 112, 52)])


def _autumn(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int) -> None:
    _trunks(draw, rng, size, horizon, (176, 168, 158), [(196, 88, 30), (222, 140, 36), (164, 56, 30), (210, 170, 60)])
    for _ in range(160):
        x, y = rng.uniform(0, size), rng.uniform(horizon, size)
        draw.ellipse((x, y, x + 4, y + 2), fill=((206, 96, 34), (230, 160, 50), (150, 60, 30))[int(rng.integers(3))])


def _desert(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int) -> None:
    for depth, colour in ((0.0, (226, 170, 112)), (0.12, (214, 152, 92)), (0.3, (230, 178, 118))):
        _ridge(draw, rng, size, horizon + depth * size, 0.09 * size, colour)
    for _ in range(rng.integers(0, 3)):
        x, h = rng.uniform(0, size), rng.uniform(0.1, 0.2) * size
        draw.line([(x, horizon + 0.05 * size), (x, horizon - h)], fill=(72, 106, 62), width=max(3, size // 28))


def _lake(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int) -> None:
    _ridge(draw, rng, size, horizon, 0.12 * size, (86, 112, 96))
    shore = horizon + rng.uniform(0.2, 0.3) * size
    draw.rectangle((0, horizon, size, shore), fill=(70, 130, 176))
    for _ in range(26):
        x, y = rng.uniform(0, size), rng.uniform(horizon, shore)
        draw.line([(x, y), (x + rng.uniform(4, 16), y)], fill=(136, 184, 214), width=1)
    for _ in range(18):
        x = rng.uniform(0, size)
        draw.line([(x, shore + 3), (x + rng.uniform(-2, 2), shore - rng.uniform(6, 16))], fill=(84, 112, 52), width=2)


def _rocks(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int) -> None:
    for y in np.sort(rng.uniform(horizon * 0.95, size * 0.92, size=14)):
        x, r, grey = rng.uniform(0, size), rng.uniform(0.06, 0.19) * size, int(rng.integers(96, 168))
        angles = np.sort(rng.uniform(0, 2 * np.pi, size=8))
        outline = [(x + r * np.cos(a), y + 0.7 * r * np.sin(a)) for a in angles]
        draw.polygon(outline, fill=(grey, grey - 4, grey - 12))
        draw.polygon([(px + 0.1 * r, py - 0.16 * r) for px, py in outline[4:]], fill=(grey + 26, grey + 22, grey + 14))


def _snow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int) -> None:
    _ridge(draw, rng, size, horizon + 2, 0.1 * size, (206, 214, 226))
    for _ in range(rng.integers(3, 8)):
        x, h = rng.uniform(0, size), rng.uniform(0.16, 0.42) * size
        for part in (0.0, 0.3, 0.6):
            y, w = horizon + 4 - part * h, 0.24 * h * (1.2 - part)
            draw.polygon([(x - w, y), (x + w, y), (x, y - 0.5 * h)], fill=(58, 84, 80))
            draw.polygon([(x - w * 0.4, y - 0.3 * h), (x + w * 0.4, y - 0.3 * h), (x, y - 0.5 * h)], fill=(238, 243, 248))


def _dusk(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int) -> None:
    x, r = rng.uniform(0.15, 0.85) * size, 0.07 * size
    draw.ellipse((x - r, horizon - 2.2 * r, x + r, horizon - 0.2 * r), fill=(255, 214, 140))
    _ridge(draw, rng, size, horizon + 2, 0.1 * size, (72, 44, 66))


def _meadow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, horizon: int) -> None:
    _ridge(draw, rng, size, horizon + 2, 0.12 * size, (104, 158, 84))
    for _ in range(60):
        x, y = rng.uniform(0, size), rng.uniform(horizon + 4, size)
        draw.ellipse((x, y, x + 3, y + 3), fill=((250, 246, 240), (246, 214, 70), (214, 110, 170))[int(rng.integers(3))])


PLACES: dict[str, Place] = {
    "savanna": Place(
        sky=((150, 190, 224), (222, 226, 214)),
        ground=((196, 164, 92), (172, 134, 66)),
        horizon=0.42,
        growth=(190, 158, 84),
        scenery=_savanna,
    ),
    "forest": Place(
        sky=((52, 84, 50), (104, 134, 88)),
        ground=((74, 84, 44), (54, 58, 34)),
        horizon=0.5,
        light=(0.84, 0.9, 0.8),
        growth=(44, 82, 38),
        scenery=_forest,
    ),
    "desert": Place(
        sky=((92, 156, 220), (196, 216, 230)),
        ground=((230, 178, 118), (206, 146, 88)),
        horizon=0.4,
        light=(1.06, 1.0, 0.92),
        growth=(150, 140, 92),
        texture=5,
        scenery=_desert,
    ),
    "lake": Place(
        sky=((158, 196, 226), (210, 226, 234)),
        ground=((122, 140, 82), (96, 112, 60)),
        horizon=0.34,
        light=(0.96, 1.0, 1.05),
        growth=(84, 116, 54),
        scenery=_lake,
    ),
    "rocks": Place(
        sky=((176, 188, 200), (206, 208, 208)),
        ground=((134, 126, 112), (112, 104, 92)),
        horizon=0.38,
        light=(0.97, 0.97, 1.0),
        growth=(120, 114, 104),
        texture=14,
        scenery=_rocks,
    ),
    "meadow": Place(
        sky=((116, 176, 236), (206, 228, 244)),
        ground=((112, 172, 70), (76, 138, 48)),
        horizon=0.4,
        light=(1.03, 1.03, 1.0),
        growth=(92, 158, 54),
        scenery=_meadow,
    ),
    "dusk": Place(
        sky=((72, 52, 104), (244, 148, 84)),
        ground=((86, 54, 54), (48, 32, 42)),
        horizon=0.5,
        light=(0.8, 0.56, 0.58),
        growth=(52, 34, 42),
        scenery=_dusk,
    ),
    "autumn": Place(
        sky=((204, 196, 180), (226, 206, 170)),
        ground=((160, 92, 44), (128, 70, 36)),
        horizon=0.46,
        light=(1.02, 0.94, 0.84),
        growth=(190, 108, 40),
        texture=14,
        scenery=_autumn,
    ),
    "snow": Place(
        sky=((188, 198, 212), (224, 228, 234)),
        ground=((236, 240, 246), (216, 224, 236)),
        horizon=0.44,
        light=(0.95, 0.98, 1.06),
        growth=(232, 238, 246),
        texture=4,
        scenery=_snow,
    ),
    "infrared night": Place(
        sky=((10, 10, 10), (30, 30, 30)),
        ground=((96, 96, 96), (74, 74, 74)),
        horizon=0.46,
        light=(0.9, 0.9, 0.9),
        glow=62.0,
        growth=(132, 132, 132),
        texture=11,
        scenery=_forest,
        infrared=True,
    ),
}


@lru_cache(maxsize=256)
def backdrop(name: str, camera: int, size_px: int) -> Pixels:
    """Draw the background of a camera without an animal.

    Args:
        name: one of `PLACES`.
        camera: number of the camera.
        size_px: S.

    Returns:
        Float32 [S, S, 3] in 0..255, cached and therefore read-only.
    """
    place = PLACES[name]
    rng = np.random.default_rng([zlib.crc32(name.encode()), camera])
    horizon = int(size_px * (place.horizon + rng.uniform(-0.05, 0.05)))
    rows = np.arange(size_px, dtype=np.float32)[:, None]
    up = np.clip(rows / max(horizon, 1), 0, 1)
    down = np.clip((rows - horizon) / max(size_px - horizon, 1), 0, 1)
    top, low, far, near = (np.asarray(colour, dtype=np.float32) for colour in (*place.sky, *place.ground))
    column = np.where(rows < horizon, top + (low - top) * up, far + (near - far) * down)
    bare = np.repeat(column[:, None, :], size_px, axis=1)
    image = Image.fromarray(bare.clip(0, 255).astype(np.uint8))
    if place.scenery:
        place.scenery(ImageDraw.Draw(image), rng, size_px, horizon)
    grain = smooth_noise(rng, size_px, 24) + smooth_noise(rng, size_px, 7)
    pixels = np.asarray(image, dtype=np.float32) + (grain * place.texture * (rows >= horizon))[:, :, None]
    pixels *= (1 + rng.uniform(-0.05, 0.05, size=3)).astype(np.float32)  # every camera has its own white balance
    pixels.setflags(write=False)
    return pixels
