"""Points of extension: every name leads to something, a wrong one to the nearest, and an entry may be added and taken away."""

from __future__ import annotations

import pytest

from flyp_saflex import tables
from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError
from flyp_saflex.saflex.objectives import Objective
from flyp_saflex.tables import CHOICES, METHODS, METRICS, OBJECTIVES, TASKS, UPSTREAMS, Metric, Table
from flyp_saflex.tasks.task import Task
from flyp_saflex.training.upstreams import Upstream

ALL = [value for value in vars(tables).values() if isinstance(value, Table)]


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.option)
def test_every_name_leads_to_an_entry(table: Table) -> None:
    assert len(table) > 0
    for name in table:
        assert not isinstance(table[name], str), f"{table.option} = {name} was not imported"


def test_entries_are_of_their_kind() -> None:
    assert all(issubclass(TASKS[name], Task) for name in TASKS)
    assert all(isinstance(OBJECTIVES[name], Objective) for name in OBJECTIVES)
    for name in UPSTREAMS:
        upstream = UPSTREAMS[name]
        assert isinstance(upstream, Upstream)
        assert (upstream.is_pool, upstream.operation is not None, upstream.mix is not None).count(True) == 1, name


def test_a_method_names_a_task_an_objective_and_options_for_its_phases() -> None:
    for name in METHODS:
        method = METHODS[name]
        TASKS.check(method.task)
        OBJECTIVES.check(method.objective)
        assert all(hasattr(Config().train, phase.steps) for phase in method.phases), name
    assert [name for name in METHODS if METHODS[name].only_head] == ["linear-probe"]


def test_an_option_with_a_table_exists_and_its_default_is_in_it() -> None:
    for table in CHOICES:
        section, _, field = table.option.partition(".")
        value = getattr(getattr(Config(), section), field)
        for name in value if isinstance(value, tuple) else (value,):
            table.check(name)


def test_a_wrong_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"train\.method = 'flip': expected one of flyp, .*did you mean 'flyp'"):
        METHODS["flip"]


def test_an_entry_is_imported_when_it_is_first_used_or_given_as_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    table: Table = Table("colour", {"broken": "nowhere.at.all:THING"})
    table.check("broken")
    assert list(table) == ["broken"]
    with pytest.raises(ModuleNotFoundError):
        table["broken"]
    thing = object()
    monkeypatch.setitem(table, "mine", thing)
    assert table["mine"] is thing
    monkeypatch.undo()
    assert "mine" not in table
    assert table.get("mine", 3) == 3


def test_a_metric_knows_its_unit_and_direction() -> None:
    assert METRICS["accuracy"].better(0.6, 0.5)
    assert METRICS["ece"].better(0.1, 0.2)
    assert METRICS["accuracy"].text(0.1234) == "12.3"
    assert METRICS["accuracy"].text(0.1234, sign=True) == "+12.3"
    seconds = Metric(title="Time", short="s", compute=lambda scores: 1.5, is_fraction=False, larger_is_better=False)
    assert (seconds.unit, seconds.text(1.23456), seconds.text(None), seconds.better(1.0, 2.0)) == ("", "1.235", "-", True)
    assert seconds.of(None) == 1.5  # type: ignore[arg-type]
