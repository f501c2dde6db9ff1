"""Measures how far rounding alone moves logits, by running transformers' model with the bundle's roundings.

Two right implementations differ because each rounds elsewhere. How much that moves the logits depends on the model: its
depth, its widths and its outlier channels. So it is measured on the model itself: the same forward pass once more, with
what every linear layer reads disturbed by as much as the arithmetic rounds. A bundle that errs several times more than
that computes something else.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stages.verification.apart import LiveError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_INT8_TOP = 127
_ATTENTION = "eager_attention_forward"  # of a module of transformers: what its layers attend with


@contextmanager
def rounded(model: Any, arithmetic: str, groups: Mapping[str, int]) -> Iterator[None]:
    """Let every linear layer of ``model`` read activations as ``arithmetic`` rounds them.

    ``float32``: sums of K products in another order differ by about 2^-24 sqrt(K / 2) of the result, which independent
    relative errors of that size in the K activations cause as well. ``float16``, ``bfloat16``: activations are stored
    in that dtype. ``int8``: groups of values become integers of -127 to 127 times a scale, of as many values as
    ``groups`` says of a layer's weight by its name; 0, or nothing, is for layers that read floats.
    """
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    # The same disturbance on every run: verify.json must be the same bytes.
    random = torch.Generator().manual_seed(24)

    def change(name: str) -> Any:
        group = groups.get(f"{name}.weight", 0) if arithmetic == "int8" else 0
        return lambda _module, inputs: (_changed(inputs[0], arithmetic, group, random), *inputs[1:])

    hooks = [
        module.register_forward_pre_hook(change(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def cache_in_bytes(model: Any) -> Iterator[None]:
    """Let every attention of ``model`` read keys and values as a cache in 8 bits keeps them: of each head of a token
    integers and a scale. :class:`LiveError` if none does, after the model has computed.
    """
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    attentions = {each: found for each in modules if (found := getattr(each, _ATTENTION, None))}
    calls = 0

    def reads_bytes(attend: Any) -> Any:
        def forward(module: Any, query: Any, key: Any, value: Any, *rest: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            key, value = (in_bytes(each, each.shape[-1]) for each in (key, value))
            return attend(module, query, key, value, *rest, **keywords)

        return forward

    for each, attend in attentions.items():
        setattr(each, _ATTENTION, reads_bytes(attend))
    try:
        yield
    finally:
        for each, attend in attentions.items():
            setattr(each, _ATTENTION, attend)
    if not calls:
        raise LiveError(
            f"transformers' {type(model).__name__} attends in a way of its own, in which a KV cache in 8 bits cannot "
            "be put: set kv_dtype: auto"
        )


def _changed(x: Any, arithmetic: str, group: int, random: Any) -> Any:
    import torch

    if arithmetic == "int8" and group:
        return in_bytes(x, group)
    if arithmetic in ("float32", "int8"):
        noise = torch.randn(x.shape, generator=random)
        return x * (1 + 2.0**-24 * math.sqrt(x.shape[-1] / 2) * noise)
    return x.to(getattr(torch, arithmetic)).float()


def in_bytes(x: Any, group: int) -> Any:
    """Return what is left of activations ``x`` [.., k] that are read as int8, ``group`` values to a scale: docs/abi.md
    has the formula.
    """
    groups = x.reshape(*x.shape[:-1], -1, group)
    peak = groups.abs().amax(-1, keepdim=True).clamp_min(1e-20)
    return ((groups * (_INT8_TOP / peak)).round() * (peak / _INT8_TOP)).reshape(x.shape)
