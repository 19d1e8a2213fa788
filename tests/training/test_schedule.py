"""The start of a run: learning rates of its phases, what may change on resuming."""

import pytest
import torch

from flyp_saflex.tables import METHODS
from flyp_saflex.training.schedule import Phase, phases_of
from flyp_saflex.training.setup import prepare


def rates(phase, warmup_steps=0, floor=0.0, schedule="cosine"):
    return [phase.rate(step, warmup_steps, floor, schedule) for step in range(phase.start, phase.end)]


def test_rate_warms_up_linearly_and_falls_as_a_cosine():
    found = rates(Phase("train", 0, 100, False), warmup_steps=10)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert found[10] == 1.0
    assert found[55] == pytest.approx(0.5)
    assert found[10:] == sorted(found[10:], reverse=True)
    assert 0 < found[-1] < 0.001


def test_warm_up_is_at_most_a_tenth_of_a_short_run():
    assert rates(Phase("train", 0, 20, False), warmup_steps=500)[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates(Phase("train", 0, 5, False), warmup_steps=500)[0] == 1.0
    assert rates(Phase("train", 0, 1, False), warmup_steps=500) == [1.0]


def test_the_cosine_ends_at_the_floor():
    found = rates(Phase("train", 0, 1000, False), floor=0.2)
    assert found[-1] == pytest.approx(0.2, abs=1e-4)
    assert min(found) >= 0.2
    assert rates(Phase("train", 0, 10, False), floor=1.0) == [1.0] * 10


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 41, 100])
def test_one_cycle_is_pytorchs(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, cycle_momentum=False)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < steps:
            schedule.step()
    assert rates(Phase("train", 7, steps, False), 500, 0.0, "one-cycle") == pytest.approx(expected, rel=1e-9)
    assert rates(Phase("train", 0, steps, False), 0, 0.2, "one-cycle")[-1] == pytest.approx(0.2)


def test_a_later_phase_has_a_schedule_of_its_own():
    assert rates(Phase("finetune", 7, 30, False), 2, 0.1) == rates(Phase("train", 0, 30, False), 2, 0.1)


def test_phases():
    def phases(method):
        return phases_of(METHODS[method].phases, steps=5, probe_steps=3)

    assert phases("flyp") == [Phase("train", 0, 5, False)]
    assert phases("linear-probe") == [Phase("train", 0, 5, True)]
    assert phases("lp-ft") == [Phase("linear-probe", 0, 3, True), Phase("finetune", 3, 5, False)]


def test_epochs_are_steps_of_the_training_split(make_config):
    """12 training images in batches of 6."""
    assert prepare(make_config("train.steps=0", "train.epochs=2.5")).total_steps == 5


def test_an_option_without_effect_is_noted(make_config):
    notes = prepare(make_config("train.patience=3")).notes
    assert "train.patience has no effect without train.evaluate_every and train.select_split" in notes
    assert not any("patience" in note for note in prepare(make_config("train.patience=3", "train.evaluate_every=1")).notes)


def test_warm_up_of_one_cycle_is_noted(make_config):
    assert any("train.warmup_steps has no effect" in note for note in prepare(make_config("train.schedule=one-cycle")).notes)
    assert not any("train.warmup_steps" in note for note in prepare(make_config()).notes)
