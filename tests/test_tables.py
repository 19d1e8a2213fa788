"""Tables by name: entries are imported when used, unknown names tell the nearest."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from flyp_saflex.errors import ConfigError
from flyp_saflex.tables import METRICS, WEIGHT_RULES, Metric, Table


def test_an_entry_is_an_object_or_the_name_of_one() -> None:
    table: Table = Table("x.y", {"pi": "saflex.closed_form:keep_all", "e": math.e})
    assert table["pi"].__name__ == "keep_all"
    assert table["e"] == math.e
    assert list(table) == ["pi", "e"]
    assert "tau" not in table
    assert table.get("tau") is None
    table["tau"] = 6.28
    assert table["tau"] == 6.28
    del table["tau"]
    assert len(table) == 2


def test_an_unknown_name_is_one_line_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"saflex\.weight_rule = 'upstrem': expected one of .*; did you mean 'upstream'\?"):
        WEIGHT_RULES["upstrem"]


def test_names_are_checked_without_importing_what_they_stand_for() -> None:
    code = "import sys; from flyp_saflex import recipe; recipe.load('folder'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_metrics_are_told_in_their_unit_and_compared_in_their_direction() -> None:
    nats = Metric(title="NLL", short="NLL", compute=lambda scores: 0.0, is_fraction=False, larger_is_better=False)
    assert (nats.text(0.12345), nats.text(-0.1, sign=True), nats.text(None)) == ("0.123", "-0.100", "-")
    assert (METRICS["accuracy"].text(0.1234), METRICS["accuracy"].text(0.02, sign=True)) == ("12.3", "+2.0")
    assert nats.better(0.1, 0.2)
    assert not nats.better(0.2, 0.2)
    assert METRICS["accuracy"].better(0.2, 0.1)
