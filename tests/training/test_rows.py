"""Mixed rows of several processes, and validation rows of a refresh: in turn, the whole split, or those that a bank renews."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from flyp_saflex import recipe
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.tasks.task import Processes
from flyp_saflex.training.batches import read_steps
from flyp_saflex.training.rows import RowBuilder, ValidationRows
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


@pytest.mark.parametrize("upstream", ["mixup", "cutmix"])
def test_processes_mix_the_rows_that_one_mixes(make_config, upstream):
    setup = prepare(make_config(f"augment.upstream={upstream}"))
    barrier, sent = Barrier(2, timeout=60), [None, None]

    def build(rank, count):
        def gather(tensor):
            sent[rank] = tensor
            barrier.wait()
            together = torch.cat(sent)
            barrier.wait()
            return together

        processes = Processes(gather=gather, rank=rank, count=count) if count > 1 else Processes()
        (batch,) = next(read_steps(setup, None, 0, 1, rank, count))
        return RowBuilder(setup, torch.device("cpu"), processes=processes).build(batch, 0, 0)

    one = build(0, 1)
    with ThreadPoolExecutor(2) as threads:
        two = list(threads.map(lambda rank: build(rank, 2), range(2)))
    names = ("inputs", "captions_N", "labels_N", "partners_N", "partner_labels_N", "share_N")
    for rank, rows in enumerate(two):
        for name in names:
            assert torch.equal(getattr(rows, name)[rows.num_train :], getattr(one, name)[one.num_train :][rank::2]), name
    assert not torch.equal(one.partner_labels_N[6:], one.labels_N[6:])


def test_a_second_mix_is_refused(make_config):
    with pytest.raises(ConfigError, match="'mixup', 'cutmix'"):
        prepare(make_config("augment.upstream=['mixup', 'cutmix']"))


def test_the_training_gradient_reads_training_rows_without_augmentation_and_needs_no_validation_split(make_config):
    setup = prepare(make_config(*SAFLEX, "saflex.preset=robust", "saflex.gradient_rows=train", "saflex.validation_split=none"))
    rows = ValidationRows(setup, None, torch.device("cpu"))
    assert rows.samples == setup.dataset.train.samples
    whole = refresh(setup, rows, 0)
    assert whole.labels_V.tolist() == [sample.label for sample in rows.samples]
    with pytest.raises(DataError):
        prepare(make_config(*SAFLEX, "saflex.preset=robust", "saflex.validation_split=none"))
    posterior = make_config(*SAFLEX, "saflex.preset=robust", "saflex.gradient_rows=train", "saflex.weight_rule=all")
    notes = prepare(recipe.override(posterior, ["saflex.agreement=ignore"], "test")).notes
    assert any("saflex.gradient_rows has no effect" in note for note in notes)
