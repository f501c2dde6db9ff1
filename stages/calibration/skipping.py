"""Runs a model from one of its layers on, with what the layers before it computed in an earlier run.

What changes a layer changes nothing before it. Layers are skipped only where they pass on a single tensor, and where
the model's output stays the same without those before its last one: others have states that a later layer reads.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Layers:
    """The ``layers`` of a model that compute one after the other, and the ``outputs`` [b, s, d] of each; none where
    there are no such layers.
    """

    def __init__(self, layers: list[Any], outputs: list[Any]) -> None:
        self._layers, self._outputs = layers, outputs
        self._index = {id(module): at for at, layer in enumerate(layers) for module in layer.modules()}

    def before(self, modules: list[Any], *, last: Any) -> int:
        """Return how many layers compute before any of ``modules`` does; all before ``last``, which is the head."""
        return min(len(self._layers) if module is last else self._index.get(id(module), 0) for module in modules)

    @contextmanager
    def skipped(self, count: int, copies: int) -> Iterator[None]:
        """Let the first ``count`` layers compute nothing: what the last of them returns is what it did, ``copies``
        times one after the other.
        """

        def instead(at: int) -> Callable[..., Any]:
            output = self._outputs[at]
            whole = isinstance(output, tuple)

            def forward(hidden: Any, *_args: Any, **_named: Any) -> Any:
                if at == count - 1:
                    hidden = (output[0] if whole else output).repeat(copies, 1, 1)
                return (hidden,) if whole else hidden

            return forward

        skipped = self._layers[:count]
        for at, layer in enumerate(skipped):
            layer.forward = instead(at)
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward


def recorded(model: Any, run: Callable[[], Any]) -> tuple[Any, Layers]:
    """Return what ``run()`` returns, a tensor that the model computes of its inputs, and the layers that can be skipped
    when it is run on the same inputs again.
    """
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = [*max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=())]
    inputs: list[Any] = []
    outputs: list[Any] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given)) for layer in layers]
    hooks += [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in layers]
    try:
        found = run()
    finally:
        for hook in hooks:
            hook.remove()
    tensors = [output[0] if isinstance(output, tuple) and len(output) == 1 else output for output in outputs]
    alone = [isinstance(tensor, torch.Tensor) and tensor.ndim == 3 for tensor in tensors]
    chained = [bool(given) and given[0] is tensor for given, tensor in zip(inputs[1:], tensors, strict=False)]
    if not layers or len(inputs) != len(layers) or not all(alone) or not all(chained):
        return found, Layers([], [])
    made = Layers(layers, outputs)
    for count in (len(layers) // 2, len(layers) - 1):
        try:
            with made.skipped(count, 1):
                same = torch.equal(run(), found)
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError):  # of a state that an earlier layer sets
            same = False
        if not same:
            return found, Layers([], [])
    return found, made
