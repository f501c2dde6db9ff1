"""The rules of the house: who may import whom, which words belong where, how long things may get, what is generated.

A test reads all the code it is about and tells everything that breaks its rule at once.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from stages.provider import PROVIDER
from tests.support.long_tail import GONE

ROOT = Path(__file__).parents[1]
STAGE_MODULES = {reference.partition(":")[0] for reference in PROVIDER.stages.values()}
HEAVY = {"tvm", "torch", "transformers", "tiktoken"}
BASE = {"documents", "memo", "problems", "sizes"}  # what every room but the runtime may import
ENGINE_FOR_STAGES = {"stagegraph.errors", "stagegraph.stage"}  # what a stage may import of the engine
MAY_IMPORT = {  # room -> other rooms of the domain it may import
    "documents": set(),
    "checkpoint": set(),
    "ir": set(),
    "kernels": {"ir"},
    "targets": set(),
    "quantization": set(),
    "models": {"checkpoint", "kernels", "tracing"},
    "tracing": {"checkpoint"},
    "tokenizers": {"checkpoint", "runtime"},
    "graph": {"ir", "kernels", "models", "targets"},
    "lowering": {"ir", "kernels", "targets"},
    "codegen": {"ir", "lowering", "targets"},
    "calibration": {"quantization", "runtime", "verification"},
    "conversion": {"checkpoint", "models", "quantization", "targets"},
    "runtime": set(),
    "packing": {"runtime"},
    "verification": {"checkpoint", "memo", "models", "quantization", "runtime", "tokenizers", "tracing"},
    "inspection": {"checkpoint", "quantization"},
    "cli": {"checkpoint", "models", "quantization", "runtime", "targets"},
}
# The engine's rooms: each imports itself, those before it, and the ground beneath them all.
ENGINE = ("spec", "store", "remote", "planning", "execution", "project", "query", "api", "cli")
GROUND = {"digest", "errors", "files", "local", "registry", "shell", "stage", "tools"}
MAX_MODULE, MAX_FUNCTION = 400, 60
LATE = {"networkx", "rich", "jsonschema", "asyncio"}  # what the engine imports inside functions only
# What the engine knows nothing of; the examples that the help of its verbs shows are of the shipped stages.
FOREIGN = re.compile(
    r"nvcc|tvm|llvm|cuda|gpu|torch|transformers|hugging|safetensors|tensor|checkpoint|quanti[sz]|tokeni[sz]|vocab|prefill"
    r"|llama|qwen",
    re.IGNORECASE,
)
# Words that name nothing: for what somebody said, told or held there is a word that says what it is (docs/writing.md).
VAGUE = {"doubt", "doubts", "held", "keeper", "said", "teller", "told"}
REPEATING = {
    "stages.runtime.documents"
}  # a bundle's runtime travels alone, with its own copies of some documents' types
NAMED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
ENDING = {"print", "sys.exit", "exit", "quit", "SystemExit", "breakpoint"}  # calls of command lines alone
PRINTING = {"__main__.py", "command.py"}  # command lines outside of the rooms of that name
EXAMPLE = re.compile(r"^EXAMPLE = .*$", re.MULTILINE)


@functools.cache
def modules(*packages: str) -> dict[str, Path]:
    """Every module below these folders by its dotted name."""
    return {name_of(path): path for package in packages for path in sorted((ROOT / package).rglob("*.py"))}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names of modules; of ``from package import module`` both, as ours cannot be told from a name without looking."""
    known = modules("stagegraph", "stages")
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield node.module or ""
            yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in known)


def on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs on import: no bodies of functions, no TYPE_CHECKING blocks."""
    for node in ast.iter_child_nodes(tree):
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from on_import(node)


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """All that a module imports, inside functions and for types too."""
    return frozenset(imported(ast.walk(parsed(path))))


def root(name: str) -> str:
    return name.partition(".")[0]


def test_the_engine_knows_nothing_of_the_domain() -> None:
    """It imports nothing of it, has no word of it, and imports what is large inside functions."""
    problems = []
    for name, path in modules("stagegraph").items():
        roots = {root(other) for other in imports_of(path)}
        problems += [f"{name} imports {other}" for other in sorted(roots & (HEAVY | {"stages"}))]
        early = {root(other) for other in imported(on_import(parsed(path)))}
        problems += [f"{name} imports {other} at its top" for other in sorted(early & LATE)]
        text = EXAMPLE.sub("", path.read_text())
        problems += [
            f"{name}:{text.count(chr(10), 0, word.start()) + 1}: '{word[0]}' is a word of the domain"
            for word in FOREIGN.finditer(text)
        ]
    assert not problems, "\n".join(problems)


def test_rooms_import_only_what_they_may() -> None:
    """Those of the engine import one way; those of the domain whom ``MAY_IMPORT`` lists, and never the engine."""
    problems = []
    for name, path in modules("stagegraph").items():
        if name == "stagegraph":  # the front door, which imports late
            continue
        room = name.split(".")[1]
        if room not in {*GROUND, *ENGINE}:
            problems.append(f"{name} is in no room that this file lists")
            continue
        allowed = GROUND | set(() if room in GROUND else ENGINE[: ENGINE.index(room) + 1])
        others = {other for other in imports_of(path) if other.startswith("stagegraph.")}
        problems += [f"{name} imports {other}" for other in sorted(others) if other.split(".")[1] not in allowed]
    used: dict[str, set[str]] = {}
    for name, path in modules("stages").items():
        if name in {*STAGE_MODULES, "stages", "stages.profiles", "stages.provider"}:
            continue
        room = name.split(".")[1]
        if room not in {*MAY_IMPORT, *BASE}:
            problems.append(f"{name} is in no room that this file lists")
            continue
        allowed = {room} | MAY_IMPORT.get(room, set()) | (BASE if room != "runtime" else set())
        for other in sorted(imports_of(path)):
            if root(other) == "stagegraph":
                problems.append(f"{name} imports the engine: {other}")
            elif root(other) == "stages" and "." in other:
                used.setdefault(room, set()).add(other.split(".")[1])
                problems += [] if other.split(".")[1] in allowed else [f"{name} imports {other}"]
    problems += [
        f"{room} may import {others - used[room]}, and does not"
        for room, others in MAY_IMPORT.items()
        if others - used.get(room, set())
    ]
    assert not problems, "\n".join(problems)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions and those for types alone count too."""
    import networkx as nx

    names = modules("stagegraph", "stages")
    imports = nx.DiGraph()
    for name, path in names.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                imports.add_edges_from((name, alias.name) for alias in node.names if alias.name in names)
            elif isinstance(node, ast.ImportFrom):
                found = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                imports.add_edges_from((name, other) for other in found or {node.module} & names.keys())
    circles = [sorted(circle) for circle in nx.strongly_connected_components(imports) if len(circle) > 1]
    assert not circles, circles


def test_what_runs_on_its_own_imports_little() -> None:
    """Stages share no module, a bundle runs without the compiler side, a benchmark runs by its path."""
    problems = []
    for module in sorted(STAGE_MODULES):  # data passes by artifact only
        path = modules("stages")[module]
        problems += [
            f"{module} imports {name} at its top"
            for name in imported(on_import(parsed(path)))
            if name != "stagegraph.stage" and root(name) not in sys.stdlib_module_names
        ]
        engine = {name for name in imports_of(path) if root(name) == "stagegraph"}
        others = (STAGE_MODULES - {module}) & imports_of(path) | engine - ENGINE_FOR_STAGES
        problems += [f"{module} imports {other}" for other in sorted(others)]
    runtime = set(sys.stdlib_module_names) | {"stages", "numpy", "tvm", "tvm_ffi", "tokenizers", "jinja2"}
    # In its own room, and loaded by `serve` alone; h11 is what uvicorn reads HTTP with, and comes with it.
    server = runtime | {"llguidance", "starlette", "uvicorn", "h11"}
    for name, path in modules("stages/runtime").items():
        may = server if name.startswith("stages.runtime.server.") else runtime
        problems += [f"{name} imports {other}" for other in {root(other) for other in imports_of(path)} - may]
    benchmarks = modules("benchmarks")
    assert benchmarks
    for name, path in benchmarks.items():  # run by its path it finds what lies beside it, and no package of that name
        problems += [f"{name} imports {other}" for other in imports_of(path) if root(other) == "benchmarks"]
    assert not problems, "\n".join(problems)


def test_modules_are_small_say_what_they_own_and_print_only_as_command_lines() -> None:
    """And no name in them is of a word that names nothing, or that of two classes of the engine, or of the domain."""
    problems = []
    classes: dict[tuple[str, str], str] = {}
    for name, path in modules("stagegraph", "stages", "benchmarks").items():
        text, tree = path.read_text(), parsed(path)
        lines = len(text.splitlines())
        problems += [f"{name} has {lines} lines, of {MAX_MODULE} at most"] if lines > MAX_MODULE else []
        problems += [f"{name} does not say what it owns"] if text.strip() and not ast.get_docstring(tree) else []
        product = root(name) != "benchmarks"
        silent = product and "cli" not in path.parts and path.name not in PRINTING
        problems += vague(name, 1, name.rpartition(".")[2]) if product else []
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION
            ):
                problems.append(f"{name}:{node.lineno}: {node.name} has {MAX_FUNCTION} lines or more")
            if silent and isinstance(node, ast.Call) and ast.unparse(node.func) in ENDING:
                problems.append(f"{name}:{node.lineno}: {ast.unparse(node.func)} outside a command line")
            if product and (given := given_name(node)):
                problems += vague(name, node.lineno, given)
        for node in tree.body if product and name not in REPEATING else ():
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                other = classes.setdefault((root(name), node.name), name)
                problems += [] if other == name else [f"{name}:{node.lineno}: {node.name} is a class of {other} too"]
    assert not problems, "\n".join(problems)


def test_no_value_of_a_list_is_searched_for_in_it() -> None:
    """Of the million values that a stranger may write, that takes hours."""
    problems = []
    for name, path in modules("stagegraph", "stages").items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
                lists = {ast.unparse(each.iter) for each in node.generators}
                asked = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
                problems += [
                    f"{name}:{node.lineno}: {ast.unparse(func)} for each value of it"
                    for func in asked
                    if isinstance(func, ast.Attribute)
                    and func.attr in {"count", "index"}
                    and ast.unparse(func.value) in lists
                ]
    assert not problems, "\n".join(problems)


def given_name(node: ast.AST) -> str:
    """Return the name that a node gives to a function, class, parameter, variable or attribute, if any."""
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.id if isinstance(node, ast.Name) else node.attr
    return node.arg if isinstance(node, ast.arg) else node.name if isinstance(node, NAMED) else ""


def vague(module: str, line: int, name: str) -> list[str]:
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", name)}
    return [f"{module}:{line}: {name} names nothing (docs/writing.md)"] if VAGUE & words else []


def test_generated_pages_are_fresh() -> None:
    code = "import sys; sys.path.insert(0, 'docs'); import generate, json; print(json.dumps(generate.pages()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    problems = [
        f"{name} is stale: run `python docs/generate.py`"
        for name, text in json.loads(done.stdout).items()
        if (ROOT / "docs" / name).read_text() != text
    ]
    assert not problems, "\n".join(problems)


def test_looking_verbs_load_nothing_heavy() -> None:
    code = (
        "import json, sys; from stagegraph.cli.main import dispatch; loaded = {}\n"
        "for verb in (['status'], ['run', '--dry-run'], ['graph'], ['schema'], ['models']):\n"
        "    assert dispatch(verb) == 0; loaded[' '.join(verb)] = [*sys.modules]\n"
        "print(json.dumps(loaded), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = json.loads(done.stderr.splitlines()[-1])
    heavy = HEAVY | {"numpy", "tokenizers", "rich"}
    problems = [f"{verb} loads {name}" for verb, names in loaded.items() for name in heavy & {root(n) for n in names}]
    assert not problems, "\n".join(problems)


def test_the_long_tail_names_tests_that_are_there(request: pytest.FixtureRequest) -> None:
    """A name that is none would let its test run whenever it is called otherwise; known in a run of all tests alone."""
    gone = request.config.stash[GONE]
    assert not gone, f"tests/support/long_tail.py names tests that are gone: {sorted(gone)}"
