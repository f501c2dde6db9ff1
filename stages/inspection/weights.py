"""Finds the tensors that differ between two results of quantize, and by how much, for ``pipeline diff``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from stages.quantization import layouts
from stages.quantization.blocks import row_blocks
from stages.quantization.dtypes import numpy_dtype
from stages.quantization.parameter import restored
from stages.quantization.rows import Row
from stages.sizes import N32_BLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stages.documents.weights import ErrorLine, ErrorReport

    Files = Mapping[str, Path]

SHOWN = 30  # tensors; more are counted


class _Weights:
    """The stored parameters of one result, by the names and shapes of its report."""

    def __init__(self, files: Files) -> None:
        index = json.loads(files["weights/tensor-cache.json"].read_bytes())
        report: ErrorReport = json.loads(files["report.json"].read_bytes())
        self.lines: dict[str, ErrorLine] = {line["name"]: line for line in report["tensors"]}
        self.how = {"scheme": report["scheme"], "scales": report["scales"]}
        self._places = {
            record["name"]: (files[f"weights/{shard['dataPath']}"], record)
            for shard in index["records"]
            for record in shard["records"]
        }

    def stored(self, name: str) -> list[np.ndarray]:
        """Return the stored tensors of a parameter, mapped."""
        row = self.lines[name]["quantize"]
        names = [name.removesuffix("weight") + part for part in Row(**row).parts] if row else [name]
        places = [self._places[stored] for stored in names]
        return [
            np.memmap(path, numpy_dtype(record["dtype"]), "r", record["byteOffset"], tuple(record["shape"]))
            for path, record in places
        ]

    def values(self, name: str, rows: slice) -> np.ndarray:
        """Return rows of a parameter in float32."""
        line, stored = self.lines[name], self.stored(name)
        rows = slice(rows.start, min(rows.stop, line["shape"][0]))  # the last block of a layout is filled up
        if not line["quantize"]:
            return _rows(stored[0], rows).astype(np.float32)
        row = Row(**line["quantize"])
        if line["layout"] == "kn":
            stored = [layouts.restore("kn", tensor, rows.stop) for tensor in stored]
        if row.kind == "tensor":
            return restored([stored[0][rows], stored[1]], row, line["shape"][1])
        each = zip(stored, row.element_bits, strict=True)
        return restored([_rows(tensor, rows, bits) for tensor, bits in each], row, line["shape"][1])

    def relaid(self, other: _Weights, name: str) -> bool:
        """Say whether the other result stores a parameter in another layout."""
        return [x.ndim for x in self.stored(name)] != [x.ndim for x in other.stored(name)]


def _rows(stored: np.ndarray, rows: slice, bits: Sequence[int] = ()) -> np.ndarray:
    """Return rows of a stored tensor as layout nk has them; a matrix in blocks has a dimension more."""
    if stored.ndim < 3:
        return stored[rows]
    first, last = rows.start // N32_BLOCK, -(-rows.stop // N32_BLOCK)
    blocks = layouts.restore("n32", stored[first:last], (last - first) * N32_BLOCK, bits)
    return blocks[rows.start - first * N32_BLOCK : rows.stop - first * N32_BLOCK]


def weights(a: Files, b: Files) -> list[tuple[str, str, str]]:
    """Return rows (name, value in A, value in B): settings, tensors that one side lacks, and tensors by their distance.

    How far: the differences' root mean square over that of A, and the largest one over A's largest value.
    """
    old, new = _Weights(a), _Weights(b)
    rows = [(what, old.how[what], new.how[what]) for what in old.how if old.how[what] != new.how[what]]
    names = {**old.lines, **new.lines}
    described = {name: [_describe(side.lines.get(name)) for side in (old, new)] for name in names}
    unlike = [name for name in names if not _comparable(old.lines.get(name), new.lines.get(name))]
    rows += [(name, described[name][0], described[name][1]) for name in unlike[:SHOWN]]
    alike = sorted(names.keys() - unlike)
    unequal = [name for name in alike if not _equal(old.stored(name), new.stored(name))]
    measured = [(*_distance(old, new, name), name) for name in unequal]
    # Results for two targets may hold equal values in two layouts.
    found = [(rmse, worst, name) for rmse, worst, name in measured if worst or not old.relaid(new, name)]
    apart = sorted(found, key=lambda found: (-found[0], found[2]))
    rows += [
        (name, described[name][0], f"{described[name][1]}, RMSE {rmse:.2e}, max {worst:.2e}")
        for rmse, worst, name in apart[:SHOWN]
    ]
    hidden = max(len(unlike) - SHOWN, 0) + max(len(apart) - SHOWN, 0)
    if hidden:
        rows.append(("tensors", "", f"and {hidden} more differ"))
    if apart:
        rows.append(("tensors of equal content", f"{len(names) - len(unlike) - len(apart)} of {len(names)}", ""))
    return rows


def _describe(line: ErrorLine | None) -> str:
    return f"{line['scheme']} {line['shape']}" if line else "-"


def _comparable(a: ErrorLine | None, b: ErrorLine | None) -> bool:
    return a is not None and b is not None and a["shape"] == b["shape"]


def _equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Say whether two lists of stored tensors hold the same bytes, in little memory."""
    if [(x.shape, x.dtype) for x in a] != [(x.shape, x.dtype) for x in b]:
        return False
    pairs = [(x.view(f"u{x.itemsize}"), y.view(f"u{y.itemsize}")) for x, y in zip(a, b, strict=True)]
    return all(np.array_equal(x[rows], y[rows]) for x, y in pairs for rows in row_blocks(x.shape))


def _distance(old: _Weights, new: _Weights, name: str) -> tuple[float, float]:
    shape = old.lines[name]["shape"]
    squares = power = worst = peak = 0.0
    for rows in row_blocks(shape):
        one, other = (side.values(name, rows).astype(np.float64) for side in (old, new))
        squares += float(((one - other) ** 2).sum())
        power += float((one**2).sum())
        worst = max(worst, float(np.abs(one - other).max()))
        peak = max(peak, float(np.abs(one).max()))
    return (np.sqrt(squares / power), worst / peak) if power else (float(squares > 0), float(worst > 0))
