"""./scripts/test and ./scripts/demo: the environment they build, with a Python whose `venv` and `pip` only take notes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

# Stands for the interpreter: real but for `-m venv`, which makes a folder whose tools write their names and arguments.
PYTHON = """#!/bin/bash
if [ "${1:-} ${2:-}" != "-m venv" ]; then exec %(python)s "$@"; fi
echo venv >>%(notes)s
mkdir -p "$3/bin"
for tool in python ruff mypy flyp-saflex; do
  printf '#!/bin/bash\\n[ "$1" != -c ] || exit 0\\necho "%%s $*" >>%(notes)s\\n' "$tool" >"$3/bin/$tool"
  echo 'case "$*" in *"pip install"*) sleep 0.3; [ ! -e %(broken)s ] || { echo no network; exit 1; } ;; esac' >>"$3/bin/$tool"
  chmod +x "$3/bin/$tool"
done
"""


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.root, self.notes, self.broken = folder / "checkout", folder / "notes", folder / "broken"
        shutil.copytree(
            ROOT / "scripts",
            self.root / "scripts",
            ignore=lambda folder, names: [n for n in names if "." in n[1:] and not n.endswith(".sh")],
        )
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.python = folder / "python"
        self.python.write_text(PYTHON % {"python": sys.executable, "notes": self.notes, "broken": self.broken}, encoding="utf-8")
        self.python.chmod(0o755)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [f"scripts/{command[0]}", *command[1:]],
            cwd=self.root,
            env=os.environ | {"PYTHON": str(self.python)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, **environment: str) -> tuple[int, str]:
        process = self.start(*command, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def noted(self) -> list[str]:
        lines = self.notes.read_text(encoding="utf-8").splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return lines


INSTALL = "python -m pip install --progress-bar off -c constraints.txt -e .[dev,tracking]"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_environment_is_built_once_and_again_when_its_inputs_change(checkout: Checkout) -> None:
    code, output = checkout.run("demo", "--out", "there")
    assert (code, "Building the environment" in output) == (0, True)
    assert checkout.noted() == ["venv", INSTALL, "flyp-saflex demo --out there"]
    assert checkout.run("demo") == (0, "")
    assert checkout.noted() == ["flyp-saflex demo"]
    with open(checkout.root / "pyproject.toml", "a", encoding="utf-8") as file:
        file.write("\n[tool.other]\n")  # installs nothing
    assert checkout.run("demo") == (0, "")
    with open(checkout.root / "constraints.txt", "a", encoding="utf-8") as file:
        file.write("# changed\n")
    checkout.noted()
    assert checkout.run("demo")[0] == 0
    assert checkout.noted() == ["venv", INSTALL, "flyp-saflex demo"]


def test_half_made_environment_is_reported_and_rebuilt(checkout: Checkout) -> None:
    checkout.broken.touch()
    code, output = checkout.run("demo")
    assert code == 1
    assert "no network" in output
    assert "pip could not install the packages" in output
    checkout.broken.unlink()
    checkout.noted()
    assert checkout.run("demo")[0] == 0
    assert checkout.noted() == ["venv", INSTALL, "flyp-saflex demo"]


def test_two_invocations_at_once_build_once(checkout: Checkout) -> None:
    processes = [checkout.start("demo", "--out", name) for name in "abc"]
    assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0, 0, 0]
    noted = checkout.noted()
    assert noted.count("venv") == 1
    assert sorted(noted[2:]) == [f"flyp-saflex demo --out {name}" for name in "abc"]


def test_a_persons_own_environment_is_left_alone(checkout: Checkout) -> None:
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / "mine").touch()
    code, output = checkout.run("demo")
    assert code == 1
    assert "was not made by these scripts" in output
    assert (checkout.root / ".venv" / "mine").exists()


def test_a_python_that_will_not_do_is_named(checkout: Checkout) -> None:
    code, output = checkout.run("test", PYTHON="/no/such/python")
    assert code == 1
    assert "PYTHON=/no/such/python is not a Python >= 3.10" in output
    assert not (checkout.root / ".venv").exists()


def test_too_little_disk_is_said_before_anything_is_installed(checkout: Checkout, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "df").write_text("#!/bin/bash\necho head\necho disk 9 9 1048576 9 /\n", encoding="utf-8")
    (tools / "df").chmod(0o755)
    code, output = checkout.run("demo", PATH=f"{tools}:{os.environ['PATH']}")
    assert code == 1
    assert "1 GB free" in output
    assert checkout.noted() == []


def test_test_runs_lint_types_and_pytest(checkout: Checkout) -> None:
    checkout.run("demo")
    checkout.noted()
    for arguments, passed in (
        ([], "-m not slow"),
        (["--all", "-x"], "-x"),
        (["-m", "slow"], "-m slow"),
        (["tests/test_cli.py", "-k", "help"], "tests/test_cli.py -k help -m not slow"),
    ):
        assert checkout.run("test", *arguments) == (0, "")
        assert checkout.noted() == [
            "ruff check --quiet .",
            "ruff format --quiet --check .",
            "mypy --no-error-summary",
            f"python -m pytest {passed}",
        ]


def test_ci_runs_the_readme_command_with_slow_tests() -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert text.rstrip().endswith("exec ./scripts/test --all")
    for script in (".ci/run", "scripts/test", "scripts/demo"):
        assert os.access(ROOT / script, os.X_OK), script
