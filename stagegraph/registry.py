"""Which stages exist and in what kind of worker they run: the shipped provider by name, others by entry point.

The table holds strings, so that naming a stage imports nothing; a third-party provider (entry point group
``stagegraph.stages``) is looked up only for an id that the table lacks, because the look-up costs 50 ms.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from stagegraph.errors import PipelineError

if TYPE_CHECKING:
    from stagegraph.stage import Stage

SHIPPED = {
    "config-parse": "stages.config_parse:ConfigParse",
    "param-register": "stages.param_register:ParamRegister",
    "graph-build": "stages.graph_build:GraphBuild",
    "quantize": "stages.quantize:Quantize",
    "compile": "stages.compile:Compile",
    "tokenizer-bundle": "stages.tokenizer_bundle:TokenizerBundle",
    "bundle": "stages.bundle:Bundle",
    "verify": "stages.verify:Verify",
}

# What a worker process calls before it runs stages of a profile: what is loaded before a compiler differs.
PROFILES = {"light": "", "compiler": "stages.profiles:compiler", "runtime": "stages.runtime.backend:tvm"}

# Variables that change what compilers make, unseen by any key: workers do not get them.
HIDDEN_VARIABLES = frozenset({
    "CPATH", "CPLUS_INCLUDE_PATH", "C_INCLUDE_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX", "LIBRARY_PATH",
    "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "SOURCE_DATE_EPOCH", "TVM_USE_RUNTIME_LIB",
    "TVM_CUDA_COMPILE_MODE", "TVM_CUDA_NVCC_NO_FAST_MATH", "TVM_LIBRARY_PATH",
})  # fmt: skip

# Verbs that the shipped provider adds to the command line: verb -> module with `add_arguments` and `run`. Those of
# its arguments that `REFERENCES` lists may be a reference in place of a path; `run` gets the path of a folder.
VERBS = {
    "chat": "stages.cli.chat",
    "generate": "stages.cli.generate",
    "models": "stages.cli.models",
    "tokenize": "stages.cli.tokenize",
}


class Lookup(NamedTuple):
    """An option of ``show``: the stage it asks about, the ports whose JSON is read, and the module that answers.

    The module has ``find(documents, name)``, ``names(documents)`` and ``page(found)``; documents are by port.
    """

    stage: str
    output: str
    inputs: tuple[str, ...]
    module: str
    doc: str


# Options that the shipped provider adds to ``show``.
LOOKUPS = {
    "tensor": Lookup(
        stage="param-register",
        output="params",
        inputs=("tensors",),
        module="stages.cli.tensors",
        doc="what a parameter is made of, or what a checkpoint tensor becomes",
    ),
}

# Stage -> the function that says what differs inside two of its results (:data:`stagegraph.diff.Comparer`).
COMPARERS = {
    "graph-build": "stages.cli.compare:graphs",
    "compile": "stages.cli.compare:libraries",
    "quantize": "stages.quantization.compare:weights",
    "tokenizer-bundle": "stages.cli.compare:tokenizers",
}

# Suffix of a source file -> what says which of its parts changed: (recall, digest before, path now) -> text or None.
DISSECTORS = {".safetensors": "stages.cli.shards:changed"}

# Stage -> the file whose JSON `show --plot` draws, the function (document, file to draw into) that does; what
# it cannot draw is a ValueError.
PLOTS = {"quantize": ("report.json", "stages.quantization.plot:draw")}


def load_object(reference: str) -> Any:
    """Import ``"module:NAME"`` and return the object."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def stage_reference(stage_id: str) -> str:
    """Return ``"module:Class"`` of a stage id; :class:`KeyError` if nobody provides it."""
    if stage_id in SHIPPED:
        return SHIPPED[stage_id]
    from importlib.metadata import entry_points

    for point in entry_points(group="stagegraph.stages"):
        if point.name == stage_id:
            return point.value
    raise KeyError(stage_id)


@functools.cache
def get_stage(stage_id: str) -> Stage:
    """Return the one instance of a stage; :class:`KeyError` if nobody provides it."""
    stage: Stage = load_object(stage_reference(stage_id))()
    if stage.id != stage_id:
        raise PipelineError(
            f"{stage_reference(stage_id)}: provides stage '{stage.id}' but is registered as '{stage_id}'"
        )
    return stage


def known_stages() -> list[str]:
    """Return the ids of every shipped stage and every stage a third party provides."""
    from importlib.metadata import entry_points

    return sorted({*SHIPPED, *(point.name for point in entry_points(group="stagegraph.stages"))})
