"""Which key every module of the domain moves, and which memoised parts: an edit of what computes is never unseen."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from stagegraph import Pipeline
from stagegraph.planning.code import CodeDigests
from stagegraph.planning.planner import worker_module
from stagegraph.registry import get_stage
from stagegraph.store.index import Index
from stages.provider import PROVIDER

ROOT = Path(__file__).parents[2]
# What makes no artifact: verbs of the domain, what they look with, and the command that runs a finished bundle.
LOOKERS = [
    "stages.cli", "stages.runtime.__main__", "stages.runtime.server.model", "stages.provider",
    *(found.module for found in (*PROVIDER.verbs.values(), *PROVIDER.lookups.values())),
    *(reference.partition(":")[0] for reference in (*PROVIDER.comparers.values(), *PROVIDER.file_diffs.values())),
    *(plot.function.partition(":")[0] for plot in PROVIDER.plots.values()),
]  # fmt: skip


def name_of(path: Path, root: Path = ROOT) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / "stages").rglob("*.py"))}


class Domain:
    """A copy of ``stages`` that may be edited, and what it comes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
        self.index = Index(folder / "index")
        self._unedited: dict[str, tuple[dict[str, dict[str, str]], dict[str, str]]] = {}
        self.looked_with = {name for looker in LOOKERS for name in self.digests().closure(looker, {})}

    def digests(self) -> CodeDigests:
        found = CodeDigests(self.index)
        found._packages["stages"] = [str(self.folder / "stages")]
        return found

    def codes(self, rows: Mapping[str, Any] | None = None) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return the code map of every stage, and the digest of what makes every kind of part."""
        digests, stages, parts = self.digests(), {}, {}
        for name, reference in PROVIDER.stages.items():
            stage = get_stage(name)
            modules = [reference.partition(":")[0], *worker_module(stage)]
            stages[name] = {k: v for module in modules for k, v in digests.closure(module, rows or {}).items()}
            for kind, module in stage.parts.items():
                parts[kind] = digests.part_code([module, *worker_module(stage)], rows or {}).digest
        digests.save()
        return stages, parts

    def unedited(self, rows: Mapping[str, Any] | None) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return the codes of the domain as it stands: every edit is taken back."""
        asked = repr(rows)
        if asked not in self._unedited:
            self._unedited[asked] = self.codes(rows)
        return self._unedited[asked]

    def edit(self, module: str) -> bytes:
        """Add a statement to the first function of a module, or to itself; return the text before."""
        path = self.folder / MODULES[module].relative_to(ROOT)
        before = path.read_bytes()
        tree = ast.parse(before)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        (functions[0] if functions else tree).body.append(ast.parse("0").body[0])
        path.write_text(ast.unparse(tree))
        return before

    def restore(self, module: str, text: bytes) -> None:
        (self.folder / MODULES[module].relative_to(ROOT)).write_bytes(text)


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Domain]:
    found = Domain(tmp_path_factory.mktemp("domain"))
    yield found
    found.index.close()


def moved(domain: Domain, module: str, rows: Mapping[str, Any] | None = None) -> tuple[set[str], set[str]]:
    """Return the stages and the kinds of parts that an edit of ``module`` makes anew."""
    stages, parts = domain.unedited(rows)
    text = domain.edit(module)
    try:
        now, parts_now = domain.codes(rows)
    finally:
        domain.restore(module, text)
    return {name for name in stages if stages[name] != now[name]}, {k for k in parts if parts[k] != parts_now[k]}


@pytest.mark.parametrize("module", MODULES)
def test_an_edit_of_every_module_that_computes_moves_a_key(domain: Domain, module: str) -> None:
    stages, parts = moved(domain, module)
    assert stages or module in domain.looked_with, "no stage and no verb uses it by a name that the engine can read"
    makers = {kind: name for name in PROVIDER.stages for kind in get_stage(name).parts}
    assert {makers[kind] for kind in parts} <= stages, "a part is made anew only where its node is"


CONVERSION = {"tensor", "conversion"}


@pytest.mark.parametrize(
    ("module", "kinds"),
    [
        ("stages.quantization.group", CONVERSION | {"kernels", "advice"}),
        ("stages.quantization.schemes", CONVERSION | {"kernels", "advice"}),
        ("stages.quantization.tir_kernels", CONVERSION | {"kernels", "advice"}),
        ("stages.quantization.expressions", CONVERSION | {"kernels", "advice"}),
        ("stages.quantization.compiled", CONVERSION | {"kernels", "advice"}),
        ("stages.conversion.model", CONVERSION),
        ("stages.models.transforms", CONVERSION),
        ("stages.checkpoint.safetensors", CONVERSION | {"digests", "original", "advice"}),
        ("stages.quantize", set()),
        ("stages.codegen.objects", {"kernel"}),
        ("stages.targets.cuda.nvrtc", {"kernel"}),
        ("stages.lowering.schedules.cpu_matmul", {"schedule"}),
        ("stages.lowering.schedules.tensor_tiles", {"schedule"}),
        ("stages.ir.compat", {"kernel", "schedule"}),
        ("stages.profiles", {"kernel", "schedule"}),
        # What writes or rewrites kernels moves those that come out otherwise, by their content.
        ("stages.lowering.cpu_linear", set()),
        ("stages.kernels.cpu.attention", set()),
        ("stages.lowering.pipeline", set()),
        ("stages.models.layers", set()),
        ("stages.runtime.backend", {"original", "advice"}),  # prepares the process that keeps it
    ],
)
def test_which_parts_an_edit_makes_anew(domain: Domain, module: str, kinds: set[str]) -> None:
    assert moved(domain, module, {"stages.models:FAMILIES": ()})[1] == kinds


def test_parts_are_shared_by_schemes_and_not_by_what_a_scheme_is(domain: Domain) -> None:
    """A part's document tells its scheme; a node's key has the row that it uses."""
    found = [
        domain.codes({"stages.quantization.schemes:SCHEMES": scheme, "stages.models:FAMILIES": ()})
        for scheme in ("q4f16_1", "q4f16_2")
    ]
    assert found[0][0]["quantize"] != found[1][0]["quantize"]
    assert found[0][1] == found[1][1]


def test_what_makes_device_code_is_in_the_key_of_its_target_alone(domain: Domain) -> None:
    """So an edit of what compiles CUDA compiles no library of a processor anew, nor registers or exports anything."""
    tables = ("stages.targets.table:TARGETS", "stages.targets.backends:BACKENDS")
    for target, stages in (("cuda", {"compile"}), ("llvm", set())):
        assert moved(domain, "stages.targets.cuda.device_code", dict.fromkeys(tables, target))[0] == stages


def kept_by(tree: ast.Module) -> set[str]:
    """Return the kinds of parts that a module recalls or remembers."""
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    given = [call.args[0] for call in calls if call.func.attr in {"recall", "remember", "remember_all"}]
    return {constants[kind.id] if isinstance(kind, ast.Name) else ast.literal_eval(kind) for kind in given}


def test_what_keeps_a_part_is_what_the_stage_says_makes_it() -> None:
    declared = {kind: module for name in PROVIDER.stages for kind, module in get_stage(name).parts.items()}
    found = {kind: name for name, path in MODULES.items() for kind in kept_by(ast.parse(path.read_text()))}
    assert found == declared


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_imported_by_a_name_that_can_be_read(module: str) -> None:
    """What is put together at run time is seen by no key."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "__import__"}:
            assert isinstance(node.args[0], ast.Name | ast.Constant), f"line {node.lineno}"


ASK = """\
import json
import os
from dataclasses import dataclass

from stagegraph.stage import Context, Out, Stage, param


class Ask(Stage):
    id = "ask"

    @dataclass(frozen=True)
    class Params:
        tag: str = param("of this run", default="")

    outputs = {"found": Out("found.json", "the environment")}

    def run(self, ctx: Context) -> None:
        import subprocess
        import sys

        ask = "import json, os; print(json.dumps(dict(os.environ)))"
        found = json.loads(subprocess.check_output([sys.executable, "-c", ask]))
        (ctx.out / "found.json").write_text(json.dumps([dict(os.environ), found]))
"""


def test_no_variable_that_changes_arithmetic_reaches_a_stage_or_what_it_starts(tmp_path, monkeypatch):
    """They would be in no key: by them the same processor adds up in another order, or keeps 8 bits of a product."""
    for name in ("OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "ATEN_CPU_CAPABILITY", "ONEDNN_DEFAULT_FPMATH_MODE"):
        assert name in PROVIDER.hidden_variables
    for name in PROVIDER.hidden_variables:
        monkeypatch.setenv(name, "" if name.startswith("NPY") else "none")
    (tmp_path / "ask.py").write_text(ASK)
    (tmp_path / "pipeline.yaml").write_text("version: 1\nname: asking\nstages:\n  ask: {uses: './ask.py:Ask'}\n")
    with Pipeline(tmp_path / "pipeline.yaml") as pipeline:
        assert pipeline.run().ok
    found = json.loads((tmp_path / "artifacts/asking/ask/found.json").read_text())
    assert [PROVIDER.hidden_variables & seen.keys() for seen in found] == [set(), set()]
    assert os.environ["PATH"] in [seen["PATH"] for seen in found]
