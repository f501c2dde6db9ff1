"""Takes names of variables out of kernels: they make no code, and differ with the model around a kernel."""

from __future__ import annotations

import json

import tvm
from tvm import tirx

from stages.ir.compat import load_json
from stages.ir.text import SCHEDULED


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


def _numbered(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    document = json.loads(tvm.ir.save_json(kernel))
    nodes = document["nodes"]
    for number, variable in enumerate([node["data"] for node in nodes if node["type"] == "ir.Var"]):
        variable["name"] = len(nodes)
        nodes.append({"type": "ffi.String", "data": f"v{number}"})
    return load_json(json.dumps(document))
