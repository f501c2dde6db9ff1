"""Elementwise operators and reductions of traced graphs.

Each takes :class:`Values` and torch's arguments by their names, ``self`` and ``input`` as ``x``. Floats are of the
compute dtype, but what is made of positions alone is float32: an angle of half precision would be another position.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import relax as rx
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

if TYPE_CHECKING:
    from stages.models.family import AttentionCache

FLOATS = ("float16", "bfloat16", "float32")


@dataclass
class Remembered:
    """What is kept of sequences beside a KV cache: the runtime's object, the tensors in it, the last row of each
    sequence of a call int32 [b], and how many of the tensors were read so far.
    """

    state: Any
    tensors: Sequence[Any]
    ends: Tensor
    number: int = 0


@dataclass
class Values:
    """What operators know of the function that is built: its dtype, the cache, what that knows of attention (None for a
    model without), and what is kept of sequences beside it.
    """

    compute_dtype: str
    cache: PagedKVCache | None
    attention: AttentionCache | None = None
    layers: int = 0  # attentions so far
    states: Remembered | None = None


def emitted(expr: Any, name: str) -> Tensor:
    """Return ``expr`` as a tensor of the function that is built."""
    return op.wrap_nested(expr, name)


def expr_of(value: Any) -> Any:
    """Return the Relax expression of a tensor."""
    return value._expr  # noqa: SLF001 - the wrapped value has no other name


def is_float(value: Any) -> bool:
    """Say whether a value is a tensor of floats."""
    return isinstance(value, Tensor) and value.dtype in FLOATS


def pair(values: Values, x: Any, other: Any) -> tuple[Any, Any]:
    """Return both operands as tensors of one dtype, numbers as constants of the other's."""
    x, other = (computed(values, each) for each in (x, other))
    if not isinstance(x, Tensor):
        return number(x, other.dtype), other
    if not isinstance(other, Tensor):
        if isinstance(other, float) and not is_float(x):
            x = x.astype("float32")
        return x, number(other, x.dtype)
    if x.dtype != other.dtype:
        wanted = common(values, x.dtype, other.dtype)
        return x.astype(wanted), other.astype(wanted)
    return x, other


def computed(values: Values, value: Any) -> Any:
    """Cast a parameter that is no matrix to the compute dtype; return anything else as it is."""
    return value.astype(values.compute_dtype) if isinstance(value, nn.Parameter) and is_float(value) else value


def common(values: Values, one: str, other: str) -> str:
    """Return the dtype that two operands are promoted to."""
    if one == other:
        return one
    floats = [dtype for dtype in (one, other) if dtype in FLOATS]
    if len(floats) == 2:
        return values.compute_dtype
    return floats[0] if floats else "int32"


def number(value: float, dtype: str) -> Tensor:
    """Return a constant."""
    if dtype == "bool":
        return emitted(rx.const(bool(value), "bool"), "number")
    return emitted(rx.const(value, dtype), "number")


def _binary(operator: Callable[[Any, Any], Any], name: str) -> Callable[..., Tensor]:
    def apply(values: Values, x: Any, other: Any, alpha: float = 1, rounding_mode: str = "") -> Tensor:
        if rounding_mode:
            raise NotImplementedError(f"{name} with rounding_mode {rounding_mode}")
        if alpha != 1:
            other = ARITHMETIC["mul"](values, other, alpha)
        left, right = pair(values, x, other)
        return emitted(operator(expr_of(left), expr_of(right)), name)

    return apply


def _unary(operator: Callable[[Any], Any], name: str) -> Callable[..., Tensor]:
    def apply(values: Values, x: Any) -> Tensor:
        return emitted(operator(expr_of(computed(values, x))), name)

    return apply


def rsub(values: Values, x: Any, other: Any, alpha: float = 1) -> Tensor:
    """other - alpha * x."""
    return ARITHMETIC["sub"](values, other, x, alpha)


def div(values: Values, x: Any, other: Any) -> Tensor:
    """x / other, floats whatever they are."""
    x, other = (
        each.astype("float32") if isinstance(each, Tensor) and not is_float(each) else each for each in (x, other)
    )
    return _binary(rx.op.divide, "div")(values, x, other)


def reciprocal(values: Values, x: Any) -> Tensor:
    """1 / x."""
    return div(values, 1.0, x)


def power(values: Values, x: Any, exponent: Any) -> Tensor:
    """x ** exponent; a square is a product, which is exact."""
    if exponent == 2:
        return ARITHMETIC["mul"](values, x, x)
    return _binary(rx.op.power, "pow")(values, x, exponent)


def cast(values: Values, x: Any, dtype: str) -> Any:
    """X in another dtype; between floats there is one, that of what is computed, in which x is rounded to the halves
    that a modelling file asks for by name.
    """
    x = computed(values, x)
    if dtype in (*FLOATS, "float64"):
        x = x if is_float(x) else x.astype("float32")
        return halved(x) if (x.dtype, dtype) == ("float32", "bfloat16") else x
    return x.astype("int32" if dtype == "int64" else dtype)


def halved(x: Tensor) -> Tensor:
    """X float32, of which each number is the nearest that bfloat16 has: by its bits, because a cast there and back is
    none once operators are fused.
    """

    def nearest(x: te.Tensor) -> te.Tensor:
        def at(*place: Any) -> Any:
            bits = tirx.reinterpret("uint32", x[place])
            odd = (bits >> tirx.const(16, "uint32")) & tirx.const(1, "uint32")
            upper = (bits + odd + tirx.const(0x7FFF, "uint32")) & tirx.const(0xFFFF0000, "uint32")
            return tirx.reinterpret("float32", upper)

        return te.compute(x.shape, at, "halved")

    made: Tensor = op.tensor_expr_op(nearest, "halved", [x])
    return made


def gelu(values: Values, x: Any, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit."""
    return op.gelu(computed(values, x), None if approximate == "none" else approximate)


def clamp(values: Values, x: Any, min: Any = None, max: Any = None) -> Tensor:  # noqa: A002 - torch's names
    """X within bounds."""
    for operator, bound in ((rx.op.maximum, min), (rx.op.minimum, max)):
        if bound is not None:
            x = _binary(operator, "clamp")(values, x, bound)
    return x


def hardtanh(values: Values, x: Any, min_val: float = -1, max_val: float = 1) -> Tensor:
    """X within bounds."""
    return clamp(values, x, min_val, max_val)


def softplus(values: Values, x: Any, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta x)) / beta, x itself above the threshold; with all digits near zero, where time steps lie."""
    scaled = ARITHMETIC["mul"](values, x, beta)
    curved = ARITHMETIC["div"](values, log1p(values, ARITHMETIC["exp"](values, scaled)), beta)
    return where(values, ARITHMETIC["gt"](values, scaled, threshold), x, curved)


def expm1(values: Values, x: Any) -> Tensor:
    """exp(x) - 1; near zero, where that difference has few digits left, its series."""
    call = {name: functools.partial(ARITHMETIC[name], values) for name in ("mul", "add", "sub", "exp", "abs", "lt")}
    series: Any = 1.0
    for divisor in range(7, 1, -1):
        series = call["add"](call["mul"](call["mul"](x, 1 / divisor), series), 1.0)
    near = call["lt"](call["abs"](x), 0.35)
    return where(values, near, call["mul"](x, series), call["sub"](call["exp"](x), 1.0))


def log1p(values: Values, x: Any) -> Tensor:
    """log(1 + x), near zero too: what rounding takes from 1 + x is given back."""
    call = {name: functools.partial(ARITHMETIC[name], values) for name in ("add", "sub", "log", "div")}
    more = call["add"](x, 1.0)
    lost = call["sub"](x, call["sub"](more, 1.0))
    found: Tensor = call["add"](call["log"](more), call["div"](lost, more))
    return found


def where(values: Values, condition: Any, x: Any, other: Any) -> Tensor:
    """X where the condition holds, else other."""
    left, right = pair(values, x, other)
    return emitted(rx.op.where(expr_of(condition.astype("bool")), expr_of(left), expr_of(right)), "where")


def masked_fill(values: Values, x: Any, mask: Any, value: float) -> Tensor:
    """X with a number where the mask holds."""
    return where(values, mask, value, x)


def _reduction(operator: Callable[..., Any], name: str) -> Callable[..., Tensor]:
    def apply(values: Values, x: Any, dim: Any = None, keepdim: bool = False, dtype: str = "") -> Tensor:  # noqa: ARG001
        axes = [dim] if isinstance(dim, int) else [*dim] if dim else None
        return emitted(operator(expr_of(computed(values, x)), axes, keepdim), name)

    return apply


def variance(values: Values, x: Any, dim: Any, correction: int = 1, keepdim: bool = False) -> Tensor:
    """The variance along axes."""
    if correction:
        raise NotImplementedError("var with correction")
    return emitted(rx.op.variance(expr_of(computed(values, x)), [*dim], keepdim), "var")


def norm(values: Values, x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: str = "") -> Tensor:  # noqa: A002, ARG001
    """The Euclidean norm along axes."""
    if ord != 2:
        raise NotImplementedError(f"a norm of order {ord}")
    squares = ARITHMETIC["mul"](values, x, x)
    return ARITHMETIC["sqrt"](values, ARITHMETIC["sum"](values, squares, dim, keepdim))


def softmax(values: Values, x: Any, dim: int, dtype: str = "", half_to_float: bool = False) -> Tensor:  # noqa: ARG001
    """Softmax along an axis."""
    return op.softmax(computed(values, x), axis=dim)


ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{
        name: _binary(operator, name)
        for name, operator in {
            "add": rx.op.add,
            "sub": rx.op.subtract,
            "mul": rx.op.multiply,
            "minimum": rx.op.minimum,
            "maximum": rx.op.maximum,
            "eq": rx.op.equal,
            "ne": rx.op.not_equal,
            "lt": rx.op.less,
            "le": rx.op.less_equal,
            "gt": rx.op.greater,
            "ge": rx.op.greater_equal,
            "logical_and": rx.op.logical_and,
            "logical_or": rx.op.logical_or,
        }.items()
    },
    **{
        name: _unary(operator, name)
        for name, operator in {
            "neg": rx.op.negative,
            "abs": rx.op.abs,
            "sqrt": rx.op.sqrt,
            "rsqrt": rx.op.rsqrt,
            "exp": rx.op.exp,
            "log": rx.op.log,
            "sin": rx.op.sin,
            "cos": rx.op.cos,
            "tanh": rx.op.tanh,
            "erf": rx.op.erf,
            "floor": rx.op.floor,
            "sigmoid": rx.op.sigmoid,
            "silu": rx.op.nn.silu,
            "relu": rx.op.nn.relu,
            "square": rx.op.square,
            "logical_not": rx.op.logical_not,
        }.items()
    },
    **{
        name: _reduction(operator, name)
        for name, operator in {"mean": rx.op.mean, "sum": rx.op.sum, "amax": rx.op.max}.items()
    },
    "rsub": rsub,
    "div": div,
    "pow": power,
    "reciprocal": reciprocal,
    "cast": cast,
    "gelu": gelu,
    "clamp": clamp,
    "hardtanh": hardtanh,
    "softplus": softplus,
    "expm1": expm1,
    "log1p": log1p,
    "where": where,
    "masked_fill": masked_fill,
    "var": variance,
    "linalg_vector_norm": norm,
    "softmax": softmax,
}
