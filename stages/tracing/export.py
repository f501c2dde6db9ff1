"""Exports one function of a model by torch, as a graph in the operators of this project."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError
from stages.tracing.graph import GraphPart, GraphWriter
from stages.tracing.nodes import is_lost, needed_nodes

if TYPE_CHECKING:
    from stages.tracing.names import Names

EXAMPLE = 16  # tokens of the inputs that torch traces with
MOST = 1 << 20  # tokens of what it may be called with
MODELS = "/transformers/models/"  # in the path of the code of its models


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
        raise ConfigError(
            f"{type(model).__name__} cannot be traced{_place(error)}: {_reason(error)}; a family of its own is needed "
            "(docs/extending.md)"
        ) from None
    nodes = list(program.graph.nodes)
    needed = needed_nodes(nodes)
    if any(is_lost(node, needed) or getattr(node.target, "__name__", "").startswith("copy_.") for node in nodes):
        program = program.run_decompositions({})  # what is changed in place becomes a tensor of its own
    rewrite(program)
    graph = GraphWriter(program, names)
    return graph.part, tuple(size for size in graph.shape if isinstance(size, int))


def _place(error: BaseException) -> str:
    """Say where in transformers' own code of a model an error was raised; empty if it was elsewhere."""
    places = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    for code, line in reversed(places):
        if MODELS in code.co_filename:
            return f" ({Path(code.co_filename).name}:{line}, {code.co_qualname})"
    return ""


def _reason(error: BaseException) -> str:
    """Return what an error says, in a line; torch's own on the number of tokens needs its whole report."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if first.startswith("Constraints violated"):
        return "its code depends on how many tokens there are"
    return f"{type(error).__name__}: {first[:300]}"
