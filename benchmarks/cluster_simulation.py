"""How a cluster's time splits: a simulation of 10,000 nodes on 100 workers from costs that were measured.

Usage: python benchmarks/cluster_simulation.py [--nodes N] [--workers N] [--parent MS] [--remote MS]

One process hands nodes over and commits them, ``parent`` ms each, one after the other; a worker asks the remote twice
for each node, ``remote`` ms each time. No run can be faster than its critical path (the longest chain of nodes and what
the remote takes for them) or than the work bound (all of it, shared by the workers); the last column is how much longer
it takes than the larger of the two.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Callable, Iterator

Graph = list[list[int]]  # the nodes that each node reads


def wide(count: int, rng: random.Random) -> Graph:  # noqa: ARG001 - as the others
    """Return one node that all others read."""
    return [[], *([0] for _ in range(1, count))]


def chains(count: int, rng: random.Random) -> Graph:  # noqa: ARG001
    """Return a hundred chains side by side."""
    return [[i - 100] if i >= 100 else [] for i in range(count)]


def layers(count: int, rng: random.Random) -> Graph:
    """Return layers of 500 nodes, each of which reads three of the layer before."""
    return [rng.sample(range(i // 500 * 500 - 500, i // 500 * 500), 3) if i >= 500 else [] for i in range(count)]


def models(count: int, rng: random.Random) -> Graph:  # noqa: ARG001
    """Return builds of twelve nodes: one, five that read it, five that read those, one that reads all."""
    shape: Graph = [[], *([0] for _ in range(5)), *([i] for i in range(1, 6)), [*range(6, 11)]]
    return [[i // 12 * 12 + before for before in shape[i % 12]] for i in range(count)]


SHAPES: dict[str, Callable[[int, random.Random], Graph]] = {
    "wide": wide,
    "100 chains": chains,
    "layers": layers,
    "models": models,
}
SECONDS: dict[str, Callable[[random.Random], float]] = {
    "0.2 s": lambda rng: 0.2,  # noqa: ARG005
    "2 s": lambda rng: 2.0,  # noqa: ARG005
    "2 s, uneven": lambda rng: rng.lognormvariate(0.0, 1.1774),  # its mean is 2
}


def makespan(graph: Graph, seconds: list[float], workers: int, parent: float) -> float:
    """Return when the last node is committed; nodes are handed over in their order, as soon as they can be."""
    readers: Graph = [[] for _ in graph]
    missing = [len(before) for before in graph]
    for node, before in enumerate(graph):
        for each in before:
            readers[each].append(node)
    ready = [node for node, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    free, running = workers, []
    now = 0.0  # of the parent
    while ready or running:
        if ready and free:
            node = heapq.heappop(ready)
            free -= 1
            now += parent / 2
            heapq.heappush(running, (now + seconds[node], node))
            continue
        end, node = heapq.heappop(running)
        now = max(now, end) + parent / 2
        free += 1
        for reader in readers[node]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    return now


def critical_path(graph: Graph, seconds: list[float]) -> float:
    """Return how long the longest chain of nodes takes; each stands after those that it reads."""
    ends: list[float] = []
    for before, takes in zip(graph, seconds, strict=True):
        ends.append(max((ends[each] for each in before), default=0.0) + takes)
    return max(ends)


def rows(nodes: int, workers: int, parent: float, remote: float) -> Iterator[tuple[str, str, float, float, float]]:
    """Yield shape, seconds of a node, critical path, work bound, makespan."""
    for shape, make in SHAPES.items():
        for how, takes in SECONDS.items():
            rng = random.Random(0)
            graph = make(nodes, rng)
            seconds = [takes(rng) + 2 * remote for _ in graph]
            yield (
                shape,
                how,
                critical_path(graph, seconds),
                sum(seconds) / workers,
                makespan(graph, seconds, workers, parent),
            )


def main() -> None:
    """Print the table, as docs/cluster.md has it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--parent", type=float, default=15.0, help="ms a node")
    parser.add_argument("--remote", type=float, default=20.0, help="ms")
    args = parser.parse_args()
    print("| shape | a node | critical path | work bound | makespan | above the larger |\n|---|---|---|---|---|---|")
    for shape, how, path, work, span in rows(args.nodes, args.workers, args.parent / 1000, args.remote / 1000):
        print(f"| {shape} | {how} | {path:.0f} s | {work:.0f} s | {span:.0f} s | {span / max(path, work):.2f} x |")


if __name__ == "__main__":
    main()
