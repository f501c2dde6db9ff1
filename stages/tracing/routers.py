"""Finds router and gate weights, which stay unquantized: they are small, and an error in them chooses other experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.tracing.merge import read

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stages.tracing.graph import GraphPart


def routers(part: GraphPart, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Return the weights of linear layers whose results choose experts, of those that weight the heads of an
    indexer, and of those with a single result, a gate.
    """
    linear = [
        name for kind, arguments in part.nodes if kind == "linear" for name in read(arguments["weight"], "parameter")
    ]
    found = {name for name in linear if shapes[name][0] == 1}
    deciding = {"expert_linear": "chosen", "choose": "weights"}
    waiting = [
        value
        for kind, arguments in part.nodes
        if kind in deciding
        for value in read(arguments[deciding[kind]], "value")
    ]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if value in seen or value < part.inputs:
            continue
        seen.add(value)
        kind, arguments = part.nodes[value - part.inputs]
        if kind == "linear":
            found.update(read(arguments["weight"], "parameter"))
        elif kind not in ("attention", "embedding", "rms_norm", "layer_norm"):
            waiting += read(list(arguments.values()), "value")
    return found
