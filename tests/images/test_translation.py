"""Translations and the label of a partly visible image: Soft-Augmentation's formula, drawn from the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flyp_saflex.images.picture import Picture
from flyp_saflex.images.translation import Translation, draw_shift, visible_fraction
from flyp_saflex.saflex.baselines import soft_confidence
from flyp_saflex.tasks.label_space import Rows, upstream_labels


def test_the_visible_fraction_is_that_of_the_shifted_image() -> None:
    white = Picture.of(Image.new("RGB", (100, 100), "white"))
    for seed in range(30):
        seen = np.asarray(Translation(100, 0.4).on(white, seed).image())
        assert (seen > 0).all(axis=2).mean() == pytest.approx(visible_fraction(0.4, seed), abs=0.011)
        assert all(abs(shift) < 1 for shift in draw_shift(3.0, seed))


def test_the_label_falls_from_one_to_chance() -> None:
    assert soft_confidence(1.0, 5, 2.0) == 1.0
    assert soft_confidence(0.0, 5, 2.0) == pytest.approx(0.2)
    assert soft_confidence(0.5, 5, 2.0) == pytest.approx(1 - 0.8 * 0.25)
    assert soft_confidence(0.5, 5, 4.0) > soft_confidence(0.5, 5, 2.0)


def test_the_rest_of_a_soft_label_is_spread_over_the_other_classes() -> None:
    labels = torch.tensor([0, 2])
    rows = Rows(torch.zeros(2, 1), labels, labels, labels, num_train=1, confidence_N=torch.tensor([1.0, 0.7]))
    soft = upstream_labels(rows, labels, None, torch.arange(4), lambda tensor: tensor)
    torch.testing.assert_close(soft, torch.tensor([[1.0, 0, 0, 0], [0.1, 0.1, 0.7, 0.1]]))


def test_large_images_are_brought_down_first() -> None:
    large = Picture.of(Image.new("RGB", (200, 120), "white"))
    assert Translation(28, 0.1).on(large, 0).size == (46, 28)
