"""Schedule of chained elementwise operators on a CPU (a gelu is four): one pass over the rows, on all threads."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline
from tvm.s_tir.dlight.cpu.base import CPUScheduleRule


class CPUElementwise(CPUScheduleRule):
    """Takes kernels of several blocks that reduce nothing; unscheduled, each would write all that the next reads."""

    def apply(self, func: tirx.PrimFunc, target: tvm.target.Target, _tunable: bool) -> s_tir.Schedule | None:
        """Return the scheduled kernel, or None if ``func`` is not of that form."""
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        schedule = s_tir.Schedule(func)
        blocks = normalize_prim_func(schedule) or []
        if len(blocks) < 2 or not all(block.is_injective() for block in blocks):
            return None
        # A sum of one term seems to reduce nothing, but begins with an init, which TVM inlines wrongly into what
        # follows: the sum would be read from the result, before it is written.
        if any(schedule.get(block.block_rv).init is not None for block in blocks):
            return None
        left = try_inline(schedule, blocks)
        if len(left) != 1:
            return None
        *rows, _ = schedule.get_loops(left[0].block_rv)
        if rows:
            schedule.parallel(schedule.fuse(*rows))
        return schedule
