"""Measures how far rounding alone moves logits, by running transformers' model with the bundle's roundings.

Two right implementations differ because each rounds elsewhere. How much that moves the logits depends on the model: its
depth, its widths and its outlier channels. So it is measured on the model itself: the same forward pass once more, with
what every linear layer reads disturbed by as much as the arithmetic rounds. A bundle that errs several times more than
that computes something else.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from stages.verification.apart import LiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_INT8_TOP = 127
_ATTENTION = "eager_attention_forward"  # of a module of transformers: what its layers attend with


@contextmanager
def rounded(model: Any, arithmetic: str, groups: Mapping[str, int]) -> Iterator[None]:
    """Let every linear layer of ``model`` read activations as ``arithmetic`` rounds them.

    ``float32``: sums of K products in another order differ by about 2^-24 sqrt(K / 2) of the result, which independent
    relative errors of that size in the K activations cause as well. ``float16``, ``bfloat16``: activations are stored
    in that dtype. ``int8``: groups of values become integers of -127 to 127 times a scale, of as many values as
    ``groups`` says of a layer's weight by its name; 0, or nothing, is for layers that read floats. Experts in one
    parameter are layers too, of a model that was made with ``experts_implementation="eager"``.
    """
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    # The same disturbance on every run: verify.json must be the same bytes.
    random = torch.Generator().manual_seed(24)

    def change(name: str) -> Any:
        group = groups.get(name, 0) if arithmetic == "int8" else 0
        return lambda x: _changed(x, arithmetic, group, random)

    def before(name: str) -> Any:
        read = change(f"{name}.weight")
        return lambda _module, inputs: (read(inputs[0]), *inputs[1:])

    hooks = [
        module.register_forward_pre_hook(before(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    try:
        with _experts_reading(model, change):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _experts_reading(model: Any, change: Callable[[str], Callable[[Any], Any]]) -> Iterator[None]:
    """Let products with experts, which are matrices of one parameter [experts, .., ..], read what ``change`` of the
    parameter's name makes of activations.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    products: set[Any] = {torch.nn.functional.linear, torch.matmul, torch.bmm}
    products |= {getattr(torch.Tensor, name) for name in ("matmul", "__matmul__", "bmm")}
    reading: dict[int, Callable[[Any], Any]] = {}  # by where the parameters of the module that computes are in memory

    class Changing(TorchFunctionMode):
        def __torch_function__(self, function: Any, _types: Any, given: Any = (), keywords: Any = None) -> Any:
            if reading and function in products and len(given) > 1:
                x, matrix, *more = given
                read = reading.get(matrix.untyped_storage().data_ptr())
                given = (read(x) if read else x, matrix, *more)
            return function(*given, **(keywords or {}))

    def enter(module: Any, readers: Mapping[str, Callable[[Any], Any]]) -> None:
        reading.update((getattr(module, name).untyped_storage().data_ptr(), read) for name, read in readers.items())

    hooks = []
    for name, module in model.named_modules():
        stacked = [each for each, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
        readers = {each: change(f"{name}.{each}") for each in stacked}
        if readers:
            hooks.append(module.register_forward_pre_hook(lambda owner, _given, readers=readers: enter(owner, readers)))
            hooks.append(module.register_forward_hook(lambda *_: reading.clear()))
    try:
        with Changing() if hooks else nullcontext():  # every call of torch's passes there
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
