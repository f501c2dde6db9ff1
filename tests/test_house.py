"""The rules of the house: who may import whom, how long things may get, which pages are generated."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.provider import PROVIDER

ROOT = Path(__file__).parents[1]
STAGE_MODULES = {reference.partition(":")[0] for reference in PROVIDER.stages.values()}
HEAVY = {"tvm", "torch", "transformers", "tiktoken"}
ROOMS = {"models", "graph", "quantization", "lowering", "targets", "tokenizers"}
MAY_IMPORT = {  # room -> other rooms of the domain it may import
    "models": set(),
    "quantization": set(),
    "targets": set(),
    "tokenizers": {"runtime"},
    "graph": {"models", "targets", "lowering"},
    "lowering": {"models", "targets"},
    "codegen": {"keeper", "lowering", "targets"},
    "runtime": set(),
    "packing": {"runtime"},
    "conversion": {"keeper", "models", "quantization", "targets"},
    "verification": {"models", "quantization", "runtime", "tokenizers"},
    "cli": {"runtime", "models"},
}
# The engine's rooms: each imports itself, those before it, and the ground beneath them all.
ENGINE = ("spec", "store", "planning", "execution", "project", "query", "api", "cli")
GROUND = {"digest", "errors", "files", "local", "registry", "shell", "stage", "tools"}
MAX_MODULE, MAX_FUNCTION = 500, 60


def modules(*packages: str) -> list[Path]:
    return sorted(p for package in packages for p in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield node.module or ""


def top_level(tree: ast.Module) -> ast.Module:
    """Only what runs on import: no function bodies, no TYPE_CHECKING blocks."""
    body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    return ast.Module(body=body, type_ignores=[])


@pytest.mark.parametrize("path", modules("stagegraph"), ids=name_of)
def test_the_engine_knows_nothing_of_the_domain(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
    assert not roots & (HEAVY | {"stages"})


@pytest.mark.parametrize("path", modules("stagegraph"), ids=name_of)
def test_the_engine_imports_networkx_and_rich_late(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imported(top_level(ast.parse(path.read_text())))}
    assert not roots & {"networkx", "rich", "jsonschema", "asyncio"}


@pytest.mark.parametrize("path", modules("stagegraph"), ids=name_of)
def test_the_rooms_of_the_engine_import_one_way(path: Path) -> None:
    if name_of(path) == "stagegraph":  # the front door, which imports late
        return
    room = name_of(path).split(".")[1]
    allowed = GROUND | set(() if room in GROUND else ENGINE[: ENGINE.index(room) + 1])
    for name in imported(ast.parse(path.read_text())):
        if name.startswith("stagegraph."):
            assert name.split(".")[1] in allowed, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("module", sorted(STAGE_MODULES))
def test_stage_modules_are_light_and_apart(module: str) -> None:
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    for name in imported(top_level(tree)):
        assert name == "stagegraph.stage" or name.partition(".")[0] in sys.stdlib_module_names, name
    others = STAGE_MODULES - {module}
    assert not others & set(imported(tree)), "data passes by artifact only"


@pytest.mark.parametrize("path", modules("stages"), ids=name_of)
def test_rooms_import_only_whom_they_may(path: Path) -> None:
    parts = name_of(path).split(".")
    if name_of(path) in STAGE_MODULES or (len(parts) < 3 and not (ROOT / "stages" / parts[-1]).is_dir()):
        return
    room = parts[1]
    for name in imported(ast.parse(path.read_text())):
        root, _, rest = name.partition(".")
        assert root != "stagegraph", f"{name_of(path)} imports the engine"
        if root == "stages" and rest:
            other = rest.partition(".")[0]
            assert other == room or other in MAY_IMPORT[room], f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", modules("stagegraph", "stages"), ids=name_of)
def test_only_command_lines_print_or_exit(path: Path) -> None:
    if "cli" in path.parts or path.name in {"__main__.py", "command.py"}:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "sys.exit", "exit"}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", modules("stagegraph", "stages", "benchmarks"), ids=name_of)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE
    tree = ast.parse(text)
    assert not text.strip() or ast.get_docstring(tree), "a module says what it owns"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION, f"{node.name} at line {node.lineno}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions and those for types alone count too."""
    import networkx as nx

    names = {name_of(path): path for path in modules("stagegraph", "stages")}
    imports = nx.DiGraph()
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imports.add_edges_from((name, alias.name) for alias in node.names if alias.name in names)
            elif isinstance(node, ast.ImportFrom):
                found = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                imports.add_edges_from((name, other) for other in found or {node.module} & names.keys())
    circles = [sorted(circle) for circle in nx.strongly_connected_components(imports) if len(circle) > 1]
    assert not circles


def test_generated_pages_are_fresh() -> None:
    code = "import sys; sys.path.insert(0, 'docs'); import generate, json; print(json.dumps(generate.pages()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    import json

    for name, text in json.loads(done.stdout).items():
        assert (ROOT / "docs" / name).read_text() == text, f"docs/{name} is stale: run `python docs/generate.py`"


@pytest.mark.parametrize("argv", [["status"], ["run", "--dry-run"], ["graph"], ["schema"], ["models"]])
def test_looking_verbs_load_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys; from stagegraph.cli.main import dispatch; dispatch(sys.argv[1:]);"
        "print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))
    assert not loaded & (HEAVY | {"numpy", "tokenizers", "rich"})


def test_the_runtime_stands_alone() -> None:
    """Nothing of the compiler side, of the engine or of the reference may be needed where a bundle runs."""
    for path in modules("stages/runtime"):
        roots = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
        allowed = {"stages", "numpy", "tvm", "tvm_ffi", "tokenizers", "jinja2"}
        assert roots <= set(sys.stdlib_module_names) | allowed, path
