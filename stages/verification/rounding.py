"""How far rounding alone moves a model's logits: transformers' model once more, with the bundle's roundings.

Two right implementations differ because each rounds elsewhere. How much that moves the logits depends on the model: its
depth, its widths and its outlier channels. So it is measured on the model itself: the same forward pass once more, with
what every linear layer reads disturbed by as much as the arithmetic rounds. A bundle that errs several times more than
that computes something else.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INT8_GROUP = 32  # values of an activation that share a scale (docs/abi.md)
_INT8_TOP = 127


@contextmanager
def rounded(model: Any, arithmetic: str) -> Iterator[None]:
    """Let every linear layer of ``model`` read activations as ``arithmetic`` rounds them.

    ``float32``: sums of K products in another order differ by about 2^-24 sqrt(K / 2) of the result, which independent
    relative errors of that size in the K activations cause as well. ``float16``, ``bfloat16``: activations are stored
    in that dtype. ``int8``: groups of 32 values become integers of -127 to 127 times a scale, in layers that read whole
    groups; the others as float32.
    """
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    # The same disturbance on every run: verify.json must be the same bytes.
    random = torch.Generator().manual_seed(24)
    change = _changes(arithmetic, random)
    hooks = [
        module.register_forward_pre_hook(lambda _module, inputs: (change(inputs[0]), *inputs[1:]))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _changes(arithmetic: str, random: Any) -> Callable[[Any], Any]:
    import torch

    def reordered(x: Any) -> Any:
        noise = torch.randn(x.shape, generator=random)
        return x * (1 + 2.0**-24 * math.sqrt(x.shape[-1] / 2) * noise)

    def integers(x: Any) -> Any:
        if x.shape[-1] % INT8_GROUP:
            return reordered(x)
        groups = x.reshape(*x.shape[:-1], -1, INT8_GROUP)
        peak = groups.abs().amax(-1, keepdim=True).clamp_min(1e-20)
        return ((groups * (_INT8_TOP / peak)).round() * (peak / _INT8_TOP)).reshape(x.shape)

    def stored(x: Any) -> Any:
        return x.to(getattr(torch, arithmetic)).float()

    return {"float32": reordered, "int8": integers}.get(arithmetic, stored)
