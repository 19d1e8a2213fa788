"""The floors of the package, read from the source with `ast`: imports go down only, and each concept has one home."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flyp_saflex"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOP = sorted(PACKAGE.glob("*.py"))  # floors 0 and 1, and the command line
HEAVY = {
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "pandas",
    "numpy",
    "pyarrow",
    "sklearn",
    "open_clip",
    "wilds",
    "matplotlib",
}
COMMANDS = {"data", "prompts", "generate", "filter", "train", "evaluate", "report", "demo"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, module_level: bool = False) -> Iterator[str]:
    """Yield the dotted names that a file imports; `if TYPE_CHECKING:` and, on request, function bodies are left out."""
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack.extend(node.orelse)
        elif not (module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            stack.extend(ast.iter_child_nodes(node))


def top_level(name: str) -> str:
    return name.partition(".")[0]


def importers(library: str) -> set[str]:
    return {module_name(path) for path in SOURCES if library in map(top_level, imports(path))}


def offenders(folder: str, *forbidden: str) -> list[str]:
    return [
        f"{module_name(path)} imports {name}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for name in imports(path)
        if name.startswith(tuple(f"flyp_saflex.{other}" for other in forbidden))
    ]


def tracked_files() -> list[Path]:
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("not a git checkout: which files are tracked is unknown")
    return [path for name in git.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_reader_sees_imports(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import torch.nn\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas\n"
        "try:\n    from wilds.common import x\nexcept ImportError:\n    pass\ndef f():\n    import numpy\n",
        encoding="utf-8",
    )
    assert set(imports(source)) == {"torch.nn", "typing.TYPE_CHECKING", "wilds.common.x", "numpy"}
    assert set(imports(source, module_level=True)) == {"torch.nn", "typing.TYPE_CHECKING", "wilds.common.x"}
    assert len(SOURCES) > 10


@pytest.mark.parametrize("path", TOP, ids=module_name)
def test_floors_0_and_1_and_the_command_line_are_light(path: Path) -> None:
    heavy = {top_level(imported) for imported in imports(path, module_level=True)} & HEAVY
    assert heavy == set()


@pytest.mark.parametrize("path", [path for path in TOP if path.stem not in ("__init__", "__main__", "cli")], ids=module_name)
def test_floors_0_and_1_import_nothing_from_above(path: Path) -> None:
    above = [name for name in imports(path) if re.match(r"flyp_saflex\.(method|data|stages|cli|assets)\b", name)]
    assert above == []


def test_method_knows_no_files_of_ours_and_no_stage() -> None:
    assert offenders("method", "data", "stages", "cli", "cache", "rundir", "recipe", "assets") == []


def test_data_knows_no_model_and_no_stage() -> None:
    assert offenders("data", "method", "stages", "cli", "rundir", "recipe", "assets") == []


def test_only_the_command_line_imports_stages() -> None:
    for path in SOURCES:
        name = module_name(path)
        if not name.startswith("flyp_saflex.stages") and name != "flyp_saflex.cli":
            assert not any(imported.startswith("flyp_saflex.stages") for imported in imports(path)), name


def test_no_stage_imports_a_sibling() -> None:
    """A command's module is imported by no other; the demo alone runs the other commands one after another."""
    for path in sorted((PACKAGE / "stages").glob("*.py")):
        for imported in imports(path):
            if (match := re.match(r"flyp_saflex\.stages\.(\w+)", imported)) and path.stem != "demo":
                assert match[1] not in COMMANDS - {path.stem}, f"stages/{path.name} imports its sibling stages/{match[1]}.py"


def test_each_library_has_one_home() -> None:
    assert importers("open_clip") == {"flyp_saflex.method.clip"}
    assert importers("diffusers") <= {"flyp_saflex.stages.editor"}
    assert importers("transformers") <= {"flyp_saflex.stages.describe", "flyp_saflex.stages.editor"}
    assert importers("matplotlib") == {"flyp_saflex.stages.report_plots"}
    assert importers("pandas") | importers("wilds") <= {module_name(p) for p in (PACKAGE / "data").rglob("*.py")} | {
        "flyp_saflex.method.metrics"
    }


def test_no_import_cycle() -> None:
    names = {module_name(path): path for path in SOURCES}
    graph = {
        name: {other for imported in imports(path, module_level=True) for other in names if imported.startswith(other + ".")}
        for name, path in names.items()
    }
    graph = {name: {other for other in edges if other not in (name, "flyp_saflex")} for name, edges in graph.items()}
    while free := [name for name, edges in graph.items() if not edges & graph.keys()]:
        for name in free:
            del graph[name]
    assert graph == {}


def test_concepts_have_names() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [str(path) for path in tracked_files() if path.stem.lower() in vague or path.parent.name.lower() in vague] == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_file_is_short_and_says_its_role(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    doc = ast.get_docstring(ast.parse(text))
    assert doc
    if not path.name.startswith("__"):
        assert "floor" in doc, "the module docstring names its floor"


def test_no_machine_path_and_no_registry_in_tracked_files() -> None:
    folders = "work|root|home|Users|opt|tmp/[a-z]"
    registries = ["pypi", "pythonhosted", "download.pytorch", "anaconda", "test.pypi"]
    machine_path = re.compile(rf"""(?<![\w.<>*}}/~-])/(?:{folders})/""")
    registry = re.compile("|".join(re.escape(name) + r"\.org" for name in registries))
    found = []
    for path in tracked_files():
        if path.suffix in {".png", ".jpg", ".safetensors", ".parquet", ".svg", ".gz"} or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if machine_path.search(line) or registry.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
