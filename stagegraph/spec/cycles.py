"""The order of names that need one another, and the circles that stand in the way of one."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def order(needs: Mapping[str, Collection[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the names so that each comes after those it needs, and the cycles, whose names are left out.

    Every needed name must be a key. A cycle reads in the direction of need and starts at its first name in ``needs``.
    """
    rest = dict(needs)
    position = {name: index for index, name in enumerate(needs)}
    cycles: list[list[str]] = []
    while True:
        try:
            return list(TopologicalSorter(rest).static_order()), cycles
        except CycleError as error:
            cycle: list[str] = error.args[1][:0:-1]  # graphlib names each before the one that needs it, the first twice
        start = cycle.index(min(cycle, key=position.__getitem__))
        cycles.append(cycle[start:] + cycle[:start])
        cut = set(cycle)
        rest = {name: [need for need in needed if need not in cut] for name, needed in rest.items() if name not in cut}


def circle(cycle: list[str]) -> str:
    """Return ``a -> b -> a``."""
    return " -> ".join([*cycle, cycle[0]])
