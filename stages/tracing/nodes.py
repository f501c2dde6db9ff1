"""Queries on the nodes of a graph that torch exported."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

# The arguments of an operator by name: plain values, and {"value": n}, {"parameter": name} or {"constant": n}.
Arguments: TypeAlias = Mapping[str, Any]
Node: TypeAlias = tuple[str, Arguments]  # the name of an operator of stages.models.operators, and its arguments


def encoded(tensor: Any) -> str:
    """Return the bytes of a tensor as JSON can hold them."""
    return base64.b85encode(tensor.numpy().tobytes()).decode()


def dtype_of(node: Any) -> str:
    """Return torch's name of the dtype of what a node makes."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def needed_nodes(nodes: Sequence[Any]) -> set[Any]:
    """Return the nodes that the result is made of."""
    found: set[Any] = set()
    waiting = [result_of(node) for node in nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def result_of(output: Any) -> Any:
    """Return the node that is the result: the last, behind inputs that were changed in place."""
    return output.args[0][-1]


def bases_of(node: Any) -> Iterator[Any]:
    """Yield what a node changes in place: its first argument, and what that is a view of."""
    schema = getattr(node.target, "_schema", None)
    while schema is not None and schema.is_mutable and node.args:
        (node, *_) = node.args
        yield node
        inner = getattr(node.target, "_schema", None)
        if inner is None or not any(argument.alias_info for argument in inner.arguments):
            return


def is_lost(node: Any, needed: set[Any]) -> bool:
    """Say whether a node changes a value in place that others would not see: torch's tracing hands the changed value on
    in place of the one that was changed, but not in that of what this is a view of.
    """
    value, *bases = [*bases_of(node)] or [None]
    return any(base in needed for base in bases) or (value in needed and node not in needed)


def outside(shape: Sequence[Any]) -> int:
    """Return how many values stand outside of the axis of tokens; one where there is none."""
    at = next((axis for axis, size in enumerate(shape) if isinstance(size, dict)), 0)
    return math.prod(shape[:at])
