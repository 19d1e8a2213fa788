"""Ten animal species drawn as polygons, for the synthetic images of the demo.

An animal is a list of `Part`s in its own coordinates: x forward, y up, feet at y = 0, one unit about half a body length.
`scene.py` scales the bounding box of all parts to the size of the animal in the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
Points = NDArray[np.float64]
Pattern = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]

BLACK: Colour = (28, 25, 26)
WHITE: Colour = (240, 236, 226)

_TURNS = np.linspace(0, 2 * np.pi, 28, endpoint=False)
CIRCLE = np.stack([np.cos(_TURNS), np.sin(_TURNS)])
_HALF = np.linspace(-np.pi / 2, np.pi / 2, 9)
ARC = np.stack([np.cos(_HALF), np.sin(_HALF)])


@dataclass(frozen=True, slots=True)
class Part:
    """Filled polygon of an animal.

    Attributes:
        points: outline [N, 2].
        colour: red, green and blue, 0..255.
        coat: whether the pattern of the species covers it.
    """

    points: Points
    colour: Colour
    coat: bool = False


@dataclass(frozen=True, slots=True)
class Pose:
    """Pose of an animal.

    Attributes:
        phase: phase of the walking cycle, 0..1.
        head: height of the head, from 0 (raised) to 1 (lowered to graze).
    """

    phase: float = 0.0
    head: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Measures of a four-legged animal: lengths in its own unit, angles in degrees above the horizontal."""

    coat: Colour
    body: tuple[float, float]  # half length, half height
    leg: tuple[float, float, float]  # length, radius above, radius below
    neck: tuple[float, float, float, float]  # length, angle, radius at the shoulder, radius at the head
    head: tuple[float, float, float, float]  # length, angle, radius, radius of the snout
    ears: tuple[float, float]  # length, half width
    tail: tuple[float, float, float]  # length, angle, radius
    tail_tip: Colour | None = None
    legs: Colour | None = None
    belly: Colour | None = None
    mane: Colour | None = None
    snout: Colour | None = None
    horns: str = ""


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Points:
    """Return the outline [N, 2] of an ellipse with centre (x, y) and radii rx, ry, turned by `angle` degrees."""
    turn = math.radians(angle)
    a, b = rx * CIRCLE[0], ry * CIRCLE[1]
    return np.stack([x + a * math.cos(turn) - b * math.sin(turn), y + a * math.sin(turn) + b * math.cos(turn)], axis=1)


def limb(a: tuple[float, float], b: tuple[float, float], ra: float, rb: float) -> Points:
    """Return the outline [N, 2] of a limb from `a` (radius `ra`) to `b` (radius `rb`)."""
    turn = math.atan2(b[1] - a[1], b[0] - a[0])
    cos, sin = math.cos(turn) * ARC[0] - math.sin(turn) * ARC[1], math.sin(turn) * ARC[0] + math.cos(turn) * ARC[1]
    x = np.concatenate([a[0] - ra * cos, b[0] + rb * cos])
    return np.stack([x, np.concatenate([a[1] - ra * sin, b[1] + rb * sin])], axis=1)


def along(a: tuple[float, float], length: float, angle: float) -> tuple[float, float]:
    """Return the point at distance `length` from `a`, in the direction `angle` degrees above the horizontal."""
    return a[0] + length * math.cos(math.radians(angle)), a[1] + length * math.sin(math.radians(angle))


def darker(colour: Colour, factor: float = 0.72) -> Colour:
    """Return a darker colour, used for limbs on the far side; `factor` scales the brightness."""
    return int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor)


def quadruped(build: Build, pose: Pose) -> list[Part]:
    """Return the parts of a four-legged animal, back to front."""
    half_length, half_height = build.body
    leg, thigh, hoof = build.leg
    back = leg + half_height * 0.9
    legs = build.legs or build.coat
    parts: list[Part] = []
    front: list[Part] = []
    for x, shift, near in ((-0.72, 0.5, False), (0.68, 0.0, False), (-0.66, 0.0, True), (0.74, 0.5, True)):
        hip = (x * half_length, leg + half_height * 0.35)
        swing = 0.3 * leg * math.sin(2 * math.pi * (pose.phase + shift))
        knee = (hip[0] + swing * 0.3 + (0.06 if x < 0 else -0.02), leg * 0.5)
        foot = (hip[0] + swing, hoof)
        colour = legs if near else darker(legs)
        upper = build.coat if near else darker(build.coat)
        shape = [
            Part(limb(knee, foot, (thigh + hoof) / 2, hoof), colour),
            Part(limb(hip, knee, thigh, (thigh + hoof) / 2), upper, True),
        ]
        (front if near else parts).extend(shape)
    length, angle, radius = build.tail
    root = (-half_length * 0.93, back)
    if length:
        tip = along(root, length, angle)
        parts.append(Part(limb(root, tip, radius * 0.8, radius), build.coat, True))
        if build.tail_tip:
            parts.append(Part(ellipse(*along(root, length * 0.97, angle), radius * 1.5, radius * 0.95, angle), build.tail_tip))
    parts.append(Part(ellipse(0, back, half_length, half_height), build.coat, True))
    if build.belly:
        parts.append(Part(ellipse(0, back - half_height * 0.68, half_length * 0.72, half_height * 0.3), build.belly))
    return parts + front + _head(build, pose, (half_length * 0.72, back + half_height * 0.25))


def _head(build: Build, pose: Pose, shoulder: tuple[float, float]) -> list[Part]:
    length, angle, thick, thin = build.neck
    angle -= pose.head * (angle + 42)
    nape = along(shoulder, length, angle)
    parts = [Part(limb(shoulder, nape, thick, thin), build.coat, True)]
    if build.mane:
        side = angle + 90
        strip = [
            along(shoulder, thick * 0.8, side),
            along(shoulder, thick * 1.35, side),
            along(nape, thin * 2.0, side),
            along(nape, thin, side),
        ]
        parts.append(Part(np.array(strip), build.mane))
    reach, tilt, radius, snout = build.head
    tilt -= pose.head * 35
    nose = along(nape, reach, tilt)
    ear, half_width = build.ears
    for lean, colour in ((112, darker(build.coat)), (88, build.coat)):
        base = along(nape, radius * 0.75, tilt + lean)
        left, right = along(base, half_width, tilt), along(base, -half_width, tilt)
        parts.append(Part(np.array([left, along(base, ear, tilt + lean), right]), colour))
    parts.extend(_horns(build.horns, nape, nose, tilt, radius))
    parts.append(Part(limb(nape, nose, radius, snout), build.coat, True))
    if build.snout:
        parts.append(Part(limb(along(nape, reach * 0.72, tilt), nose, snout * 1.08, snout), build.snout))
    parts.append(Part(ellipse(*along(nose, snout * 0.8, tilt + 15), snout * 0.35, snout * 0.35), BLACK))
    eye = along(along(nape, reach * 0.3, tilt), radius * 0.35, tilt + 90)
    parts.append(Part(ellipse(*eye, 0.04, 0.04), BLACK))
    return parts


def _horns(kind: str, nape: tuple[float, float], nose: tuple[float, float], tilt: float, radius: float) -> list[Part]:
    if kind == "rhinoceros":
        at, second = along(nose, 0.1, tilt + 90), along(along(nose, -0.22, tilt), 0.14, tilt + 90)
        return [
            Part(limb(along(at, -0.06, tilt + 60), along(at, 0.36, tilt + 72), 0.11, 0.015), WHITE),
            Part(limb(along(second, -0.06, tilt + 60), along(second, 0.16, tilt + 75), 0.09, 0.015), WHITE),
        ]
    crown = along(nape, radius * 0.8, tilt + 100)
    if kind == "giraffe":
        return [Part(limb(crown, along(crown, 0.15, tilt + lean), 0.025, 0.045), (90, 55, 30)) for lean in (85, 115)]
    if kind == "deer":
        parts = []
        for lean, colour in ((128, darker((120, 90, 60))), (98, (120, 90, 60))):
            fork, tip = along(crown, 0.22, tilt + lean), along(along(crown, 0.22, tilt + lean), 0.26, tilt + lean - 25)
            middle = along(fork, 0.12, tilt + lean - 25)
            for start, end in (
                (crown, fork),
                (fork, tip),
                (fork, along(fork, 0.2, tilt + lean + 50)),
                (middle, along(middle, 0.17, tilt + lean + 40)),
            ):
                parts.append(Part(limb(start, end, 0.035, 0.025), colour))
        return parts
    return []


def ostrich(pose: Pose) -> list[Part]:
    """Return the parts of an ostrich: black body, white wing and tail, bare neck and legs."""
    skin, parts = (214, 160, 140), []
    for shift, colour in ((0.5, darker(skin)), (0.0, skin)):
        swing = 0.28 * math.sin(2 * math.pi * (pose.phase + shift))
        hip, knee, foot = (0.0, 0.95), (-0.1 + swing * 0.5, 0.5), (swing, 0.05)
        parts += [Part(limb(hip, knee, 0.15, 0.07), colour), Part(limb(knee, foot, 0.055, 0.045), colour)]
        parts.append(Part(limb(foot, (foot[0] + 0.16, 0.03), 0.045, 0.03), colour))
    parts += [Part(ellipse(-0.56, 1.32, 0.26, 0.17, -25), WHITE), Part(ellipse(0, 1.2, 0.58, 0.36, 8), BLACK, True)]
    parts.append(Part(ellipse(-0.3, 1.08, 0.3, 0.13, -12), WHITE))
    bend = (0.62, 1.55 - 0.75 * pose.head)
    top = (0.6 + 0.45 * pose.head, 2.15 - 1.75 * pose.head)
    parts += [Part(limb((0.4, 1.32), bend, 0.16, 0.085), skin), Part(limb(bend, top, 0.085, 0.07), skin)]
    parts += [
        Part(ellipse(top[0] + 0.05, top[1], 0.14, 0.1), skin),
        Part(limb((top[0] + 0.12, top[1]), (top[0] + 0.34, top[1] - 0.04), 0.06, 0.02), (120, 95, 50)),
    ]
    return [*parts, Part(ellipse(top[0] + 0.06, top[1] + 0.03, 0.035, 0.035), BLACK)]


def tortoise(pose: Pose) -> list[Part]:
    """Return the parts of a tortoise: a domed shell on short legs."""
    skin, shell, parts = (128, 122, 72), (112, 96, 48), []
    for x, shift, near in ((-0.5, 0.5, False), (0.5, 0.0, False), (-0.56, 0.0, True), (0.52, 0.5, True)):
        foot = (x + 0.07 * math.sin(2 * math.pi * (pose.phase + shift)), 0.09)
        parts.append(Part(limb((x, 0.3), foot, 0.13, 0.11), skin if near else darker(skin)))
    head = (1.02, 0.52 - 0.28 * pose.head)
    parts += [Part(limb((0.6, 0.38), head, 0.11, 0.1), skin), Part(ellipse(*head, 0.17, 0.13), skin)]
    parts.append(Part(ellipse(head[0] + 0.06, head[1] + 0.04, 0.03, 0.03), BLACK))
    t = np.linspace(0, np.pi, 24)
    parts.append(Part(np.stack([0.86 * np.cos(t), 0.28 + 0.68 * np.sin(t) ** 0.85], axis=1), shell, True))
    return [*parts, Part(limb((-0.82, 0.29), (0.82, 0.29), 0.07, 0.07), (165, 146, 84))]


def rabbit(pose: Pose) -> list[Part]:
    """Return the parts of a rabbit: a crouching body, a round head, two long ears."""
    coat, lift = (150, 126, 104), 0.06 * math.sin(2 * math.pi * pose.phase)
    head = (0.55, 0.78 - 0.28 * pose.head)
    parts = [
        Part(ellipse(-0.66, 0.4, 0.16, 0.16), WHITE),
        Part(limb((0.32, 0.42), (0.42 + lift, 0.07), 0.12, 0.07), darker(coat)),
    ]
    for lean, colour in ((118, darker(coat)), (98, coat)):
        tip = along(head, 0.78, lean - 25 * pose.head)
        parts.append(Part(limb(along(head, 0.15, lean), tip, 0.085, 0.075), colour))
    inner = along(head, 0.7, 98 - 25 * pose.head)
    parts.append(Part(limb(along(head, 0.3, 98), inner, 0.035, 0.03), (214, 158, 150)))
    parts += [Part(ellipse(-0.08, 0.44, 0.58, 0.38, 12), coat), Part(ellipse(-0.3, 0.34, 0.32, 0.3), darker(coat, 0.88))]
    parts += [
        Part(limb((-0.35, 0.08), (0.05 + lift, 0.07), 0.09, 0.07), coat),
        Part(limb((0.38, 0.42), (0.5 - lift, 0.07), 0.11, 0.07), coat),
    ]
    parts += [Part(ellipse(*head, 0.27, 0.23, -12), coat), Part(ellipse(head[0] + 0.2, head[1] - 0.07, 0.1, 0.08), WHITE)]
    return [*parts, Part(ellipse(head[0] + 0.08, head[1] + 0.05, 0.045, 0.045), BLACK)]


BUILDS = {
    "zebra": Build(
        coat=WHITE, body=(0.62, 0.31), leg=(0.72, 0.11, 0.055), neck=(0.5, 50, 0.2, 0.13), head=(0.36, -38, 0.14, 0.08),
        ears=(0.16, 0.05), tail=(0.5, -105, 0.035), tail_tip=BLACK, mane=BLACK, snout=BLACK,
    ),
    "giraffe": Build(
        coat=(232, 192, 118), body=(0.5, 0.27), leg=(0.98, 0.1, 0.055), neck=(1.25, 66, 0.18, 0.09), head=(0.3, -28, 0.11, 0.07),
        ears=(0.14, 0.045), tail=(0.45, -100, 0.03), tail_tip=BLACK, mane=(128, 76, 36), horns="giraffe",
    ),
    "rhinoceros": Build(
        coat=(138, 134, 132), body=(0.88, 0.5), leg=(0.42, 0.2, 0.15), neck=(0.26, 2, 0.4, 0.3), head=(0.5, -30, 0.28, 0.17),
        ears=(0.14, 0.06), tail=(0.4, -100, 0.035), horns="rhinoceros",
    ),
    "fox": Build(
        coat=(218, 108, 38), body=(0.5, 0.19), leg=(0.36, 0.085, 0.045), neck=(0.24, 42, 0.16, 0.14),
        head=(0.32, -14, 0.17, 0.05), ears=(0.25, 0.09), tail=(0.58, 205, 0.13), tail_tip=WHITE, legs=(52, 38, 34),
        belly=WHITE, snout=WHITE,
    ),
    "bear": Build(
        coat=(78, 52, 36), body=(0.72, 0.46), leg=(0.36, 0.19, 0.14), neck=(0.28, 20, 0.36, 0.27), head=(0.32, -18, 0.26, 0.13),
        ears=(0.1, 0.1), tail=(0, 0, 0), snout=(150, 110, 76),
    ),
    "deer": Build(
        coat=(164, 104, 58), body=(0.56, 0.25), leg=(0.74, 0.085, 0.04), neck=(0.46, 56, 0.15, 0.1), head=(0.3, -26, 0.12, 0.06),
        ears=(0.2, 0.055), tail=(0.14, 150, 0.08), tail_tip=WHITE, belly=(226, 208, 178), horns="deer",
    ),
    "tiger": Build(
        coat=(232, 134, 36), body=(0.78, 0.28), leg=(0.38, 0.13, 0.085), neck=(0.2, 26, 0.25, 0.23), head=(0.2, -14, 0.25, 0.15),
        ears=(0.07, 0.08), tail=(0.72, 148, 0.06), tail_tip=BLACK, belly=WHITE, snout=WHITE,
    ),
}  # fmt: skip
SPECIES = ("deer", "zebra", "fox", "bear", "ostrich", "rabbit", "giraffe", "tiger", "tortoise", "rhinoceros")
"""All species, the most frequent first."""

# Dark pattern of the coat, for species that have one, in the coordinates of the animal.
PATTERNS: dict[str, tuple[Colour, Pattern]] = {
    "zebra": (BLACK, lambda x, y: np.sin(24 * x + 7 * y + 1.5 * np.sin(5 * y)) > 0.1),
    "tiger": (BLACK, lambda x, y: np.sin(21 * x + 2.5 * np.sin(6 * y)) > 0.62),
    "giraffe": (
        (142, 82, 36),
        lambda x, y: (np.sin(17 * x + 3 * np.sin(4 * y)) > -0.45) & (np.sin(15 * y + 3 * np.sin(5 * x)) > -0.45),
    ),
    "tortoise": ((66, 58, 30), lambda x, y: (np.sin(11 * x) > 0.55) | (np.abs(np.sin(7 * y - 0.4)) < 0.22)),
}


def draw(species: str, pose: Pose) -> list[Part]:
    """Return the parts of a species, back to front."""
    others = {"ostrich": ostrich, "tortoise": tortoise, "rabbit": rabbit}
    return others[species](pose) if species in others else quadruped(BUILDS[species], pose)
