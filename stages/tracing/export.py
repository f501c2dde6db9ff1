"""Exports one function of a model by torch, as a graph in the operators of this project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError
from stages.tracing.graph import GraphPart, GraphWriter
from stages.tracing.nodes import is_lost, needed_nodes

if TYPE_CHECKING:
    from stages.tracing.names import Names

EXAMPLE = 16  # tokens of the inputs that torch traces with
MOST = 1 << 20  # tokens of what it may be called with


def export(
    model: Any,
    forward: Callable[..., Any],
    inputs: Sequence[Any],
    names: Names,
    axes: Sequence[int],
    most: int = 0,
    rewrite: Callable[[Any], None] = lambda _program: None,
) -> tuple[GraphPart, tuple[int, ...]]:
    """Return the graph of ``forward(*inputs)``, of which the number of tokens is at ``axes``, and its result's shape
    without that; :class:`ConfigError` names the node and operator that cannot be built. It is for at most so many
    tokens (0: any number): tables of positions may have no more rows. ``rewrite`` changes what torch exported.
    """
    import torch

    class Called(torch.nn.Module):
        """What torch exports."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return forward(*inputs)

    tokens = torch.export.Dim("tokens", min=2, max=most or MOST)
    shapes = (tuple({axis: tokens} for axis in axes),)
    try:
        with torch.no_grad():
            program = torch.export.export(Called(), tuple(inputs), dynamic_shapes=shapes, strict=False)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - torch raises what a modelling file made it stumble over
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(
            f"{type(model).__name__} cannot be traced: {type(error).__name__}: {first[:300]}; a family of its own is "
            "needed (docs/extending.md)"
        ) from None
    nodes = list(program.graph.nodes)
    needed = needed_nodes(nodes)
    if any(is_lost(node, needed) or getattr(node.target, "__name__", "").startswith("copy_.") for node in nodes):
        program = program.run_decompositions({})  # what is changed in place becomes a tensor of its own
    rewrite(program)
    graph = GraphWriter(program, names)
    return graph.part, tuple(size for size in graph.shape if isinstance(size, int))
