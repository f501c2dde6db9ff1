"""Calls compiled kernels by their C interface, without TVM: a process that only quantizes never loads a compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.quantization import layouts
from stages.quantization.kernel_names import ROW, TILE_GROUPS, TILE_ROWS, cast_name, quantize_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from stages.quantization.rows import Row

POINTER, INTEGER = 4, 1  # TVMFFITypeIndex: kTVMFFIOpaquePtr, kTVMFFIInt


class KernelError(ValueError):
    """The kernels could not be built; the message ends with the last lines the compiler printed."""


@dataclass(frozen=True)
class Sums:
    """The sums behind an error: squares of error and value, largest |error| and |value|."""

    errors: float
    squares: float
    worst: float
    peak: float

    def relative(self) -> tuple[float, float] | None:
        """Return (relative RMSE, largest error over largest value); None where float32 sums are no measure."""
        if not (math.isfinite(self.squares) and (self.squares > 1e-25 or self.peak == 0)):
            return None
        return (math.sqrt(self.errors / self.squares), self.worst / self.peak) if self.peak else (0.0, 0.0)


def build(library: Path, cpu: str, cxx: str, names: Sequence[str], environment: Mapping[str, str]) -> None:
    """Compile the kernels ``names`` into ``library`` in a process of its own, whose memory goes with it."""
    command = [sys.executable, "-m", "stages.quantization.tir_kernels", str(library), cpu, cxx, *names]
    # Without the first, tvm_ffi imports torch wherever it is installed.
    variables = {"TVM_FFI_DISABLE_TORCH_C_DLPACK": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        command,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise KernelError("\n".join(done.stdout.strip().splitlines()[-20:]))


class Kernels:
    """A library of kernels, loaded. Calls may come from several threads; each runs outside the interpreter's lock."""

    def __init__(self, library: Path) -> None:
        ffi = importlib.util.find_spec("tvm_ffi")
        assert ffi is not None
        assert ffi.origin is not None
        # Where the kernels' argument checks would report to; 3 MB, no compiler.
        ctypes.CDLL(str(Path(ffi.origin).parent / "lib" / "libtvm_ffi.so"), ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))
        self._functions: dict[str, Any] = {}

    def quantize(
        self,
        parts: Iterable[np.ndarray],
        rows: int,
        row: Row,
        scales: str,
        layout: str,
        stored: Sequence[np.ndarray],
    ) -> Sums | None:
        """Quantize the weight [rows, k] that ``parts`` are, one under the other, as :func:`.group.quantize` does.

        ``stored`` takes words and scales as they lie in ``layout``. Returns None where NumPy says what is wrong. Parts
        are contiguous; the buffer of one may be reused for the next.
        """
        words, scale = stored
        if layout == "n32":
            words[-1], scale[-1] = 0, 0  # what the last block is filled up with
        run: _Quantizing | None = None
        sums: list[np.ndarray] = []
        first = 0
        for part in parts:
            run = run or _Quantizing(self, part, rows, (row, scales, layout), words, scale)
            sums += run(part, first)
            first += len(part)
        found = _sums(np.concatenate(sums))
        with np.errstate(over="ignore"):
            fits = np.isfinite(np.float32(np.float32(found.peak / row.top).astype(scale.dtype)))
        return found if fits else None

    def cast(self, parts: Iterable[np.ndarray], stored: np.ndarray) -> Sums | None:
        """Cast contiguous ``parts``, one under the other, into ``stored`` as :func:`.blocks.cast` does.

        Returns None where that says what is wrong.
        """
        flat, end, found = stored.reshape(-1), 0, []
        for part in parts:
            begin, end = end, end + part.size
            found.append(self._cast(part.reshape(-1), flat[begin:end]))
        sums = _sums(np.concatenate(found))
        with np.errstate(over="ignore"):
            fits = np.isfinite(np.float32(np.float32(sums.peak).astype(stored.dtype)))
        return sums if fits else None

    def _cast(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Cast flat values; return what errors are made of, row by row."""
        whole, rest = divmod(source.size, ROW)
        stats = np.zeros((whole + 1, 4), np.float32)
        cast = self.call(cast_name(str(source.dtype), str(target.dtype)), 3)
        cast(source.ctypes.data, target.ctypes.data, stats.ctypes.data, whole)
        if rest:
            last, last_target = np.zeros(ROW, source.dtype), np.empty(ROW, target.dtype)
            last[:rest] = source[whole * ROW :]
            cast(last.ctypes.data, last_target.ctypes.data, stats[whole:].ctypes.data, 1)
            target[whole * ROW :] = last_target[:rest]
        return stats

    def call(self, name: str, pointers: int) -> _Call:
        """Return a kernel that takes so many addresses before numbers."""
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = getattr(self._library, f"__tvm_ffi_{name}")
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
        return _Call(name, function, pointers)


class _Quantizing:
    """Quantizes the parts of one weight, which are of one dtype and have rows of one length."""

    def __init__(
        self,
        kernels: Kernels,
        part: np.ndarray,
        rows: int,
        how: tuple[Row, str, str],
        words: np.ndarray,
        scale: np.ndarray,
    ) -> None:
        self._how, self._words, self._scale = how, words, scale
        row, scales, layout = how
        self._k, self._side = part.shape[1], layouts.side(layout, rows)
        self._groups, self._rest = divmod(self._k, row.group_size)
        self._strides = row.words(self._k), row.groups(self._k), self._side
        self._places = words.ctypes.data, scale.ctypes.data
        self._call = kernels.call(quantize_name(str(part.dtype), row, scales, layout), 4)

    def __call__(self, part: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """Quantize rows from number ``first`` on; yield what errors are made of, tile by tile."""
        if self._groups:
            yield self._run(part, first, 0, self._groups)
        if self._rest:
            yield self._last(part, first)

    def _run(self, source: np.ndarray, first: int, group: int, groups: int) -> np.ndarray:
        """Quantize ``groups`` groups of ``source`` as those from number ``group`` on."""
        row, n = self._how[0], len(source)
        words, scale = self._places
        words += group * (row.group_size // row.per_word) * self._side * self._words.itemsize
        scale += group * self._side * self._scale.itemsize
        stats = np.empty((-(-n // TILE_ROWS) * -(-groups // TILE_GROUPS), 4), np.float32)
        places = source.ctypes.data, words, scale, stats.ctypes.data
        self._call(*places, n, groups, source.shape[1], *self._strides, first)
        return stats

    def _last(self, part: np.ndarray, first: int) -> np.ndarray:
        """Quantize a short last group, from a copy that is filled up with zeros."""
        row, _, layout = self._how
        end, whole = first + len(part), self._groups
        last = np.zeros((len(part), row.group_size), part.dtype)
        last[:, : self._rest] = part[:, whole * row.group_size :]
        stats = self._run(last, first, whole, 1)
        by_row = layouts.restore(layout, self._words, end)  # a view: n32 has whole groups
        words = by_row[first:end, whole * (row.group_size // row.per_word) :]
        _clear_past_end(words, self._rest, row)
        return stats


class _Call:
    """A kernel of TVM's calling convention that takes addresses, ``pointers`` of them, then numbers.

    Not for two threads at once.
    """

    def __init__(self, name: str, function: Any, pointers: int) -> None:
        self._name, self._function, self._pointers = name, function, pointers
        self._arguments: Any = None
        self._result = _Any()

    def __call__(self, *arguments: int) -> None:
        if self._arguments is None:
            kinds = [POINTER] * self._pointers + [INTEGER] * (len(arguments) - self._pointers)
            self._arguments = (_Any * len(arguments))(*map(_Any, kinds))
        for place, argument in zip(self._arguments, arguments, strict=True):
            place.value = argument
        status = self._function(None, self._arguments, len(arguments), ctypes.byref(self._result))
        if status:
            raise KernelError(f"the kernel {self._name} refused its arguments ({status})")


class _Any(ctypes.Structure):
    """TVMFFIAny."""

    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64))


def _sums(stats: np.ndarray) -> Sums:
    """Add up rows; a peak that is no number stays one."""
    errors, squares = stats[:, :2].sum(axis=0, dtype=np.float64)
    return Sums(float(errors), float(squares), float(stats[:, 2].max()), float(stats[:, 3].max()))


def _clear_past_end(words: np.ndarray, count: int, row: Row) -> None:
    """Zero the codes of a last group ``words`` [n, words of a group] behind its ``count`` values."""
    full, codes = divmod(count, row.per_word)
    if codes:
        words[:, full] &= np.uint32((1 << codes * row.bits) - 1)
        full += 1
    words[:, full:] = 0
