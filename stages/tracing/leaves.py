"""Marks modules to trace as one node, and removes choices that a module would make anew at every call."""

from __future__ import annotations

import copy
import functools
from typing import Any


def settle_rotation(model: Any) -> None:
    """Let rotary positions have the frequencies that they were made with, whatever is read: transformers may choose
    others by the length of a sequence, and keys in a cache would have to be turned again.
    """
    for module in model.modules():
        if hasattr(module, "rope_type") and hasattr(module, "original_inv_freq"):
            forward = type(module).forward
            while hasattr(forward, "__wrapped__"):
                forward = forward.__wrapped__
            module.forward = functools.partial(forward, module)


def replace_linear(model: Any) -> None:
    """Let every linear layer of ``model`` be one node: torch takes its own apart at every call to find a shape."""
    import torch

    linear: Any = torch.nn.Linear
    for module in model.modules():
        if type(module) is linear and "forward" not in vars(module):
            module.forward = functools.partial(_linear, module)


def _linear(module: Any, x: Any) -> Any:
    import torch

    return torch.ops.stagegraph.linear(x, module.weight, module.bias)


def replace_norms(model: Any) -> None:
    """Let every root-mean-square norm of ``model`` be one node of the graph."""
    known: dict[Any, Any] = {}
    for module in model.modules():
        numbers = tuple(value for value in vars(module).values() if isinstance(value, float))
        own = dict(module.named_parameters())
        if list(own) != ["weight"] or own["weight"].dim() != 1 or "norm" not in type(module).__name__.lower():
            continue
        kind = type(module), numbers, own["weight"].shape
        if kind not in known:
            known[kind] = _form(module, numbers, own["weight"].shape[0])
        if known[kind]:
            module.forward = functools.partial(_rms_norm, module, *known[kind])


def _rms_norm(module: Any, eps: float, offset: float, x: Any, *gate: Any, **more: Any) -> Any:
    import torch

    if any(each is not None for each in (*gate, *more.values())):  # what has a gate is another norm
        return type(module).forward(module, x, *gate, **more)
    return torch.ops.stagegraph.rms_norm(x, module.weight, eps, offset)


def _form(module: Any, numbers: tuple[float, ...], width: int) -> tuple[float, float] | None:
    """Return (eps, offset) if ``module`` computes x / sqrt(mean(x ** 2) + eps) * (offset + weight), else None."""
    import torch

    random = torch.Generator().manual_seed(0)
    probe = copy.copy(module)
    weight = torch.randn(width, generator=random)
    probe.__dict__ = {**vars(module), "_parameters": {"weight": torch.nn.Parameter(weight, requires_grad=False)}}
    x = torch.randn(2, 3, width, generator=random) * 0.01  # small, so that eps shows
    try:
        found = probe(x)
    except Exception:  # noqa: BLE001 - one that wants more than x is none of ours
        return None
    for eps in numbers:
        for offset in (0.0, 1.0):
            form = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight)
            if isinstance(found, torch.Tensor) and found.shape == x.shape and torch.allclose(found, form, 1e-5, 1e-6):
                return eps, offset
    return None
