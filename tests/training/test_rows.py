"""Which validation rows a refresh reads: in turn, the whole split, or those that a bank renews."""

import pytest
import torch

from flyp_saflex.training.rows import ValidationRows
from flyp_saflex.training.setup import prepare

SAFLEX = ("augment.upstream=flip", "saflex.enabled=true", "data.select_fraction=0.5")


def build(make_config, *options):
    setup = prepare(make_config(*SAFLEX, *options))
    return setup, ValidationRows(setup, None, torch.device("cpu"))


def refresh(setup, rows, step):
    """Do to the bank what a step does, with the mean pixel for a feature; return the rows that were read."""
    read = rows.at(step, setup.saflex.settings)
    if read.slots_V is not None:
        setup.saflex.bank.renew(read.slots_V, read.inputs.mean(dim=(1, 2, 3))[:, None], read.labels_V, read.captions_V)
    return read


def test_rows_in_turn_go_through_the_whole_split(make_config):
    setup, rows = build(make_config, "saflex.validation_rows=4", "saflex.refresh_every=2")
    read = torch.cat([refresh(setup, rows, step).inputs for step in (0, 2, 4)])
    assert len(rows.samples) == 12
    assert len(torch.unique(read.flatten(1), dim=0)) == 12


def test_a_split_that_is_small_enough_is_read_once(make_config, monkeypatch):
    setup, rows = build(make_config)
    whole = refresh(setup, rows, 0)
    monkeypatch.setattr(rows, "_read", None)
    assert refresh(setup, rows, 4) is whole
    assert whole.slots_V is None


@pytest.mark.parametrize("resumed", [False, True])
def test_a_bank_of_the_whole_split_is_renewed_in_turn(make_config, resumed):
    setup, rows = build(make_config, "saflex.validation_renewed=5")
    whole = refresh(setup, rows, 0)
    assert whole.slots_V.tolist() == list(range(12))
    if resumed:
        state = setup.saflex.state_dict()
        setup, rows = build(make_config, "saflex.validation_renewed=5")
        setup.saflex.load_state_dict(state)
    for step, slots in ((4, [0, 1, 2, 3, 4]), (8, [5, 6, 7, 8, 9]), (12, [10, 11, 0, 1, 2])):
        read = refresh(setup, rows, step)
        assert read.slots_V.tolist() == slots
        assert torch.equal(read.inputs, whole.inputs[slots])
        assert torch.equal(read.labels_V, whole.labels_V[slots])
    assert torch.equal(setup.saflex.bank.labels_V, whole.labels_V)


def test_a_bank_that_is_smaller_than_the_split_goes_through_all_of_it(make_config):
    setup, rows = build(make_config, "saflex.validation_rows=6", "saflex.validation_renewed=2")
    seen = [refresh(setup, rows, step) for step in (0, 4, 8, 12)]
    assert [read.slots_V.tolist() for read in seen] == [[0, 1, 2, 3, 4, 5], [0, 1], [2, 3], [4, 5]]
    assert len(torch.unique(torch.cat([read.inputs for read in seen]).flatten(1), dim=0)) == 12
    assert torch.equal(setup.saflex.bank.labels_V, torch.cat([read.labels_V for read in seen[1:]]))


def test_renewing_as_many_as_there_are_needs_no_bank(make_config):
    setup, rows = build(make_config, "saflex.validation_renewed=12")
    assert refresh(setup, rows, 0).slots_V is None


def test_renewing_without_effect_is_noted(make_config):
    assert "validation_renewed" not in " ".join(build(make_config, "saflex.scope=all")[0].notes)  # the preset's value
    setup, rows = build(make_config, "saflex.validation_renewed=2", "saflex.scope=all")
    assert "no effect with saflex.scope=all" in " ".join(setup.notes)
    assert refresh(setup, rows, 0).slots_V is None
