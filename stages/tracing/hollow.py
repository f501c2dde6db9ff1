"""Makes models whose parameters have shapes and no values, so that they take no memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Let modules be made with parameters on the meta device; buffers, which no checkpoint holds, stay real."""
    import torch

    module_class: Any = torch.nn.Module
    register = module_class.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":  # one that two modules share stays one
            parameter = torch.nn.Parameter(parameter.to("meta"))
            parameter._is_hf_initialized = True  # noqa: SLF001 - so that no numbers are drawn for it
        register(module, name, parameter)

    module_class.register_parameter = on_meta
    try:
        yield
    finally:
        module_class.register_parameter = register


def spread(model: Any) -> None:
    """Put one number in place of all values of each parameter: it is on the processor then, as buffers are, which
    tracing wants, and takes no memory. Parameters that are one stay one.
    """
    import torch

    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001 - replaced as they are, not copied into
            if parameter is not None:
                value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                replaced = made.setdefault(id(parameter), torch.nn.Parameter(value, requires_grad=False))
                module._parameters[name] = replaced  # noqa: SLF001


@contextmanager
def without_layers(model: Any) -> Iterator[None]:
    """Leave the layers out of ``model``: torch handles each parameter of what it traces, also those never read."""
    import torch

    stacks = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()  # noqa: SLF001 - None there is a module that a model goes without
        if isinstance(child, torch.nn.ModuleList)
    ]
    for module, name, _ in stacks:
        module._modules[name] = None  # noqa: SLF001
    try:
        yield
    finally:
        for module, name, child in stacks:
            module._modules[name] = child  # noqa: SLF001
