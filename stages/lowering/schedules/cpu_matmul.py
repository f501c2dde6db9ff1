"""Schedule of x @ w.T on a CPU: output features in parallel, dot products in vector lanes, weights rebuilt per tile."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.cpu.base import CPUScheduleRule

FEATURES = 8  # output features per tile: their rebuilt weights stay in the first-level cache
LANES = 16  # partial sums per dot product: one AVX-512 or two AVX2 registers of float32


class CPUMatmul(CPUScheduleRule):
    """Takes kernels of the form [dequantize,] NT_matmul [, elementwise], any number of rows, n and k static, k of more
    terms than lanes.
    """

    def apply(self, func: tirx.PrimFunc, target: tvm.target.Target, _tunable: bool) -> s_tir.Schedule | None:
        """Return the scheduled kernel, or None if ``func`` is not of that form."""
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        schedule = s_tir.Schedule(func)
        names = [block.name for block in normalize_prim_func(schedule) or []]
        matmuls = [name for name in names if name.startswith("NT_matmul")]
        if len(matmuls) != 1:
            return None
        before, after = names[: names.index(matmuls[0])], names[names.index(matmuls[0]) + 1 :]
        if len(before) > 1 or any(not name.startswith("dequantize") for name in before):
            return None
        block = schedule.get_sblock(matmuls[0])
        *rows, n, k = schedule.get_loops(block)
        features, terms = (_static_extent(schedule, loop) for loop in (n, k))
        if not features or terms <= LANES or terms % LANES:  # one chunk is no loop
            return None
        self._schedule(schedule, block, [schedule.get_sblock(name) for name in before], after, len(rows))
        return schedule

    def _schedule(self, schedule: s_tir.Schedule, block: Any, weights: list[Any], after: list[str], rows: int) -> None:
        epilogues = [schedule.get_sblock(name) for name in after]
        for extra in epilogues[:-1]:
            schedule.compute_inline(extra)
        _, lane = schedule.split(schedule.get_loops(block)[-1], [None, LANES])
        partial = schedule.rfactor(lane, factor_axis=-1)

        last = epilogues[-1] if epilogues else block
        loops = schedule.get_loops(last)
        width = math.gcd(_static_extent(schedule, loops[rows]), FEATURES)
        tile, feature = schedule.split(loops[rows], [None, width])
        schedule.reorder(tile, *loops[:rows], feature, *loops[rows + 1 :])
        schedule.parallel(tile)

        if epilogues:
            schedule.compute_at(block, feature)
        schedule.compute_at(partial, feature)
        *_, lane, chunk = schedule.get_loops(partial)
        schedule.reorder(chunk, lane)
        schedule.vectorize(lane)
        for weight in weights:
            schedule.compute_at(weight, tile)
            schedule.vectorize(schedule.split(schedule.get_loops(weight)[-1], [None, LANES])[1])


def _static_extent(schedule: s_tir.Schedule, loop: Any) -> int:
    """Return the extent of ``loop``, 0 if it is symbolic."""
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else 0
