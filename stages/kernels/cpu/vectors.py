"""Vectors of a fixed number of lanes, on top of TVM's IR builder, in which the CPU kernels are written.

Accumulators are buffers of their own below 1024 bytes each: TVM keeps such on the stack, where LLVM makes registers of
them, and takes larger ones from the heap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.ir.content import written

WORTH_THREADS = 1 << 17  # additions and multiplications; waking the other threads takes as long as many thousands
_TANH = (62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0)  # highest power of the square first
_EXP2 = (0.00187757667, 0.00898934009, 0.0558263180, 0.240153617, 0.693153073, 0.999999940)  # highest power first


@contextmanager
def kernel() -> Any:
    """Build a kernel; inside, statements of ``T`` are its body. What comes out has ``function``."""
    made = _Kernel()
    with IRBuilder() as builder:
        with T.prim_func(is_private=True, s_tir=True):
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            yield made
        made.function = written(made.with_views(builder.get()))


class _Kernel:
    function: tirx.PrimFunc

    def __init__(self) -> None:
        self._views: list[tirx.Stmt] = []

    def argument(self, name: str, shape: Sequence[Any], dtype: str, *, inside: bool = False) -> Any:
        """Declare the next argument, a tensor; one that may lie ``inside`` a larger one has an offset."""
        offset = T.int64() if inside else None
        return T.match_buffer(T.arg(name, T.handle()), tuple(shape), dtype, elem_offset=offset)

    def number(self, name: str, dtype: str) -> Any:
        """Declare the next argument, a number."""
        return T.arg(name, getattr(T, dtype)())

    def view(self, tensor: Any, shape: Sequence[Any], dtype: str = "float32", **more: Any) -> Any:
        """Return the memory of an argument as a tensor of another form; ``more`` are strides, or an offset."""
        buffer = tirx.decl_buffer(tuple(shape), dtype, **more)
        self._views.append(tirx.DeclBuffer(buffer, data=tensor.data))
        return buffer

    def with_views(self, function: tirx.PrimFunc) -> tirx.PrimFunc:
        """Return ``function`` with its views declared: TVM's builder takes no argument behind one."""
        return function.with_body(tirx.SeqStmt([*self._views, function.body])) if self._views else function


def span(start: Any, lanes: int) -> Any:
    """Return the indices of ``lanes`` neighbours."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def lanes_of(dtype: str, lanes: int) -> str:
    """Return the dtype of a vector of ``lanes``; of one lane, that of a number."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def splat(value: Any, lanes: int) -> Any:
    """Return ``value`` in every lane."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def constant(value: float, lanes: int, dtype: str = "float32") -> Any:
    """Return a constant in every lane."""
    return splat(tirx.const(value, dtype), lanes)


def as_float(value: Any, lanes: int) -> Any:
    """Return float lanes as float32."""
    return T.Cast(lanes_of("float32", lanes), value)


def prefetch(buffer: Any, *index: Any) -> None:
    """Ask for the cache line of an element, which may lie behind the end."""
    read, keep, data = (tirx.const(flag, "int32") for flag in (0, 3, 1))
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[index]), read, keep, data))


def vector(lanes: int, dtype: str = "float32") -> Any:
    """Return a fresh accumulator of ``lanes`` lanes."""
    return T.alloc_buffer((lanes,), dtype)


def put(buffer: Any, value: Any, *index: Any) -> None:
    """Store ``value`` at ``index``."""
    T.buffer_store(buffer, value, list(index))


def get(register: Any, lanes: int) -> Any:
    """Return all lanes of an accumulator."""
    return register[span(0, lanes)]


def total(register: Any, lanes: int, combine: Callable[[Any, Any], Any] | None = None) -> Any:
    """Fold all lanes of ``register`` into one, by adding unless told otherwise; what it held is lost."""
    fold = combine or (lambda a, b: a + b)
    while lanes > 1:
        lanes //= 2
        put(register, fold(register[span(0, lanes)], register[span(lanes, lanes)]), span(0, lanes))
    return register[0]


def exp2(x: Any, lanes: int) -> Any:
    """Return 2 ** x for float32 lanes with a relative error below 3e-7; x is taken as at least -126, at most 126."""
    x = T.min(T.max(x, constant(-126, lanes)), constant(126, lanes))
    whole = T.floor(x)
    part, power = x - whole, constant(_EXP2[0], lanes)
    for coefficient in _EXP2[1:]:
        power = power * part + constant(coefficient, lanes)
    exponent = T.Cast(lanes_of("int32", lanes), whole) + constant(127, lanes, "int32")
    bits = T.shift_left(exponent, constant(23, lanes, "int32"))
    return T.reinterpret(lanes_of("float32", lanes), bits) * power


def tanh(x: Any, lanes: int) -> Any:
    """Return tanh(x) for float32 lanes; near zero by its series, where a difference of exponentials has no digits."""
    power = exp2(x * constant(2 * math.log2(math.e), lanes), lanes)
    far = constant(1, lanes) - constant(2, lanes) / (power + constant(1, lanes))
    square = x * x
    series = constant(_TANH[0], lanes)
    for coefficient in _TANH[1:]:
        series = series * square + constant(coefficient, lanes)
    return T.Select(T.fabs(x) < constant(0.25, lanes), series * x, far)


def choose(condition: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Emit a branch."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def along(width: int, lanes: int, body: Callable[[Any, int], None]) -> None:
    """Emit ``body(start, lanes)`` for runs of ``lanes`` that cover ``width``, then for what is left one by one."""
    with T.serial(0, width // lanes) as run:
        body(run * lanes, lanes)
    if width % lanes:
        with T.serial(0, width % lanes) as rest:
            body(width // lanes * lanes + rest, 1)


def each_row(rows: Any, work: int, body: Callable[[Any], None]) -> None:
    """Emit ``body(row)`` for all rows, ``work`` operations each, on all threads where that is worth it."""
    many = max(2, WORTH_THREADS // work)

    def loop(kind: Any) -> Callable[[], None]:
        def emit() -> None:
            with kind(0, rows) as row:
                body(row)

        return emit

    if isinstance(rows, int):
        loop(T.serial if rows < many else T.parallel)()
    else:
        choose(rows < many, loop(T.serial), loop(T.parallel))
