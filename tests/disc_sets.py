"""Drawn sets in MedMNIST's form: bright and dark discs, which stand for two classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flyp_saflex.data import medmnist
from flyp_saflex.data.medmnist import Published


def draw_discs(folder: Path, name: str, sizes: tuple[int, int, int], *, colour: bool = False) -> Path:
    """Write `<name>mnist.npz` with images for train, val and test, and return its path.

    Args:
        folder: of the file.
        name: of the set, such as `breast`.
        sizes: images of the three parts.
        colour: three channels with noise of their own, instead of one.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28]
    arrays = {}
    for part, size in zip(("train", "val", "test"), sizes, strict=True):
        labels = np.arange(size) % 2
        disc = ((x[None] - rng.integers(9, 19, size)[:, None, None]) ** 2 + (y[None] - 14) ** 2) < 40
        images = 100 + disc * np.where(labels, 90, -60)[:, None, None] + rng.normal(0, 15, (size, 28, 28))
        if colour:
            images = images[..., None] + rng.normal(0, 20, (size, 1, 1, 3))
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images.clip(0, 255).astype(np.uint8), labels[:, None]
    np.savez(folder / f"{name}mnist.npz", **arrays)
    return folder / f"{name}mnist.npz"


def write_discs(
    folder: Path, name: str, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, *, colour: bool = False
) -> None:
    """Draw a set (`draw_discs`), and publish it for the test as a known one."""
    path = draw_discs(folder, name, sizes, colour=colour)
    published = Published(name, medmnist._md5(path), 3 if colour else 1, sizes, ("dark", "bright"))
    monkeypatch.setattr(medmnist, "published_sets", lambda: {name: published})
