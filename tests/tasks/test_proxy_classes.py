"""Proxy classes: captions of the batch as columns, over all processes, each distinct one once."""

import pytest
import torch
import torch.nn.functional as F

from flyp_saflex.saflex.losses import clip_loss
from flyp_saflex.tasks.label_space import Rows
from flyp_saflex.tasks.proxy_classes import first_with_equal_tokens, proxy_columns, proxy_space

TOKENS_ML = torch.arange(20).reshape(10, 2)
SAME_M = torch.arange(10)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def rows_of(captions, num_train, **mixed):
    captions_N = torch.tensor(captions)
    return Rows(torch.zeros(len(captions), 1), captions_N, captions_N, torch.arange(len(captions)), num_train, **mixed)


def alone(tensor):
    return tensor


def test_caption_columns_collapse_repeats_and_batch_columns_keep_them():
    ids = torch.tensor([7, 3, 7, 5])
    columns, mass = proxy_columns(ids, "captions")
    assert columns.tolist() == [3, 5, 7]
    assert torch.equal(mass, F.one_hot(torch.tensor([2, 0, 2, 1]), 3).float())
    columns, mass = proxy_columns(ids, "batch")
    assert torch.equal(columns, ids)
    assert torch.equal(mass, torch.eye(4))  # as published: a repeat of its caption is a negative of the row


def test_distinct_captions_make_both_proxies_equal(generator):
    ids, logits = torch.tensor([4, 2, 9]), torch.randn(3, 3, generator=generator, dtype=torch.float64)
    columns, mass = proxy_columns(ids, "captions")
    order = torch.tensor([[4, 2, 9].index(int(caption)) for caption in columns])
    torch.testing.assert_close(clip_loss(logits[:, order], mass), clip_loss(logits, proxy_columns(ids, "batch")[1]))


@pytest.mark.parametrize("proxies", ["captions", "batch"])
def test_the_space_of_a_batch_has_every_distinct_caption_encoded_once(proxies):
    space = proxy_space(rows_of([7, 3, 7, 5], 2), TOKENS_ML, SAME_M, proxies, alone)
    assert space.labels_K.tolist() == [3, 5, 7]
    assert torch.equal(space.tokens_UL, TOKENS_ML[[3, 5, 7]])
    assert torch.equal(space.labels_K[space.inverse_C], space.columns_C)
    columns, mass = proxy_columns(torch.tensor([7, 3, 7, 5]), proxies)
    assert torch.equal(space.columns_C, columns)
    assert torch.equal(space.upstream_mass(), mass), "without SAFLEX a row's mass is plain FLYP's"
    assert torch.equal(space.upstream_NK, F.one_hot(torch.tensor([2, 0, 2, 1]), 3).float())
    assert space.augmented_N.tolist() == [False, False, True, True]


def test_captions_with_equal_tokens_are_one_proxy_class():
    tokens = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4]])
    same = first_with_equal_tokens(tokens)
    assert same.tolist() == [0, 1, 0, 3, 1]
    space = proxy_space(rows_of([2, 4, 0, 1], 4), tokens, same, "captions", alone)
    assert space.labels_K.tolist() == [0, 1]
    assert space.upstream_NK.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize("proxies", ["captions", "batch"])
def test_mixed_rows_share_their_label_with_their_partner(proxies):
    rows = rows_of([7, 3, 7], 1, partners_N=torch.tensor([7, 5, 3]), share_N=torch.tensor([1.0, 0.75, 0.5]))
    space = proxy_space(rows, TOKENS_ML, SAME_M, proxies, alone)
    assert space.columns_C.tolist() == [3, 5, 7], "a partner's caption that no row has is a column as well"
    assert space.upstream_NK.tolist() == [[0, 0, 1], [0.75, 0.25, 0], [0.5, 0, 0.5]]
    assert torch.equal(space.upstream_mass(), space.upstream_NK)


def test_all_processes_have_one_space():
    parts = [rows_of([7, 3], 1), rows_of([7, 5], 1)]

    def spaces(gather_of):
        return [proxy_space(rows, TOKENS_ML, SAME_M, "captions", gather_of(number)) for number, rows in enumerate(parts)]

    # Every process sees what both would send: the gathered tensor is that of all rows, whoever asks.
    whole = {"captions": torch.tensor([7, 3, 7, 5]), "augmented": torch.tensor([0, 1, 0, 1])}

    def gather_of(number):
        own = {key: value[2 * number : 2 * number + 2] for key, value in whole.items()}
        return lambda tensor: next(whole[key] for key in whole if torch.equal(tensor, own[key]))

    first, second = spaces(gather_of)
    assert first.labels_K.tolist() == second.labels_K.tolist() == [3, 5, 7]
    assert first.augmented_N.tolist() == second.augmented_N.tolist() == [False, True, False, True]
    assert torch.equal(first.upstream_NK, second.upstream_NK)
