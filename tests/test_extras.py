"""The bare install: what works without the extras, and the line where one is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flyp_saflex.errors import ConfigError
from flyp_saflex.extras import EXTRA_OF, explained, require
from flyp_saflex.user_text import tomllib

ROOT = Path(__file__).resolve().parents[1]
BARE = f"""
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {sorted(EXTRA_OF)} else found(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
from flyp_saflex.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line where no package of an extra can be imported."""


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BARE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


@pytest.mark.slow
def test_data_train_evaluate_and_predict_need_no_extra(tiny_options: list[str], tiny_images_dir: Path, tmp_path: Path) -> None:
    options = [part for option in tiny_options for part in ("--set", option)]
    run, images = str(tmp_path / "run"), str(tiny_images_dir)
    for command in (
        ["data", "folder", *options],
        ["train", "folder", *options, "--run-dir", run],
        ["evaluate", run],
        ["predict", run, images, "--out", str(tmp_path / "out.csv")],
    ):
        done = bare(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert (tmp_path / "out.csv").read_text().count("\n") > 10
    line = "flyp-saflex: flyp-saflex report needs matplotlib, which is not installed; pip install 'flyp-saflex[report]'\n"
    assert bare("report", run, "--out", str(tmp_path / "report.html")).stderr == line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["data", "iwildcam", "--set", "data.root=."], "data.name = iwildcam needs wilds, which is not installed"),
        (
            ["prompts", "folder"],
            "flyp-saflex prompts needs transformers, which is not installed; pip install",
        ),
    ],
    ids=["wilds", "edits"],
)
def test_a_missing_extra_is_one_line(arguments: list[str], line: str) -> None:
    done = bare(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert line in done.stderr


def test_several_missing_packages_are_named_with_their_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wilds", "onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"x needs wilds and onnx and onnxruntime, which are .*flyp-saflex\[onnx,wilds\]'"):
        require("x", "wilds", "onnx", "onnxruntime", "matplotlib")


def test_other_modules_are_not_explained() -> None:
    assert explained(ModuleNotFoundError("no", name="torch.nothing"), "train") is None
    assert explained(ModuleNotFoundError("no"), "train") is None


def test_every_package_is_in_its_extra_and_in_no_other_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in EXTRA_OF.items():
        assert any(line.startswith(f"{package}>") for line in extras[extra]), package
        assert not any(line.startswith(f"{package}>") for line in project["dependencies"]), package
