"""Label spaces: labels share their mass over the columns that carry them, rows keep their own label."""

import pytest
import torch

from flyp_saflex.tasks.label_space import LabelSpace, Rows, assignment, class_space


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def simplex(rows, columns, generator, dtype=torch.float64):
    return torch.rand(rows, columns, generator=generator, dtype=dtype).softmax(dim=1)


def space_of(labels_K, columns_C):
    nothing = torch.zeros(0)
    return LabelSpace(labels_K, columns_C, torch.searchsorted(labels_K, columns_C), nothing, nothing, nothing)


def test_a_label_has_equal_shares_in_the_columns_that_carry_it():
    ids = torch.tensor([7, 3, 7, 5])
    assert assignment(torch.tensor([7, 5]), ids).tolist() == [[0.5, 0, 0.5, 0], [0, 0, 0, 1]]
    with pytest.raises(AssertionError, match="in no column"):
        assignment(torch.tensor([4]), ids)


def test_learned_labels_share_their_mass_over_repeats(generator):
    columns, captions = torch.tensor([7, 3, 7, 5]), torch.tensor([3, 5, 7])
    labels = simplex(6, 3, generator)
    space = space_of(captions, columns)
    spread = space.spread(labels)
    torch.testing.assert_close(spread.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert torch.equal(spread[:, 0], spread[:, 2])
    torch.testing.assert_close(spread[:, 0] + spread[:, 2], labels[:, 2])
    gains = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    averaged = space.average(gains)
    torch.testing.assert_close((averaged * labels).sum(), (gains * spread).sum())


def test_shares_are_exact_under_autocast(generator):
    space = space_of(torch.tensor([3, 5, 7]), torch.tensor([7, 3, 7, 5]))
    labels, gains = simplex(6, 3, generator, torch.float32), torch.randn(6, 4, generator=generator)
    expected = space.spread(labels), space.average(gains)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(space.spread(labels), expected[0])
        assert torch.equal(space.average(gains), expected[1])


def test_first_columns_carry_their_labels():
    columns = torch.tensor([7, 3, 7, 5])
    assert columns[space_of(torch.tensor([3, 5, 7]), columns).first_columns()].tolist() == [3, 5, 7]


def test_the_datasets_classes_are_the_columns_whatever_the_batch_shows():
    rows = Rows(torch.zeros(3, 1), torch.tensor([8, 9, 8]), torch.tensor([2, 0, 2]), torch.arange(3), 1)
    tokens = torch.arange(8).reshape(4, 2)
    space = class_space(rows, 4, tokens, lambda tensor: tensor)
    assert space.labels_K.tolist() == space.columns_C.tolist() == space.inverse_C.tolist() == [0, 1, 2, 3]
    assert space.tokens_UL is tokens
    assert space.upstream_NK.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert torch.equal(space.upstream_mass(), space.upstream_NK)
    assert space.augmented_N.tolist() == [False, True, True]
    rows.partners_N, rows.partner_labels_N, rows.share_N = (
        rows.captions_N,
        torch.tensor([2, 3, 0]),
        torch.tensor([1.0, 0.75, 0.5]),
    )
    mixed = class_space(rows, 4, tokens, lambda tensor: tensor)
    assert mixed.upstream_NK.tolist() == [[0, 0, 1, 0], [0.75, 0, 0, 0.25], [0.5, 0, 0.5, 0]]
