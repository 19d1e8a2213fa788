"""The rooms of the package, read from the source with `ast`: one order of imports, and one home for each library."""

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
ORDER = (
    "errors", "user_text", "ranges", "tables", "presets", "comparing", "offline", "extras", "network_options", "config",
    "option_docs", "records", "runtime", "recipe",  # the ground
    "saflex", "clip",  # the papers in tensors, the models
    "storage", "images", "data",  # what lies on disk, pixels, datasets
    "tasks", "step", "evaluation", "training", "predicting",  # a model's step, its scores, the loop
    "prompting", "editing", "filtering", "reporting", "exporting", "comparison", "demo",  # the other commands
    "arguments", "cli", "__main__",
)  # fmt: skip
"""A room imports only from rooms before it. `assets` and `recipes` are data, open to all."""
LIGHT = (*ORDER[: ORDER.index("saflex")], "storage", "arguments", "cli", "__init__", "__main__")
"""The ground, what lies on disk and the command line start at once: no heavy library at module level."""
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "pandas", "numpy", "pyarrow", "sklearn", "open_clip"}
HEAVY |= {"wilds", "matplotlib"}
HOMES = {
    "open_clip": {"clip.imagenet", "clip.model", "clip.weights_files"},
    "diffusers": {"editing.diffusers_editor"},
    "transformers": {
        "clip.foreign_code",
        "editing.pipeline_loading",
        "prompting.language_models",
        "exporting.transformers_clip",
    },
    "huggingface_hub": {"data.hf", "editing.adapters", "exporting.hub"},
    "matplotlib": {"reporting.plots"},
    "wilds": {"data.wilds", "data.wilds_sets", "evaluation.metrics"},
    "datasets": {"data.hf"},
    "pandas": {"data.wilds", "data.cub", "data.table", "data.tabular_encoding"},
    "cleanlab": {"predicting.label_issues"},
}
"""Where a library may be imported: in one place, so that it can be exchanged."""


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


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


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


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_room_imports_only_from_rooms_before_it(path: Path) -> None:
    own = room(path)
    if own in ("__init__", "assets", "recipes"):
        return
    allowed = {*ORDER[: ORDER.index(own) + 1], "assets", "recipes", "__version__"}
    found = {name.split(".")[1] for name in imports(path) if name.startswith("flyp_saflex.")}
    assert found - allowed == set()


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(path) for path in SOURCES} - {*ORDER, "__init__", "assets", "recipes"} == set()


@pytest.mark.parametrize("path", [path for path in SOURCES if room(path) in LIGHT], ids=module_name)
def test_the_ground_is_light(path: Path) -> None:
    assert {top_level(imported) for imported in imports(path, module_level=True)} & HEAVY == set()


@pytest.mark.parametrize("library", HOMES)
def test_each_library_has_one_home(library: str) -> None:
    assert importers(library) <= {f"flyp_saflex.{module}" for module in HOMES[library]}


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
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text))


def test_no_machine_path_and_no_registry_in_tracked_files() -> None:
    folders = "work|root|home|Users|opt|tmp/[a-z]"
    registries = ["pypi", "pythonhosted", "download.pytorch", "anaconda", "test.pypi"]
    machine_path = re.compile(rf"""(?<![\w.<>*}}/~-])/(?:{folders})/""")
    registry = re.compile("|".join(re.escape(name) + r"\.org" for name in registries))
    found = []
    for path in tracked_files():
        if path.suffix in {".png", ".jpg", ".safetensors", ".parquet", ".svg", ".gz", ".xz"} or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if machine_path.search(line) or registry.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_every_name_in_a_table_can_be_imported() -> None:
    from flyp_saflex import tables

    found = [value for value in vars(tables).values() if isinstance(value, tables.Table)]
    assert len(found) >= 8
    for table in found:
        assert all(table[name] is not None for name in table), table.option
    assert all(metric.of is not None and tables._imported(metric.compute) for metric in tables.METRICS.values())


def test_every_option_is_declared_once() -> None:
    """No dataclass repeats three or more fields of a recipe's section: their types and defaults would drift apart."""
    fields: dict[str, set[tuple[str, str]]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(part) for part in node.decorator_list):
                declared = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                names = {(ast.unparse(field.target), ast.unparse(field.annotation)) for field in declared}
                fields[f"{path.stem}.{node.name}"] = names
    sections = {name for name in fields if name.startswith(("config.", "presets."))}
    assert len(sections) > 8
    repeated = {
        (one, other) for one in fields for other in sections if one not in sections and len(fields[one] & fields[other]) >= 3
    }
    assert repeated == set()
    assert not any(fields[one] & fields[other] for one in ("config.SaflexConfig",) for other in ("presets.SaflexSettings",))
