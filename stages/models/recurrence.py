"""Operators of traced graphs that remember: what each keeps of a sequence is a tensor of its state, as large for a long
text as for a short one. Conventions are those of :mod:`stages.models.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm.relax.frontend.nn import Tensor, op

from stages.kernels import recurrences
from stages.kernels.cpu.choose import choose_tokens, kept_keys
from stages.models.arithmetic import Values, computed
from stages.models.rwkv_layers import StateTensor
from stages.sizes import words_of


def causal_conv(values: Values, x: Tensor, weight: Any, channels: int, taps: int, bias: Any = None) -> Tensor:
    """Each channel of x [1, channels, s] convolved with its own taps of the weight [channels, taps]."""
    rows = op.reshape(op.permute_dims(x, [0, 2, 1]), (x.shape[2], channels))
    kernel = recurrences.causal_conv(taps, channels)
    y = _walked(values, "causal_conv", kernel, [rows, computed(values, weight)], channels)
    if bias is not None:
        y = y + bias.astype("float32")
    return op.permute_dims(op.reshape(y, (1, x.shape[2], channels)), [0, 2, 1]).astype(values.compute_dtype)


def ssm_scan(
    values: Values, x: Tensor, dt: Tensor, a: Any, b: Tensor, c: Tensor, heads: int, width: int, groups: int, size: int
) -> Tensor:
    """Mamba 2's state space of x [1, s, heads, width], dt [1, s, heads], a [heads], b and c [1, s, groups, size]."""
    n = x.shape[1]
    operands = [
        op.reshape(x, (n, heads * width)),
        op.reshape(dt, (n, heads)),
        computed(values, a),
        *(op.reshape(each, (n, groups * size)) for each in (b, c)),
    ]
    y = _walked(values, "ssm_scan", recurrences.ssm_scan(heads, groups, size, width), operands, heads * width)
    return op.reshape(y, (1, n, heads, width))


def selective_scan(
    values: Values, x: Tensor, dt: Tensor, a: Any, b: Tensor, c: Tensor, channels: int, size: int
) -> Tensor:
    """Mamba's state space of x and dt [1, channels, s], a [channels, size], b and c [1, size, s]."""
    n = x.shape[2]

    def rows(x: Tensor, width: int) -> Tensor:
        return op.reshape(op.permute_dims(x, [0, 2, 1]), (n, width))

    operands = [
        *(rows(each, channels) for each in (x, dt)),
        computed(values, a),
        *(rows(each, size) for each in (b, c)),
    ]
    y = _walked(values, "selective_scan", recurrences.selective_scan(size, channels), operands, channels)
    return op.permute_dims(op.reshape(y, (1, n, channels)), [0, 2, 1])


def linear_scan(values: Values, x: Tensor, fade: Tensor, channels: int) -> Tensor:
    """The linear recurrence of x and fade [1, s, channels]."""
    n = x.shape[1]
    operands = [op.reshape(each, (n, channels)) for each in (x, fade)]
    y = _walked(values, "linear_scan", recurrences.linear_scan(channels), operands, channels)
    return op.reshape(y, (1, n, channels))


def delta_rule(
    values: Values,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    heads: int,
    key_heads: int,
    size: int,
    rates: int,
    width: int,
) -> Tensor:
    """The gated delta rule of q, k [1, s, key heads, size], v [1, s, heads, width], beta [1, s, heads] and decay the
    same, or [1, s, heads, size].
    """
    n = v.shape[1]
    operands = [
        *(op.reshape(each, (n, key_heads * size)) for each in (q, k)),
        op.reshape(v, (n, heads * width)),
        op.reshape(decay, (n, heads * rates)),
        op.reshape(beta, (n, heads)),
    ]
    kernel = recurrences.delta_rule(heads, key_heads, size, rates, width)
    y = _walked(values, "delta_rule", kernel, operands, heads * width)
    return op.reshape(y, (1, n, heads, width)).astype(values.compute_dtype)


def choose(
    values: Values,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    positions: Tensor,
    heads: int,
    size: int,
    count: int,
    context: int,
) -> Tensor:
    """The tokens that score most with each query of q [1, s, heads, size], of k [1, s, size] and those before, as
    words [1, s, words]; heads count as ``weights`` [1, s, heads] say.
    """
    n = k.shape[1]
    sizes = ((q, heads * size), (k, size), (weights, heads), (positions, 1))
    operands = [op.reshape(each, (n, width)) for each, width in sizes]
    words = words_of(context)
    y = _walked(values, "choose", choose_tokens(heads, size, count, context), operands, words)
    return op.reshape(y, (1, n, words))


def _walked(values: Values, name: str, kernel: Any, operands: Sequence[Tensor], width: int) -> Tensor:
    """Return [s, width] of what ``kernel`` makes of the operands and of the next tensor of the state."""
    states = values.states
    assert states is not None
    ends = states.ends
    before = states.state.get(0, states.number, ends.shape[0], states.tensors[states.number])
    rows = [each.astype("float32") for each in operands]
    like = [(rows[0].shape[0], width), before.shape]
    made = op.tensor_ir_op(
        kernel, name, [*rows, before, ends], [Tensor.placeholder(shape, "float32") for shape in like]
    )
    y, after = made
    states.state = states.state.set(0, states.number, after)
    states.number += 1
    return y


# Operator -> how many numbers it keeps of a sequence, by its arguments.
KEPT: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "causal_conv": lambda node: (node["taps"] - 1) * node["channels"],
    "ssm_scan": lambda node: node["heads"] * node["size"] * node["width"],
    "selective_scan": lambda node: node["channels"] * node["size"],
    "linear_scan": lambda node: node["channels"],
    "delta_rule": lambda node: node["heads"] * node["size"] * node["width"],
    "choose": lambda node: kept_keys(node["size"], node["context"]),
}
RECURRENCE: dict[str, Callable[..., Any]] = {
    "causal_conv": causal_conv,
    "ssm_scan": ssm_scan,
    "selective_scan": selective_scan,
    "linear_scan": linear_scan,
    "delta_rule": delta_rule,
    "choose": choose,
}


def states_of(nodes: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[StateTensor, ...]:
    """Return what the nodes of a graph keep, one tensor each, in their order."""
    return tuple(StateTensor(KEPT[name](arguments), "float32") for name, arguments in nodes if name in KEPT)
