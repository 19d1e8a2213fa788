"""Every script can be imported: names that it takes from the package are still there."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.parametrize("name", sorted(str(path.relative_to(SCRIPTS)) for path in SCRIPTS.rglob("*.py")))
def test_script_finds_all_that_it_imports(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str((SCRIPTS / name).parent), *sys.path])  # as `python scripts/NAME` sets it
    runpy.run_path(str(SCRIPTS / name), run_name="imported")
