"""The operators that traced graphs are written in, each as a function that emits TVM's: shapes, layers, attention, and
those of :mod:`stages.models.arithmetic`, whose conventions hold here too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax as rx
from tvm.relax.frontend.nn import Tensor, op

from stages.models.arithmetic import ARITHMETIC, Values, common, computed, emitted, expr_of, number, pair
from stages.models.choosing import CHOOSING
from stages.models.layers import Linear
from stages.models.matrices import take
from stages.models.recurrence import RECURRENCE
from stages.sizes import PAGE_SIZE

NO_WEIGHT = -3e4  # a score whose power is 0, in half precision too


def reshape(values: Values, x: Any, shape: Sequence[Any]) -> Tensor:
    """X in another shape."""
    return op.reshape(computed(values, x), tuple(shape))


def broadcast(values: Values, x: Any, shape: Sequence[Any]) -> Tensor:
    """X repeated along axes of size one."""
    return emitted(rx.op.broadcast_to(expr_of(computed(values, x)), tuple(shape)), "broadcast")


def transpose(values: Values, x: Any, dim0: int, dim1: int) -> Tensor:
    """X with two axes exchanged."""
    axes = [*range(x.ndim)]
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return permute(values, x, axes)


def permute(values: Values, x: Any, dims: Sequence[int]) -> Tensor:
    """X with its axes in another order."""
    return op.permute_dims(computed(values, x), [axis % x.ndim for axis in dims])


def turned(values: Values, x: Any) -> Tensor:
    """The transpose of a matrix."""
    return permute(values, x, [1, 0])


def cut(values: Values, x: Any, dim: int, start: int, end: int, step: int) -> Tensor:
    """A part of x along an axis."""
    sliced = rx.op.strided_slice(expr_of(computed(values, x)), [dim], [start], [end], [step])
    return emitted(sliced, "slice")


def select(values: Values, x: Any, index: int, dim: int = 0) -> Tensor:
    """One place of x along an axis, which goes."""
    dim %= x.ndim
    index %= int(x.shape[dim])
    return emitted(rx.op.squeeze(expr_of(cut(values, x, dim, index, index + 1, 1)), [dim]), "select")


def split(values: Values, x: Any, sizes: Sequence[int], dim: int) -> Any:
    """Parts of x along an axis."""
    x = computed(values, x)
    if len(sizes) == 1:
        return [x]
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes) - 1)]
    return op.split(x, len(sizes) if len(set(sizes)) == 1 else ends, axis=dim)


def unbind(values: Values, x: Any, dim: int) -> list[Tensor]:
    """The places of x along an axis."""
    return [select(values, x, number, dim) for number in range(int(x.shape[dim]))]


def item(_values: Values, x: Any, index: int) -> Any:
    """One of several."""
    return x[index]


def cat(values: Values, tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """Tensors one after the other along an axis."""
    found = [computed(values, tensor) for tensor in tensors]
    dtype = functools.reduce(functools.partial(common, values), [tensor.dtype for tensor in found])
    return op.concat([tensor.astype(dtype) for tensor in found], dim=dim % found[0].ndim)


def stack(values: Values, tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """Tensors side by side along a new axis."""
    dim %= tensors[0].ndim + 1
    return cat(values, [emitted(rx.op.expand_dims(expr_of(t), dim), "stack") for t in tensors], dim)


def slice_scatter(
    values: Values, x: Any, src: Any, dim: int = 0, start: int = 0, end: int | None = None, step: int = 1
) -> Tensor:
    """X with a part along an axis replaced by ``src``."""
    dim %= x.ndim
    size = int(x.shape[dim])
    start, end, step = slice(start, end, step).indices(size)
    if step != 1:  # every place is taken from one of the two
        places = np.arange(size, dtype="int32")
        places[start:end:step] = size + np.arange(len(range(start, end, step)), dtype="int32")
        found = rx.op.take(expr_of(cat(values, [x, src], dim)), rx.const(places), dim)
        return emitted(found, "slice_scatter")
    outer = [cut(values, x, dim, *limits, 1) for limits in ((0, start), (end, size)) if limits[0] < limits[1]]
    return cat(values, [*outer[: start > 0], src, *outer[start > 0 :]], dim)


def select_scatter(values: Values, x: Any, src: Any, dim: int, index: int) -> Tensor:
    """X with one place along an axis replaced by ``src``, which has no such axis."""
    dim %= x.ndim
    index %= int(x.shape[dim])
    return slice_scatter(values, x, emitted(rx.op.expand_dims(expr_of(src), dim), "place"), dim, index, index + 1)


def polar(values: Values, abs: Any, angle: Any) -> Tensor:  # noqa: A002 - torch's name
    """Complex numbers, pairs of floats [..., 2], of these magnitudes and angles."""
    parts = [ARITHMETIC["mul"](values, abs, ARITHMETIC[part](values, angle)) for part in ("cos", "sin")]
    return stack(values, parts, -1)


def complex_mul(values: Values, x: Any, other: Any) -> Tensor:
    """The products of complex numbers, pairs of floats [..., 2]."""
    (a, b), (c, d) = (unbind(values, each, -1) for each in (x, other))
    mul = functools.partial(ARITHMETIC["mul"], values)
    real = ARITHMETIC["sub"](values, mul(a, c), mul(b, d))
    return stack(values, [real, ARITHMETIC["add"](values, mul(a, d), mul(b, c))], -1)


def repeat(values: Values, x: Any, repeats: Sequence[int]) -> Tensor:
    """X several times along each axis."""
    return emitted(rx.op.tile(expr_of(computed(values, x)), [*repeats]), "repeat")


def repeat_interleave(values: Values, x: Any, repeats: int, dim: int) -> Tensor:
    """Each place of x several times along an axis."""
    return emitted(rx.op.repeat(expr_of(computed(values, x)), repeats, dim % x.ndim), "repeat")


def matmul(values: Values, x: Any, other: Any = None, mat2: Any = None) -> Tensor:
    """A matrix product; of one column by one row, the product of each with each, which is exact."""
    other = mat2 if other is None else other
    left, right = pair(values, x, other)
    if left.shape[-1] == 1 and left.ndim > 1 and right.ndim > 1:
        return emitted(rx.op.multiply(expr_of(left), expr_of(right)), "outer")
    return op.matmul(left, right)


def gather(values: Values, x: Any, dim: int, index: Tensor, **_gradients: Any) -> Tensor:
    """The places of x along an axis that ``index`` names, one for each of its own."""
    found = rx.op.gather_elements(expr_of(computed(values, x)), expr_of(index.astype("int64")), dim % x.ndim)
    return emitted(found, "gather")


def linear(values: Values, x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """X @ weight.T + bias."""
    if isinstance(weight, Tensor):
        y = op.matmul(x, op.permute_dims(computed(values, weight)))
        return y if bias is None else y + bias.astype(y.dtype)
    return Linear(weight, bias)(x.astype(values.compute_dtype))


def embedding(values: Values, weight: Any, indices: Tensor, padding_idx: int = -1, **_gradients: Any) -> Tensor:  # noqa: ARG001
    """Rows of a table."""
    flat = op.reshape(indices, (functools.reduce(lambda a, b: a * b, indices.shape, 1),)).astype("int32")
    if isinstance(weight, Tensor):
        rows = computed(values, take(weight, flat).astype(values.compute_dtype))
    else:
        rows = weight.rows(flat)
    return op.reshape(rows, (*indices.shape, rows.shape[-1]))


def rms_norm(values: Values, x: Tensor, weight: Any, eps: float, offset: float) -> Tensor:
    """X / sqrt(mean(x ** 2) + eps) * (offset + weight)."""
    x = x.astype(values.compute_dtype)
    gain = weight.astype(x.dtype)
    if offset:
        gain = gain + offset
    return op.rms_norm(x, gain, axes=-1, epsilon=eps)


def layer_norm(
    values: Values,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001 - torch's
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""
    (width,) = normalized_shape
    dtype = "float32" if values.compute_dtype == "bfloat16" else values.compute_dtype
    gain, shift = (
        emitted(rx.const(np.full(width, fill, "float32")), "plain").astype(dtype)
        if each is None
        else each.astype(dtype)
        for each, fill in ((weight, 1), (bias, 0))
    )
    return op.layer_norm(x.astype(dtype), width, gain, shift, eps=eps).astype(values.compute_dtype)


def arange(_values: Values, start: int, end: int, step: int, dtype: str) -> Tensor:
    """Numbers in order."""
    array = np.arange(start, end, step, dtype="int32" if dtype == "int64" else dtype)
    return emitted(rx.const(array), "arange")


def full(values: Values, value: Any, dtype: str, shape: Sequence[Any]) -> Tensor:
    """One number everywhere."""
    dtype = {"int64": "int32", "float64": "float32"}.get(dtype, dtype)
    one = number(value, dtype)
    return broadcast(values, one, shape) if shape else one


def attention(
    values: Values,
    scale: float,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qkv: Tensor | None = None,
    by_token: str = "",
    sinks: Any = None,
    chunk: int = 0,
    chosen: Tensor | None = None,
    **_of_the_cache: Any,
) -> Tensor:
    """Attention of q [1, heads, s, d], k and v [1, kv heads, s, d] over the cache, or of ``qkv`` [1, s, all of them one
    after the other]: [1, s, heads, d of v]. Those named in ``by_token`` are [1, s, heads, d].

    Heads are widened by zeros to what the cache has, which add nothing to any product, and those of k and v are there
    several times where it has more of them. Of ``sinks`` [heads] each query has its own in a channel of its own, and in
    others the words that say which tokens were ``chosen`` [1, s, words]. With a ``chunk`` the scale is negative
    (:class:`~stages.models.family.AttentionCache`).
    """
    assert values.cache is not None
    assert values.attention is not None
    own = values.attention
    wide, times = own.sinks or own.chosen or own.head_dim, own.num_kv_heads // kv_heads
    if qkv is not None:
        qkv = reshape(values, qkv, (1, qkv.shape[1], heads + 2 * kv_heads, width))
        if times > 1:
            q, k, v = op.split(qkv, [heads, heads + kv_heads], axis=2)
            qkv, by_token = None, "qkv"
    if qkv is None:
        found = [
            each if name in by_token else permute(values, each, [0, 2, 1, 3])
            for name, each in (("q", q), ("k", k), ("v", v))
            if each is not None
        ]
        if times > 1:
            found[1:] = [repeat_interleave(values, each, times, 2) for each in found[1:]]
        qkv = op.concat([_widened(each.astype(values.compute_dtype), wide) for each in found], dim=2)
    else:
        qkv = _widened(qkv, wide)
    if own.sinks:
        qkv = _with_sinks(values, qkv, heads, sinks)
    if own.words:
        qkv = _with_chosen(values, qkv, heads, chosen)
    qkv = _widened(qkv, own.head_dim)
    y = values.cache.attention_with_fused_qkv(values.layers, qkv, heads, sm_scale=-scale if chunk else scale)
    values.layers += 1
    return y if value_width == own.head_dim else cut(values, y, 3, 0, value_width, 1)


def _with_sinks(values: Values, qkv: Tensor, heads: int, sinks: Any) -> Tensor:
    """Return qkv [1, s, h, d] with a channel more: the sink of queries (one of no weight where ``sinks`` is None)."""
    shape = (*qkv.shape[:2], heads, 1)
    if sinks is None:
        of_queries = full(values, NO_WEIGHT, qkv.dtype, shape)
    else:
        of_queries = broadcast(values, reshape(values, sinks.astype(qkv.dtype), (1, 1, heads, 1)), shape)
    others = full(values, 0.0, qkv.dtype, (*qkv.shape[:2], qkv.shape[2] - heads, 1))
    return op.concat([qkv, op.concat([of_queries, others], dim=2)], dim=3)


def _with_chosen(values: Values, qkv: Tensor, heads: int, chosen: Tensor | None) -> Tensor:
    """Return qkv [1, s, h, d] with channels more: the words of queries (all tokens where ``chosen`` is None)."""
    assert values.attention is not None
    words, tokens = values.attention.words, qkv.shape[1]
    if chosen is None:
        of_queries = full(values, float((1 << PAGE_SIZE) - 1), qkv.dtype, (1, tokens, heads, words))
    else:
        of_queries = op.reshape(_widened(chosen.astype(qkv.dtype), heads * words), (1, tokens, heads, words))
    others = full(values, 0.0, qkv.dtype, (1, tokens, qkv.shape[2] - heads, words))
    return op.concat([qkv, op.concat([of_queries, others], dim=2)], dim=3)


def _widened(x: Tensor, width: int) -> Tensor:
    missing = width - int(x.shape[-1])
    if not missing:
        return x
    zeros = emitted(rx.op.zeros((*x.shape[:-1], missing), x.dtype), "zeros")
    return op.concat([x, zeros], dim=len(x.shape) - 1)


OPERATORS: dict[str, Callable[..., Any]] = {
    **ARITHMETIC,
    **CHOOSING,
    **RECURRENCE,
    "reshape": reshape,
    "broadcast": broadcast,
    "transpose": transpose,
    "permute": permute,
    "t": turned,
    "slice": cut,
    "select": select,
    "split": split,
    "unbind": unbind,
    "item": item,
    "cat": cat,
    "stack": stack,
    "slice_scatter": slice_scatter,
    "select_scatter": select_scatter,
    "polar": polar,
    "complex_mul": complex_mul,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "matmul": matmul,
    "gather": gather,
    "linear": linear,
    "embedding": embedding,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "arange": arange,
    "full": full,
    "attention": attention,
}
