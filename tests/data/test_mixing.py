"""Mixup and CutMix: labels are mixed as images are, draws are seeded."""

from __future__ import annotations

import pytest
import torch

from flyp_saflex.data.mixing import cutmix, cutmix_fields, draw_mix, mixup
from flyp_saflex.errors import ConfigError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mixup_mixes_images_and_labels_alike():
    images, labels = torch.randn(4, 3, 5, 5, generator=seeded()), torch.eye(4)
    partner = torch.tensor([1, 2, 3, 0])
    mixed, soft = mixup(images, labels, 0.3, partner)
    torch.testing.assert_close(mixed[2], 0.3 * images[2] + 0.7 * images[3])
    torch.testing.assert_close(soft[2], torch.tensor([0, 0, 0.3, 0.7]))
    unchanged = mixup(images, labels, 1.0, partner)
    assert torch.equal(unchanged[0], images)
    assert torch.equal(unchanged[1], labels)


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_cutmix_labels_are_the_area_that_was_kept(lam):
    labels, partner = torch.eye(2), torch.tensor([1, 0])
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 12, 8)
    for seed in range(20):
        mixed, soft = cutmix(images, labels, lam, partner, seeded(seed))
        area = mixed[0].mean().item()  # part of row 0 (all zeros) that now is row 1 (all ones)
        torch.testing.assert_close(soft[0], torch.tensor([1 - area, area]))
        assert area <= 1 - lam + 0.07  # never more than asked for, up to rounding to pixels: half a pixel of 12 and of 8
        torch.testing.assert_close(mixed[1].mean(), torch.tensor(1 - area))
    assert images.sum() == 3 * 12 * 8, "the input is left alone"


def test_cutmix_pastes_one_box():
    images = torch.arange(2.0)[:, None, None, None].expand(2, 1, 16, 16)
    mixed, _ = cutmix(images, torch.eye(2), 0.7, torch.tensor([1, 0]), seeded())
    rows, columns = mixed[0, 0].any(1).sum(), mixed[0, 0].any(0).sum()
    assert mixed[0].sum() == rows * columns


def test_draw_mix_is_seeded_and_is_beta_distributed():
    first, second = draw_mix(6, 0.2, seeded(3)), draw_mix(6, 0.2, seeded(3))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert sorted(first[1].tolist()) == list(range(6))
    generator = seeded()
    lams = torch.tensor([draw_mix(1, 0.5, generator)[0] for _ in range(2000)])
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)) = 1/8; the standard errors are 0.008 and 0.002.
    assert lams.mean().item() == pytest.approx(0.5, abs=0.04)
    assert lams.var().item() == pytest.approx(0.125, abs=0.01)
    with pytest.raises(ConfigError, match="alpha above 0, found 0"):
        draw_mix(2, 0, seeded())


def test_cutmix_refuses_rows_of_numbers():
    with pytest.raises(ConfigError, match=r"the rows have the shape \[4, 9\]: use `cutmix_fields`"):
        cutmix(torch.randn(4, 9), torch.eye(4), 0.5, torch.tensor([1, 2, 3, 0]), seeded())


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_fields_are_exchanged_as_a_whole_and_labels_by_their_share(lam):
    fields = ["age", "town", "town", "town", "size"]
    rows = torch.arange(4.0)[:, None].expand(4, 5)
    partner = torch.tensor([1, 2, 3, 0])
    for seed in range(10):
        mixed, soft = cutmix_fields(rows, torch.eye(4), lam, partner, seeded(seed), fields)
        stays = mixed == rows
        assert torch.equal(stays[:, 1], stays[:, 2])
        assert torch.equal(stays[:, 1], stays[:, 3])
        share = stays[:, [0, 1, 4]].float().mean(dim=1)
        torch.testing.assert_close(soft.diagonal(), share)
        torch.testing.assert_close(soft[torch.arange(4), partner], 1 - share)
    assert lam not in (0.0, 1.0) or share.unique().tolist() == [lam]


def test_without_fields_every_column_is_one():
    mixed, soft = cutmix_fields(torch.arange(2.0)[:, None].expand(2, 400), torch.eye(2), 0.7, torch.tensor([1, 0]), seeded())
    assert soft[0, 0].item() == pytest.approx(0.7, abs=0.1)
    assert mixed[0].mean().item() == pytest.approx(1 - soft[0, 0].item(), abs=1e-6)
