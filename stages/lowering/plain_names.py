"""Takes out of IR what makes no code: names of variables, which differ with the model around a kernel, and the places
in source files that TVMScript notes, which differ with the machine.
"""

from __future__ import annotations

import json

import tvm
from tvm import tirx

from stages.lowering.compat import load_json

SCHEDULED = "tirx.is_scheduled"


@tvm.transform.module_pass(opt_level=0, name="PlainNames")
def plain_names(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Number the variables of every kernel that is not scheduled yet.

    Fusion names them after those of the graph, ``rms_norm25`` or a layer's weight, and schedules name theirs after
    them. A kernel that was written with its schedule has names of its own.
    """
    plain = module.clone()
    for var, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and SCHEDULED not in (function.attrs or {}):
            plain[var] = _numbered(function)
    return plain


def without_places(text: str) -> str:
    """Return a module that was saved as ``text`` without the notes of which lines of which file it came from."""
    if '"ir.SourceName"' not in text:
        return text
    document = json.loads(text)
    nodes = document["nodes"]
    nowhere = next(index for index, node in enumerate(nodes) if node["type"] == "None")
    for node in nodes:
        if isinstance(node.get("data"), dict) and "span" in node["data"]:
            node["data"]["span"] = nowhere
    return str(tvm.ir.save_json(load_json(json.dumps(document))))


def _numbered(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    document = json.loads(tvm.ir.save_json(kernel))
    nodes = document["nodes"]
    for number, variable in enumerate([node["data"] for node in nodes if node["type"] == "ir.Var"]):
        variable["name"] = len(nodes)
        nodes.append({"type": "ffi.String", "data": f"v{number}"})
    return load_json(json.dumps(document))
