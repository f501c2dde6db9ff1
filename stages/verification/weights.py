"""Reads the weights that a bundle really holds, by the checkpoint's names, and measures their error."""

from __future__ import annotations

import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.checkpoint.stored import NUMPY_DTYPES
from stages.models import transforms
from stages.models.family import norm_bias
from stages.quantization import layouts
from stages.quantization.blocks import row_blocks
from stages.quantization.parameter import restored
from stages.quantization.rows import Row
from stages.verification import allowed, tiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from stages.documents.model import CheckpointTensor
    from stages.documents.params import Parameter, Register
    from stages.runtime.tensor_cache import Record

SHARE = 3  # times the values of the largest parameter: what is compared at once may have together


@dataclass(frozen=True)
class BundledTensor:
    """One checkpoint tensor as the bundle holds it: the mapped arrays that are stored for its rows.

    ``name`` is the model's, ``source`` the checkpoint's. Rows and ``shape`` are those of the transpose, of each matrix
    where there are several, where it is held ``turned``.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    stored: Sequence[np.ndarray]
    row: Row | None
    turned: bool = False

    def rows(self, rows: Any) -> np.ndarray:
        """Return the float32 values of ``rows``, a slice or a list of indices."""
        if not self.row:
            values: np.ndarray = self.stored[0][rows].astype(np.float32)
            return values
        first, *scales = self.stored
        first = first[rows]  # of several matrices, those of each: together they are the rows of one
        if self.row.kind != "tensor":
            scales = [tensor[rows].reshape(-1, tensor.shape[-1]) for tensor in scales]
        found = restored([first.reshape(-1, first.shape[-1]), *scales], self.row, self.shape[-1])
        return found.reshape(*first.shape[:-1], -1)

    def values(self) -> np.ndarray:
        """Return the whole tensor in float32, made block by block; a single number has no rows."""
        if not self.shape:
            return np.asarray(self.stored[0], np.float32)
        whole = np.empty(self.shape, np.float32)
        for rows in row_blocks(self.shape):
            whole[rows] = self.rows(rows)
        return np.ascontiguousarray(whole.swapaxes(-1, -2)) if self.turned else whole


def misplaced(registry: Register, records: Mapping[str, Record]) -> list[str]:
    """Return which of the tensors of params.json the bundle does not hold, or holds in another shape or dtype."""
    wanted = {entry["name"]: f"{entry['dtype']} {entry['shape']}" for entry in registry["params"]}
    found = {name: f"{record.dtype} {list(record.shape)}" for name, record in records.items()}
    return [
        f"{name}: params.json has {text}, the bundle {found.get(name, 'none')}; verify must see the bundle's own params"
        for name, text in wanted.items()
        if found.get(name) != text
    ]


def mismatched(registry: Register, tensors: Mapping[str, CheckpointTensor]) -> list[str]:
    """Return which of the tensors that params.json is made of the checkpoint lacks, or has in another shape."""
    wanted = {
        name: shape
        for entry in registry["logical"]
        for name, shape in zip(entry["sources"], entry["source_shapes"], strict=True)
    }
    found = {name: tensor["shape"] for name, tensor in tensors.items() if tensor["dtype"] in NUMPY_DTYPES}
    return [
        f"{name}: params.json is made of {shape}, the checkpoint has {found.get(name, 'none that can be read')}; "
        "verify must see the checkpoint that param-register saw"
        for name, shape in wanted.items()
        if found.get(name) != shape
    ]


def bundled_tensors(registry: Register, records: Mapping[str, Record]) -> Iterator[BundledTensor]:
    """Yield every checkpoint tensor of params.json as the bundle holds it; nothing is read before it is asked for."""
    for entry in registry["logical"]:
        yield from _of_parameter(entry, records)


def _of_parameter(entry: Parameter, records: Mapping[str, Record]) -> Iterator[BundledTensor]:
    arrays = [records[name].load() for name in entry["stored"]]
    row = Row(**entry["quantize"]) if entry["quantize"] else None
    if entry["layout"] != "nk":
        each = zip(arrays, row.element_bits if row else [()], strict=True)
        arrays = [layouts.restore(entry["layout"], array, entry["shape"][0], bits) for array, bits in each]
    if entry["transform"] in ("transpose", "stacked_transpose"):
        (name,), (source,), ((*experts, k, n),) = entry["source_names"], entry["sources"], entry["source_shapes"]
        matrices = [array.reshape(*experts, n, -1) if array.ndim > 1 else array for array in arrays]
        yield BundledTensor(name, source, (*experts, n, k), matrices, row, turned=True)
        return
    one_for_all = arrays[1:] if row and row.kind == "tensor" else []
    parts = [
        transforms.invert(
            entry["transform"],
            array,
            [[*shape[:-1], *array.shape[1:]] if row else shape for shape in entry["source_shapes"]],
        )
        for array in arrays[: len(arrays) - len(one_for_all)]
    ]
    parts += [[array] * len(entry["sources"]) for array in one_for_all]
    tensors = zip(entry["source_names"], entry["sources"], entry["source_shapes"], strict=True)
    for (name, source, shape), stored in zip(tensors, zip(*parts, strict=True), strict=True):
        yield BundledTensor(name, source, tuple(shape), stored, row)


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a tensor that a bundle holds, read when their values are asked for and not kept.

    ``group`` is how many values of an activation share a scale where a library reads them as int8; 0 where its kernel
    reads floats whatever it was built for.
    """

    read: Callable[[], BundledTensor]
    shape: tuple[int, ...]
    start: int = 0
    group: int = 0

    def __getitem__(self, rows: slice) -> Rows:
        """Return some of the rows."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1, "rows are consecutive"
        return Rows(self.read, (stop - start, *self.shape[1:]), self.start + start, self.group)

    def values(self) -> np.ndarray:
        """Return the rows in float32."""
        found = self.read().values()
        return found[self.start : self.start + self.shape[0]] if self.shape else found


def by_name(registry: Register, records: Mapping[str, Record]) -> dict[str, Rows]:
    """Return every checkpoint tensor by the model's name, of which nothing is in memory before it is asked for.

    What is stored together is kept until something else is asked for: a layer asks for its q, k and v one by one.
    """
    loaded: dict[int, list[BundledTensor]] = {}

    def reader(number: int, position: int) -> Callable[[], BundledTensor]:
        def read() -> BundledTensor:
            if number not in loaded:
                loaded.clear()
                loaded[number] = [*_of_parameter(registry["logical"][number], records)]
            return loaded[number][position]

        return read

    return {
        name: Rows(reader(number, position), tuple(shape), group=_byte_group(entry))
        for number, entry in enumerate(registry["logical"])
        for position, (name, shape) in enumerate(zip(entry["source_names"], entry["source_shapes"], strict=True))
    }


def _byte_group(entry: Parameter) -> int:
    """Return :attr:`Rows.group` of a tensor of params.json: kernels that read bytes take matrices in blocks."""
    row, matrix = entry["quantize"], entry["layout"] == "n32" and len(entry["shape"]) == 2
    return int(row["group_size"]) if row and matrix else 0


def differences(
    registry: Register,
    records: Mapping[str, Record],
    checkpoint: Mapping[str, np.ndarray] | Any,
    scales: str = "max",
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Return every tensor whose held values are further from the checkpoint's than its storage explains.

    Unquantized parameters must be the checkpoint's values cast to the storage dtype, bit for bit. A quantized value may
    be off by half a step, and the step is what the checkpoint's own group gives: the bundle's scales prove nothing. Of
    ``scales`` that were searched (mse, importance), a value may also be what the smallest scale tried cuts off.
    Feedback (gptq) may have moved a value by two codes from there. Columns that awq multiplied are compared with the
    checkpoint's times as much as the norm before them was divided by. ``progress`` is told how many tensors were
    compared.
    """
    factors, biases = _factors(registry, records, checkpoint) if scales == "awq" else ({}, {})

    def compare(entry: Parameter) -> list[str]:
        originals = {source: checkpoint[source] for source in entry["sources"]}
        if scales != "awq" and tiles.agree(
            entry, [records[name].load() for name in entry["stored"]], [*originals.values()], scales
        ):
            return []
        found = []
        for each in _of_parameter(entry, records):
            whole = originals[each.source]
            if each.source in biases:  # of a norm that was divided
                whole = np.asarray(whole, np.float32) * (1 / biases[each.source])
            found.append(_difference(each, whole, factors.get(each.source), scales))
        return [text for text in found if text]

    problems, done = [], 0
    for entry, found in zip(registry["logical"], _side_by_side(compare, registry["logical"]), strict=True):
        problems += found
        done += len(entry["sources"])
        progress(done)
    return problems


def _side_by_side(compare: Callable[[Parameter], list[str]], entries: Sequence[Parameter]) -> Iterator[list[str]]:
    """Yield what is found in each of ``entries``, in their order, several of which are compared at once.

    As many as there are processors for us, and no more values than :data:`SHARE` times those of the largest: each is in
    memory whole, and a machine may have a hundred processors.
    """
    threads, sizes = len(os.sched_getaffinity(0)), [math.prod(entry["shape"]) for entry in entries]
    most, taken = SHARE * max(sizes, default=0), 0
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Future[list[str]], int]] = deque()
        for entry, size in zip(entries, sizes, strict=True):
            while len(waiting) > threads or taken + size > most:
                future, given = waiting.popleft()
                taken -= given
                yield future.result()
            waiting.append((pool.submit(compare, entry), size))
            taken += size
        for future, _ in waiting:
            yield future.result()


def _difference(bundled: BundledTensor, whole: np.ndarray, factor: np.ndarray | None, scales: str) -> str:
    """Return how many values of a tensor are not the checkpoint's, and the first of them; empty for none."""
    tensor, original = _in_rows(bundled, whole)
    count, first = 0, ""
    for rows in row_blocks(tensor.shape):
        values, wanted = tensor.rows(rows), np.asarray(original[rows], np.float32)
        if tensor.row:
            wanted = wanted if factor is None else wanted * factor
            matrix = wanted.reshape(-1, wanted.shape[-1])
            wrong = ~(np.abs(values - wanted) <= allowed.of_values(matrix, tensor.row, scales).reshape(wanted.shape))
        elif factor is not None:  # a norm: what reads it shows whether it was divided by the right numbers
            wrong = ~((factor[rows] > 0) & np.isfinite(factor[rows]))
        else:
            wanted = wanted.astype(tensor.stored[0].dtype).astype(np.float32)
            wrong = values != wanted
        if wrong.any() and not first:
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            place = [at[0] + rows.start, *at[1:]]
            place = [*place[:-2], place[-1], place[-2]] if tensor.turned else place
            first = f"first at {place}: {values[at]:g} instead of {wanted[at]:g}"
        count += int(wrong.sum())
    if not count:
        return ""
    return (
        f"{tensor.source}: {count:,} of {np.prod(tensor.shape):,} values are not the checkpoint's within what "
        f"{tensor.row.name if tensor.row else tensor.stored[0].dtype} explains, {first}"
    )


def _factors(
    registry: Register, records: Mapping[str, Record], checkpoint: Mapping[str, np.ndarray] | Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return by tensor what the columns of a matrix must have been multiplied by, as the norm that it reads tells: that
    was divided by as much. The norm's tensor is there too; norms that are the checkpoint's are not. The second is what
    the biases of these norms were divided by.
    """
    by_name = {entry["name"]: entry for entry in registry["logical"]}
    found: dict[str, np.ndarray] = {}
    biases: dict[str, np.ndarray] = {}
    for entry in registry["logical"]:
        if entry.get("reads"):
            (norm,) = _of_parameter(by_name[entry["reads"]], records)
            values, original = norm.values(), np.asarray(checkpoint[norm.source], np.float32)
            if (values != original.astype(norm.stored[0].dtype).astype(np.float32)).any():
                with np.errstate(divide="ignore", invalid="ignore"):
                    factor = np.where(original == 0, 1, original / values).astype(np.float32)
                found |= dict.fromkeys([norm.source, *entry["sources"]], factor)
                biases[norm_bias(norm.source)] = factor
    return found, biases


def _in_rows(tensor: BundledTensor, original: np.ndarray) -> tuple[BundledTensor, np.ndarray]:
    """Return a tensor and the checkpoint's with the same rows; a single number is one row."""
    if not tensor.shape:
        return replace(tensor, shape=(1,), stored=[tensor.stored[0].reshape(1)]), original.reshape(1)
    return tensor, original.swapaxes(-1, -2) if tensor.turned else original
