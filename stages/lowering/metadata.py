"""Adds the function ``_metadata``, which returns a description of the library's build as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import tvm
from tvm import relax as rx

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


def attach_metadata(metadata: JsonObject) -> tvm.transform.Pass:
    """Return the pass; ``_metadata()`` of the library returns ``metadata`` as a JSON string."""
    builder = rx.BlockBuilder()
    with builder.function("_metadata", params=[]):
        builder.emit_func_output(tvm.ir.StringImm(json.dumps(metadata, sort_keys=True)))

    @tvm.transform.module_pass(opt_level=0, name="AttachMetadata")
    def run(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        attached = module.clone()
        attached.update(builder.finalize())
        return attached

    return run
