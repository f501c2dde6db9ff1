"""The nodes of a run that wait for inputs, each with the number of inputs still missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagegraph.planning.dag import Node


def depth_first(nodes: Sequence[Node]) -> list[Node]:
    """Return nodes, given in topological order, in depth-first order: all that the first final node needs comes before
    what only others need, so that one branch of a matrix is complete before the next begins.
    """
    ordered: dict[Node, None] = {}
    for end in (node for node in nodes if not node.consumers):
        stack = [(end, iter(end.upstream))]
        while stack:
            node, above = stack[-1]
            following = next((u for u in above if u not in ordered), None)
            if following is None:
                ordered[node] = None
                stack.pop()
            else:
                stack.append((following, iter(following.upstream)))
    return list(ordered)


class Waiting:
    """Nodes that wait, of a DAG's ``nodes`` in topological order; they come out as :func:`depth_first` has them."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.place = {node: place for place, node in enumerate(depth_first(nodes))}
        self._missing: dict[Node, int] = {}
        self._free: list[tuple[int, Node]] = []  # a heap; one whose inputs are made again meanwhile stays in it
        self._done: set[Node] = set()

    def __bool__(self) -> bool:
        """Whether any node waits."""
        return bool(self._missing)

    def __iter__(self) -> Iterator[Node]:
        """Yield the nodes that wait."""
        return iter(self._missing)

    def add(self, node: Node) -> None:
        """Add a node that waits until everything it reads is done."""
        self._missing[node] = sum(upstream not in self._done for upstream in node.upstream)
        self._free_if_ready(node)

    def done(self, node: Node) -> None:
        """Note that a node has ended."""
        self._done.add(node)
        for consumer in node.consumers:
            if consumer in self._missing:
                self._missing[consumer] -= 1
                self._free_if_ready(consumer)

    def undo(self, node: Node) -> None:
        """Make a finished node wait again, and the nodes that read it."""
        self._done.remove(node)
        for consumer in node.consumers:
            if consumer in self._missing:
                self._missing[consumer] += 1
        self.add(node)

    def pop(self) -> Node | None:
        """Remove and return the first node with no input missing, if any."""
        while self._free:
            _, node = heappop(self._free)
            if self._missing.get(node) == 0:
                del self._missing[node]
                return node
        return None

    def _free_if_ready(self, node: Node) -> None:
        if not self._missing[node]:
            heappush(self._free, (self.place[node], node))
