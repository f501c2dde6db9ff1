"""Replaces functions that process a sequence token by token or in chunks by operators of one node that keep the state.

Every modelling file of transformers has them under the same names, and calls them as globals of its own.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@contextmanager
def sequential(model: Any) -> Iterator[None]:
    """Let the modelling files of ``model`` call what is in :data:`OPERATORS`."""
    files = {type(module).__module__: sys.modules[type(module).__module__] for module in model.modules()}
    before = [
        (vars(file), name, vars(file)[name]) for file in files.values() for name in OPERATORS if name in vars(file)
    ]
    for names, name, _ in before:
        names[name] = OPERATORS[name]
    try:
        yield
    finally:
        for names, name, function in before:
            names[name] = function


def _refuse(where: str, more: Mapping[str, object]) -> None:
    strange = sorted(name for name, value in more.items() if value is not None and name not in IDLE)
    if strange:
        raise ConfigError(f"{where} with {', '.join(strange)} is not supported")


def causal_conv(x: Any, weight: Any, bias: Any = None, activation: str | None = None, **more: Any) -> Any:
    """Take the place of ``causal_conv1d_fn``: x [b, channels, n], weight [channels, taps]."""
    import torch
    from transformers.activations import ACT2FN

    _refuse("a short convolution", more)
    y = torch.ops.stagegraph.causal_conv(x, weight, bias)
    return y if activation is None else ACT2FN[activation](y)


def ssm_scan(
    x: Any,
    dt: Any,
    A: Any,  # noqa: N803 - part of the interface, as all names here
    B: Any,  # noqa: N803
    C: Any,  # noqa: N803
    chunk_size: int,  # noqa: ARG001
    D: Any = None,  # noqa: N803
    dt_bias: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **more: Any,
) -> Any:
    """Take the place of ``mamba2_chunk_scan``: x [b, n, heads, width], dt [b, n, heads], B, C [b, n, groups, size]."""
    import torch

    _refuse("a state space", {**more, "return_final_states": return_final_states or None})
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    low, high = dt_limit
    if low > 0 or high != float("inf") or not dt_softplus:
        dt = torch.clamp(dt, low, None if high == float("inf") else high)
    y = torch.ops.stagegraph.ssm_scan(x, dt, A, B, C)
    return y if D is None else y + D[:, None] * x


def selective_scan(
    x: Any,
    dt: Any,
    A: Any,  # noqa: N803
    B: Any,  # noqa: N803
    C: Any,  # noqa: N803
    D: Any = None,  # noqa: N803
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,  # noqa: ARG001 - ways to the same numbers
    use_associative_scan: bool = False,  # noqa: ARG001
    **more: Any,
) -> Any:
    """Take the place of ``mamba_selective_scan``: x and dt [b, channels, n], A [channels, size], B, C [b, size, n]."""
    import torch

    _refuse("a selective scan", {**more, "return_last_state": return_last_state or None})
    dt = dt if delta_bias is None else dt + delta_bias[:, None]
    dt = torch.nn.functional.softplus(dt) if delta_softplus else dt
    y = torch.ops.stagegraph.selective_scan(x, dt, A, B, C)
    y = y if D is None else y + D[:, None] * x
    return y if z is None else y * torch.nn.functional.silu(z)


def delta_rule(
    query: Any,
    key: Any,
    value: Any,
    g: Any,
    beta: Any,
    chunk_size: int = 64,  # noqa: ARG001 - part of the interface
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **more: Any,
) -> tuple[Any, None]:
    """Take the place of ``torch_chunk_gated_delta_rule``, of q and k [b, n, key heads, size], v [b, n, heads, width], g
    and beta [b, n, heads]; and of ``chunk_kimi_delta_attention``, whose g is [b, n, heads, size].
    """
    import torch

    _refuse("a gated delta rule", {**more, "output_final_state": output_final_state or None})
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query / query.shape[-1] ** 0.5
    return torch.ops.stagegraph.delta_rule(query, key, value, g, beta), None


# What is handed on and changes nothing for one whole sequence after another.
IDLE = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "position_embeddings"}
# Names in modelling files -> what takes their place.
OPERATORS = {
    "causal_conv1d_fn": causal_conv,
    "mamba2_chunk_scan": ssm_scan,
    "mamba_selective_scan": selective_scan,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
}
