"""Selection operators of traced graphs: top-k, argmax, scatter, and mixture-of-experts layers.

Conventions are those of :mod:`stages.models.arithmetic`. Each is a computation of its own, for TVM's operators of these
names call libraries that a bundle does not carry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from stages.models.arithmetic import Values, computed
from stages.models.matrices import Matrix


def topk(values: Values, x: Any, k: int, dim: int = -1, largest: bool = True, **_order: Any) -> list[Tensor]:
    """The k largest of each row, in order, and where they are; of equals the first."""
    if not largest:
        raise NotImplementedError("topk of the smallest")
    flat, sizes = _rows(computed(values, x), dim)
    count = int(sizes[-1])

    def chosen(x: te.Tensor) -> list[te.Tensor]:
        def before(row: tirx.Var, place: tirx.Var) -> tirx.PrimExpr:
            other = te.reduce_axis((0, count), "other")
            value, rival = x[row, place], x[row, other]
            earlier = tirx.any(rival > value, tirx.all(rival == value, other < place))
            return te.sum(tirx.Select(earlier, tirx.const(1, "int32"), tirx.const(0, "int32")), axis=other)

        rank = te.compute(x.shape, before, name="rank")

        def picked(of: Callable[[Any, Any], Any], dtype: str) -> te.Tensor:
            def pick(row: tirx.Var, at: tirx.Var) -> tirx.PrimExpr:
                place = te.reduce_axis((0, count), "place")
                found = tirx.Select(rank[row, place] == at, of(row, place), tirx.const(0, dtype))
                return te.sum(found, axis=place)

            return te.compute((x.shape[0], k), pick, name="picked")

        return [
            picked(lambda row, place: x[row, place], x.dtype),
            picked(lambda _row, place: place.astype("int32"), "int32"),
        ]

    found = op.tensor_expr_op(chosen, "topk", [flat])
    return [op.reshape(each, (*sizes[:-1], k)) for each in found]


def largest(values: Values, x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """Maximum and argmax over an axis."""
    if dim is None:
        raise NotImplementedError("the largest of all")
    found = topk(values, x, 1, dim)
    return found if keepdim else [op.reshape(each, each.shape[:-1]) for each in found]


def place_of_largest(values: Values, x: Any, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Argmax over the last axis."""
    found: Tensor = largest(values, x, dim, keepdim)[1]
    return found


def scatter(values: Values, x: Any, dim: int, index: Tensor, src: Any = None, value: float | None = None) -> Tensor:
    """X with the entries of each row that ``index`` names replaced, by those of ``src`` or by a ``value``."""
    flat, sizes = _rows(computed(values, x), dim)
    places, _ = _rows(index.astype("int32"), dim)
    sources = [] if src is None else [_rows(computed(values, src).astype(flat.dtype), dim)[0]]
    count = int(places.shape[-1])

    def replaced(x: te.Tensor, index: te.Tensor, *src: te.Tensor) -> te.Tensor:
        def found(of: Callable[[Any, Any], Any], dtype: str) -> te.Tensor:
            def entry(row: tirx.Var, place: tirx.Var, at: Any) -> tirx.PrimExpr:
                return tirx.Select(index[row, at] == place, of(row, at), tirx.const(0, dtype))

            def total(row: tirx.Var, place: tirx.Var) -> tirx.PrimExpr:
                if count == 1:  # TVM's schedules inline a sum of one term wrongly
                    return entry(row, place, 0)
                at = te.reduce_axis((0, count), "at")
                return te.sum(entry(row, place, at), axis=at)

            return te.compute(x.shape, total, name="scattered")

        hits = found(lambda _row, _at: tirx.const(1, "int32"), "int32")
        new = found(lambda row, at: src[0][row, at], x.dtype) if src else None

        def entry(row: tirx.Var, place: tirx.Var) -> tirx.PrimExpr:
            other = new[row, place] if new is not None else tirx.const(value, x.dtype)
            return tirx.Select(hits[row, place] > 0, other, x[row, place])

        return te.compute(x.shape, entry, name="scatter")

    return op.reshape(op.tensor_expr_op(replaced, "scatter", [flat, places, *sources]), tuple(sizes))


def expert_linear(values: Values, x: Any, weight: Matrix, chosen: Tensor, features: int) -> Tensor:
    """Layers of experts: row r of the result is x[r // c] @ w.T, w being rows ``chosen[r]`` * ``features`` and on of
    ``weight``, and c how many experts each row of x has. Of the weights, those of chosen experts alone are read.
    """
    x = x.astype(values.compute_dtype)
    rows, width = chosen.shape[0], int(x.shape[-1])
    experts = weight.shape[0] // features
    value: Callable[..., tirx.PrimExpr] = weight.value

    def layer(x: te.Tensor, chosen: te.Tensor, *stored: te.Tensor) -> te.Tensor:
        each = tirx.floordiv(rows, x.shape[0])

        def product(row: tirx.Var, feature: tirx.Var) -> tirx.PrimExpr:
            k = te.reduce_axis((0, width), "k")
            place = _within(chosen[row], experts) * features + feature
            return te.sum(x[tirx.floordiv(row, each), k] * value(*stored, place, k), axis=k)

        return te.compute((rows, features), product, name="expert_linear")

    return op.tensor_expr_op(layer, "expert_linear", [x, chosen, *weight.stored])


def _within(index: Any, count: int) -> Any:
    """Return an index, clipped: whatever was computed, nothing wild is read."""
    return tirx.max(tirx.min(index, tirx.const(count - 1, "int32")), tirx.const(0, "int32"))


def _rows(x: Tensor, dim: int) -> tuple[Tensor, Sequence[Any]]:
    """Return x [..., n], of which ``dim`` must be the last axis, as [rows, n], and its sizes."""
    if dim % x.ndim != x.ndim - 1:
        raise NotImplementedError("choosing along another axis than the last")
    outer = functools.reduce(lambda a, b: a * b, x.shape[:-1], 1)
    return op.reshape(x, (outer, x.shape[-1])), x.shape


CHOOSING: dict[str, Callable[..., Any]] = {
    "topk": topk,
    "max": largest,
    "argmax": place_of_largest,
    "scatter": scatter,
    "expert_linear": expert_linear,
}
