"""The pass that moves tuple accesses from a function's entry to their first use, so that registers live shorter."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx

from stages.lowering.rewriter import read_by, with_blocks


@tvm.transform.module_pass(opt_level=0, name="ScatterTupleGetItem")
def scatter_tuple_get_item(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Move every ``x = tuple[i]`` of the packed parameters down to its first use."""
    scattered = module.clone()
    for var, function in module.functions_items():
        if isinstance(function, rx.Function):
            scattered[var] = _scattered(function)
    return scattered


def _scattered(function: rx.Function) -> rx.Function:
    """Take the binding of each field out, and put it in front of the first that reads it."""
    packed = {param for param in function.params if isinstance(param.ty, rx.TupleType)}
    fields: dict[rx.Var, rx.Binding] = {}
    blocks = []
    for block in function.body.blocks:
        bindings: list[rx.Binding] = []
        for binding in block.bindings[:]:
            value: Any = binding.value
            if isinstance(value, rx.TupleGetItem) and value.tuple_value in packed:
                fields[binding.var] = binding
            else:
                bindings += [fields.pop(read) for read in read_by(value) if read in fields]
                bindings.append(binding)
        blocks.append(type(block)(bindings))
    returned = [fields[read] for read in read_by(function.body.body) if read in fields]
    if returned:
        blocks.append(rx.BindingBlock(returned))
    return with_blocks(function, blocks)
