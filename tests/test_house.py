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
from collections.abc import Iterator
from pathlib import Path

from stages.provider import PROVIDER

ROOT = Path(__file__).parents[1]
STAGE_MODULES = {reference.partition(":")[0] for reference in PROVIDER.stages.values()}
HEAVY = {"tvm", "torch", "transformers", "tiktoken"}
BASE = {"documents", "memo", "problems", "sizes"}  # whom every room but the runtime may import
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
NAMED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
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


def root(name: str) -> str:
    return name.partition(".")[0]


def test_the_engine_knows_nothing_of_the_domain() -> None:
    """It imports nothing of it, has no word of it, and imports what is large inside functions."""
    problems = []
    for name, path in modules("stagegraph").items():
        roots = {root(other) for other in imported(parsed(path))}
        problems += [f"{name} imports {other}" for other in sorted(roots & (HEAVY | {"stages"}))]
        early = {root(other) for other in imported(top_level(parsed(path)))}
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
        allowed = GROUND | set(() if room in GROUND else ENGINE[: ENGINE.index(room) + 1])
        others = {other for other in imported(parsed(path)) if other.startswith("stagegraph.")}
        problems += [f"{name} imports {other}" for other in sorted(others) if other.split(".")[1] not in allowed]
    for name, path in modules("stages").items():
        parts = name.split(".")
        if name in STAGE_MODULES or (len(parts) < 3 and not (ROOT / "stages" / parts[-1]).is_dir()):
            continue
        room = parts[1]
        allowed = {room} | MAY_IMPORT[room] | (BASE if room != "runtime" else set())
        for other in imported(parsed(path)):
            if root(other) == "stagegraph":
                problems.append(f"{name} imports the engine: {other}")
            elif root(other) == "stages" and "." in other and other.split(".")[1] not in allowed:
                problems.append(f"{name} imports {other}")
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
    assert circles == []


def test_what_runs_on_its_own_imports_little() -> None:
    """Stages share no module, a bundle runs without the compiler side, a benchmark runs by its path."""
    problems = []
    for module in sorted(STAGE_MODULES):  # data passes by artifact only
        tree = parsed(modules("stages")[module])
        problems += [
            f"{module} imports {name} at its top"
            for name in imported(top_level(tree))
            if name != "stagegraph.stage" and root(name) not in sys.stdlib_module_names
        ]
        problems += [f"{module} imports {other}" for other in (STAGE_MODULES - {module}) & set(imported(tree))]
    runtime = set(sys.stdlib_module_names) | {"stages", "numpy", "tvm", "tvm_ffi", "tokenizers", "jinja2"}
    # In its own room, and loaded by `serve` alone; h11 is what uvicorn reads HTTP with, and comes with it.
    server = runtime | {"llguidance", "starlette", "uvicorn", "h11"}
    for name, path in modules("stages/runtime").items():
        may = server if name.startswith("stages.runtime.server.") else runtime
        problems += [f"{name} imports {other}" for other in {root(other) for other in imported(parsed(path))} - may]
    benchmarks = modules("benchmarks")
    assert benchmarks
    for name, path in benchmarks.items():  # run by its path it finds what lies beside it, and no package of that name
        problems += [f"{name} imports {other}" for other in imported(parsed(path)) if root(other) == "benchmarks"]
    assert not problems, "\n".join(problems)


def test_modules_are_small_say_what_they_own_and_print_only_as_command_lines() -> None:
    """And no name in them is of a word that names nothing."""
    problems = []
    for name, path in modules("stagegraph", "stages", "benchmarks").items():
        text, tree = path.read_text(), parsed(path)
        lines = len(text.splitlines())
        problems += [f"{name} has {lines} lines, of {MAX_MODULE} at most"] if lines > MAX_MODULE else []
        problems += [f"{name} does not say what it owns"] if text.strip() and not ast.get_docstring(tree) else []
        product = root(name) != "benchmarks"
        silent = product and "cli" not in path.parts and path.name not in PRINTING
        problems += vague(name, 1, name.rpartition(".")[2]) if product else []
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION:
                problems.append(f"{name}:{node.lineno}: {node.name} has {MAX_FUNCTION} lines or more")
            if silent and isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "sys.exit", "exit"}:
                problems.append(f"{name}:{node.lineno}: {ast.unparse(node.func)} outside a command line")
            if product and isinstance(node, NAMED):
                problems += vague(name, node.lineno, node.name)
    assert not problems, "\n".join(problems)


def vague(module: str, line: int, name: str) -> list[str]:
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", name)}
    return [f"{module}:{line}: {name} names nothing (docs/writing.md)"] if VAGUE & words else []


def test_pages_are_fresh_and_their_links_lead_somewhere() -> None:
    code = "import sys; sys.path.insert(0, 'docs'); import generate, json; print(json.dumps(generate.pages()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    problems = [
        f"{name} is stale: run `python docs/generate.py`"
        for name, text in json.loads(done.stdout).items()
        if (ROOT / "docs" / name).read_text() != text
    ]
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
        problems += [f"{page.relative_to(ROOT)}: {target}" for target in targets if not (page.parent / target).exists()]
    assert not problems, "\n".join(problems)


def test_looking_verbs_load_nothing_heavy() -> None:
    code = (
        "import json, sys; from stagegraph.cli.main import dispatch; loaded = {}\n"
        "for verb in (['status'], ['run', '--dry-run'], ['graph'], ['schema'], ['models']):\n"
        "    dispatch(verb); loaded[' '.join(verb)] = [*sys.modules]\n"
        "print(json.dumps(loaded), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = json.loads(done.stderr.splitlines()[-1])
    heavy = HEAVY | {"numpy", "tokenizers", "rich"}
    problems = [f"{verb} loads {name}" for verb, names in loaded.items() for name in heavy & {root(n) for n in names}]
    assert not problems, "\n".join(problems)
