"""The pass that turns the unchanging steps of a decode into CUDA graphs, each launched as a whole."""

from __future__ import annotations

import tvm
from tvm import relax as rx


@tvm.transform.module_pass(opt_level=0, name="CaptureCUDAGraphs")
def capture_cuda_graphs(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Move runs of kernels whose sizes are all static into functions that are captured when they are first called.

    After memory is planned: what is captured writes to storage that the library keeps. Attention ends a run, for the KV
    cache decides anew what it launches. The weights of the first call are captured too, so they must stay the same.
    """
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        return rx.transform.RewriteCUDAGraph()(module)
