"""The prefix cache: a radix tree over token ids that finds cached prefixes and evicts the least recently used.

Its edges are pages, since sequences share whole pages only: the depth of a node is a number of pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass
class _Node:
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    holders: set[int] = field(default_factory=set)  # sequences that hold this beginning


class Prefixes:
    """The sequences of a session by what they hold, in pages of ``page`` tokens; None: they cannot be shared.

    Those that a job still reads are told by :meth:`hold`, those that are kept for others alone by :meth:`release`.
    """

    def __init__(self, page: int | None) -> None:
        self._page = page
        self._root = _Node()
        self._pages_of: dict[int, list[tuple[int, ...]]] = {}  # sequence -> its pages
        self._unused: dict[int, None] = {}  # sequences that no job reads, the longest unused first

    @property
    def kept(self) -> int:
        """How many sequences are kept that no job reads."""
        return len(self._unused)

    def longest(self, ids: Sequence[int]) -> tuple[int | None, int]:
        """Return a sequence that holds the longest beginning of ``ids`` in whole pages, and the length of that.

        It counts as used.
        """
        found, length = None, 0
        for depth, (node, _) in enumerate(self._walk(self._pages(ids)), 1):
            found, length = next(iter(node.holders)), depth * (self._page or 0)
        if found in self._unused:
            self._unused[found] = self._unused.pop(found)
        return found, length

    def hold(self, sequence: int, ids: Sequence[int]) -> None:
        """Say that a sequence, which a job goes on reading, holds ``ids``."""
        self._pages_of[sequence] = pages = self._pages(ids)
        node = self._root
        for page in pages:
            node = node.children.setdefault(page, _Node())
            node.holders.add(sequence)

    def release(self, sequence: int, ids: Sequence[int]) -> list[int]:
        """Say that no job reads a sequence any more, and that it holds ``ids``.

        Returns the sequences that are no longer kept, since others hold all that they do: they are to be removed.
        """
        self.hold(sequence, ids)
        self._unused[sequence] = None
        # Shorter ones that this one goes on from, and itself where another does.
        path = [node for node, _ in self._walk(self._pages_of[sequence])]
        others = set().union(*(node.holders for node in path)) & self._unused.keys() if path else {sequence}
        idle = [other for other in others if self._redundant(other)]
        for other in idle:
            self.drop(other)
        return idle

    def drop(self, sequence: int) -> None:
        """Forget a sequence that is removed."""
        path = list(self._walk(self._pages_of.pop(sequence, [])))
        self._unused.pop(sequence, None)
        for node, _ in path:
            node.holders.discard(sequence)
        above = [self._root, *(node for node, _ in path)]
        for parent, (node, page) in reversed([*zip(above, path, strict=False)]):
            if not node.holders:
                del parent.children[page]

    def oldest(self) -> int | None:
        """Return the kept sequence that was not used for longest; None if there is none."""
        return next(iter(self._unused), None)

    def _redundant(self, sequence: int) -> bool:
        """Say whether other sequences hold all that this one does; of equals one stays."""
        pages = self._pages_of[sequence]
        nodes = [node for node, _ in self._walk(pages)]
        if not nodes:
            return True
        others = nodes[-1].holders - {sequence}
        return any(len(self._pages_of[other]) > len(pages) or other > sequence for other in others)

    def _pages(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        page = self._page
        return [] if page is None else [tuple(ids[at : at + page]) for at in range(0, len(ids) - page + 1, page)]

    def _walk(self, pages: Sequence[tuple[int, ...]]) -> Iterator[tuple[_Node, tuple[int, ...]]]:
        """Yield the nodes along ``pages``, each with the page that leads to it, for as long as there are any."""
        node: _Node | None = self._root
        for page in pages:
            node = node.children.get(page) if node is not None else None
            if node is None:
                return
            yield node, page
