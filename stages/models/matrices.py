"""Matrices [n, k] (n = output features) as they are stored, and rows of them looked up.

What is stored is rebuilt inside the graph by an operator named ``dequantize``, which the lowering folds into the kernel
that uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax as rx
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from stages.sizes import LEVEL_BITS, LEVELED, LEVELS_PER_WORD, N32_BLOCK, PLANES, SHARING, level_blocks


def take(table: Tensor, ids: Tensor, axis: int = 0) -> Tensor:
    """Select ``ids`` (int32 [s]) along ``axis``; an id out of range is clipped, for the default mode reads wild."""
    return op.wrap_nested(rx.op.take(table._expr, ids._expr, axis=axis, mode="clip"), "take")  # noqa: SLF001


def _unpacked(form: Any, compute: Callable[..., te.Tensor], stored: list[nn.Parameter]) -> Tensor:
    """Return the matrix that ``compute`` rebuilds of what is ``stored``, which ``form`` and the dtypes determine.

    Matrices of one form are calls of one kernel. It is made once in an export: that takes TVM longer than all else that
    it does for a layer.
    """
    builder = rx.BlockBuilder.current()
    key = form, tuple(each.dtype for each in stored)
    calls = vars(builder).setdefault("calls_of_dequantize", {})
    if key not in calls:
        made = op.tensor_expr_op(compute, "dequantize", stored)
        calls[key] = builder.lookup_binding(made._expr)  # noqa: SLF001 - the wrapped value has no other name
        return made
    arguments = [each._expr for each in stored]  # noqa: SLF001
    call = rx.call_tir(calls[key].args[0], rx.Tuple(arguments), out_ty=calls[key].ty)
    return op.wrap_nested(builder.emit(call), "dequantize")


class Layout:
    """The position of a matrix element in the stored tensors; see stages/quantization/layouts.py.

    ``block`` is the number of output features that lie side by side: 1 where each has a row (``nk``), 0 for all
    (``kn``).
    """

    BLOCKS = {"nk": 1, "kn": 0, "n32": N32_BLOCK}

    def __init__(self, name: str) -> None:
        self.block = self.BLOCKS[name]

    def shape(self, n: int, columns: int) -> tuple[int, ...]:
        """Return the shape of what is stored for n features, ``columns`` each."""
        return (-(-n // self.block), columns, self.block) if self.block > 1 else self.at(n, columns)

    def at(self, row: Any, column: Any) -> tuple[Any, ...]:
        """Return the index of a feature's column."""
        if self.block > 1:
            return row // self.block, column, row % self.block
        return (row, column) if self.block else (column, row)

    def bit(self, element: Any, bits: int) -> Any:
        """Return the bit of a word at which an element of ``bits`` begins."""
        return 8 * (element % 4) + bits * (element // 4) if self.block > 1 else element * bits


class FloatMatrix(nn.Module):
    """A matrix [n, k] stored as floats; ``matrix`` and ``rows`` return it in the compute dtype."""

    def __init__(self, weight: nn.Parameter, rows: int, compute_dtype: str, layout: Layout) -> None:
        self.weight = weight
        self.shape = rows, int(weight.shape[1])
        self.compute_dtype = compute_dtype
        self.layout = layout

    def matrix(self) -> Tensor:
        """Return all of it, [n, k]."""
        if self.weight.dtype == self.compute_dtype and self.layout.block == 1:
            return self.weight
        # Named like the unpacking of a quantized weight, so that the same fusion keeps it inside the kernel: a
        # float32 copy of every float16 weight at every step would be the slowest thing in the model.
        return _unpacked((self.shape, self.layout.block, self.compute_dtype), self._convert, self.stored)

    def _convert(self, weight: te.Tensor) -> te.Tensor:
        return te.compute(self.shape, lambda i, j: self.value(weight, i, j), name="dequantize")

    @property
    def stored(self) -> list[nn.Parameter]:
        """What :meth:`value` reads."""
        return [self.weight]

    def value(self, weight: te.Tensor, i: Any, j: Any) -> tirx.PrimExpr:
        """Return one value of what is stored."""
        return weight[self.layout.at(i, j)].astype(self.compute_dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows ``ids`` [s], [s, k]."""
        if self.layout.block == 1:
            return take(self.weight, ids).astype(self.compute_dtype)
        return _gather(self.shape, ids, [self.weight], self.value)


class GroupMatrix(nn.Module):
    """A matrix [n, k] in groups of ``group_size`` along k. ``q_weight`` is uint32 [n, k / per word], ``q_scale``
    [n, k / group_size], value = (element - (2 ** (bits - 1) - 1)) * scale; with ``q_min`` of the scale's shape, value =
    element * scale + minimum. With ``q_outer`` there, ``q_scale`` has levels: eight groups share two floats that their
    scales and minima, integers of six bits, are multiplied by, and the minimum is taken off. Elements with ``q_scale``
    of uint8 are MXFP4's (stages/quantization/float4.py). All are in the layout; a last group that is short takes the
    words of a full one.
    """

    def __init__(
        self,
        q_weight: nn.Parameter,
        q_scale: nn.Parameter,
        q_min: nn.Parameter | None = None,
        q_outer: nn.Parameter | None = None,
        *,
        shape: tuple[int, int],
        bits: int,
        group_size: int,
        compute_dtype: str,
        layout: Layout,
    ) -> None:
        self.q_weight = q_weight
        self.q_scale = q_scale
        self.q_min = q_min
        self.q_outer = q_outer
        self.shape = shape
        self.bits = bits
        self.group_size = group_size
        self.compute_dtype = compute_dtype
        self.layout = layout

    @property
    def stored(self) -> list[nn.Parameter]:
        """What is stored, in packed order."""
        return [self.q_weight, self.q_scale, *(each for each in (self.q_min, self.q_outer) if each is not None)]

    def matrix(self) -> Tensor:
        """Return all of it, dequantized, [n, k] in the compute dtype."""
        parts = self.q_min is not None, self.q_outer is not None
        form = self.shape, self.layout.block, self.compute_dtype, self.bits, self.group_size, parts
        return _unpacked(form, self._unpack, self.stored)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows ``ids`` [s], dequantized, [s, k]: nothing but them is read."""
        if self.layout.block == 1:
            return op.tensor_expr_op(self._unpack, "dequantize", [take(tensor, ids) for tensor in self.stored])
        return _gather(self.shape, ids, self.stored, self.value)

    def value(self, words: te.Tensor, scale: te.Tensor, *rest: Any) -> tirx.PrimExpr:
        """Return the value at ``rest``: row and column, after minima or what levels are of where there are such."""
        *least, i, j = rest
        middle, dtype = (1 << (self.bits - 1)) - 1, self.compute_dtype
        group = self.layout.at(i, j // self.group_size)
        if scale.dtype == "uint8":
            return _float4(self._element(words, i, j), scale[group]).astype(dtype)
        element = self._element(words, i, j).astype(dtype)
        if self.q_outer is not None:
            step, low = (self._of_levels(scale, least[0], i, j // self.group_size, which) for which in (0, 1))
            return element * step.astype(dtype) - low.astype(dtype)
        if least:
            return element * scale[group].astype(dtype) + least[0][group].astype(dtype)
        return (element - tirx.const(middle, dtype)) * scale[group].astype(dtype)

    def _element(self, words: te.Tensor, i: Any, j: Any) -> tirx.PrimExpr:
        """Return the element at row i and column j, uint32."""
        if self.q_outer is None or self.bits == 4:
            per_word = 32 // self.bits
            word, bit = words[self.layout.at(i, j // per_word)], self.layout.bit(j % per_word, self.bits)
            return _bits_of(word, bit, self.bits)
        group, place = j // self.group_size, j % self.group_size
        first, below, found = group * self.bits * self.group_size // 32, 0, tirx.const(0, "uint32")
        for bits in PLANES[self.bits]:
            word = words[self.layout.at(i, first + place * bits // 32)]
            bit = self.layout.bit(place % (32 // bits), bits)
            found = found | tirx.shift_left(_bits_of(word, bit, bits), tirx.const(below, "uint32"))
            first, below = first + self.group_size * bits // 32, below + bits
        return found

    def _of_levels(self, levels: te.Tensor, outer: te.Tensor, i: Any, group: Any, which: int) -> tirx.PrimExpr:
        """Return the scale (``which`` is 0) or minimum (1) of a group in float32."""
        shared = tirx.min(group // SHARING[self.bits], level_blocks(self.shape[1] // self.group_size, self.bits) - 1)
        if LEVEL_BITS[self.bits] == 4:  # a byte of a word holds those of a group
            found = _bits_of(levels[self.layout.at(i, group // 4)], group % 4 * 8 + 4 * which, 4)
        else:
            found = self._level(levels, i, group, which)
        return found.astype("float32") * outer[self.layout.at(i, shared * 2 + which)].astype("float32")

    def _level(self, levels: te.Tensor, i: Any, group: Any, which: int) -> tirx.PrimExpr:
        """Return a level of six bits, uint32."""
        whole, rest = divmod(self.shape[1] // self.group_size, LEVELED)
        block, number = group // LEVELED, group % LEVELED
        level = number + LEVELED * which
        level = tirx.Select(block < whole, level, number + rest * which) if rest else level
        word = levels[self.layout.at(i, block * 3 + tirx.min(level // LEVELS_PER_WORD, 2))]
        found = _bits_of(word, level % LEVELS_PER_WORD * 6, 6)
        if which and whole:  # the last level: two bits of each word
            words = [levels[self.layout.at(i, tirx.min(block, whole - 1) * 3 + n)] for n in range(3)]
            first, *more = (tirx.shift_right(each, tirx.const(30, "uint32")) for each in words)
            joined = sum((each * tirx.const(4**n, "uint32") for n, each in enumerate(more, start=1)), first)
            found = tirx.Select(level == 2 * LEVELED - 1, joined, found)
        return found

    def _unpack(self, words: te.Tensor, *scales: te.Tensor) -> te.Tensor:
        rows = words.shape[0] if self.layout.block == 1 else self.shape[0]
        return te.compute((rows, self.shape[1]), lambda i, j: self.value(words, *scales, i, j), name="dequantize")


def _bits_of(word: Any, bit: Any, bits: int) -> tirx.PrimExpr:
    """Return so many bits of a word from ``bit`` on."""
    shifted = tirx.shift_right(word, bit.astype("uint32"))
    return tirx.bitwise_and(shifted, tirx.const((1 << bits) - 1, "uint32"))


def _float4(code: Any, exponent: Any) -> tirx.PrimExpr:
    """Return the value of a code of MXFP4, uint32, with its group's exponent, uint8, as float32."""
    one = tirx.const(1, "uint32")
    bits = [tirx.bitwise_and(tirx.shift_right(code, tirx.const(place, "uint32")), one) for place in range(4)]
    above_four = tirx.bitwise_and(code, bits[2] * tirx.const(3, "uint32"))
    halves = tirx.bitwise_and(code, tirx.const(7, "uint32")) + above_four + bits[0] * bits[1] * bits[2] * 2
    signed = tirx.bitwise_or(
        tirx.reinterpret("uint32", halves.astype("float32")), tirx.shift_left(bits[3], tirx.const(31, "uint32"))
    )
    power = tirx.shift_left(exponent.astype("uint32"), tirx.const(23, "uint32"))
    return tirx.reinterpret("float32", signed) * (tirx.reinterpret("float32", power) * tirx.const(0.5, "float32"))


def _gather(
    shape: tuple[int, int], ids: Tensor, stored: list[nn.Parameter], value: Callable[..., tirx.PrimExpr]
) -> Tensor:
    """Return the rows ``ids`` [s] of a matrix of ``shape``; an id out of range is clipped."""

    def rows(ids: te.Tensor, *stored: te.Tensor) -> te.Tensor:
        def element(s: tirx.Var, j: tirx.Var) -> tirx.PrimExpr:
            row = tirx.max(tirx.min(ids[s], tirx.const(shape[0] - 1, "int32")), tirx.const(0, "int32"))
            return value(*stored, row, j)

        return te.compute((ids.shape[0], shape[1]), element, name="rows")

    return op.tensor_expr_op(rows, "rows", [ids, *stored])


class ScaledMatrix(nn.Module):
    """A matrix [n, k] of float8_e4m3fn values ``q_weight`` with float32 scales: one for each ``group_size`` values of a
    row, ``q_scale`` [n, groups], or, where that is 0, one for all, [1].
    """

    def __init__(self, q_weight: nn.Parameter, q_scale: nn.Parameter, group_size: int, compute_dtype: str) -> None:
        self.q_weight = q_weight
        self.q_scale = q_scale
        self.group_size = group_size
        self.compute_dtype = compute_dtype

    def matrix(self) -> Tensor:
        """Return all of it, [n, k] in the compute dtype."""
        return _unpacked((self.shape, self.compute_dtype, self.group_size), self._unpack, self.stored)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows ``ids`` [s], [s, k]."""
        scales = take(self.q_scale, ids) if self.group_size else self.q_scale
        return op.tensor_expr_op(self._unpack, "dequantize", [take(self.q_weight, ids), scales])

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's."""
        rows, columns = self.q_weight.shape
        return int(rows), int(columns)

    @property
    def stored(self) -> list[nn.Parameter]:
        """What :meth:`value` reads."""
        return [self.q_weight, self.q_scale]

    def value(self, values: te.Tensor, scale: te.Tensor, i: Any, j: Any) -> tirx.PrimExpr:
        """Return one value of what is stored, dequantized."""
        # Sign, exponent and fraction moved to where a float32 has them; the difference in bias is 120.
        bits = tirx.reinterpret("uint8", values[i, j]).astype("uint32")
        moved = (bits & tirx.const(0x80, "uint32")) << 24 | (bits & tirx.const(0x7F, "uint32")) << 20
        exact = tirx.reinterpret("float32", moved) * tirx.const(2.0**120, "float32")
        step = scale[i, j // self.group_size] if self.group_size else scale[0]
        return (exact * step).astype(self.compute_dtype)

    def _unpack(self, values: te.Tensor, scale: te.Tensor) -> te.Tensor:
        return te.compute(values.shape, lambda i, j: self.value(values, scale, i, j), name="dequantize")


Matrix = FloatMatrix | GroupMatrix | ScaledMatrix
