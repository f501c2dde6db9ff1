"""How the engine grows: pipelines of 1,000 nodes and more whose stages do next to nothing, in three shapes.

Usage: python benchmarks/scale.py [--nodes N ...] [--shapes NAME ...]   (exit status 1 if a bound is missed)

A pipeline file may have 30,000 nodes.

``wide``: one node that all others read. ``chain``: each reads the one before. ``diamond``: one, two that read it, one
that reads both, and so on. CPU seconds are those of the process itself (``run`` less its workers), a verb at a time,
judged by the imports of :mod:`yardstick`, measured after each. What a disk adds shows against ``TMPDIR=/dev/shm``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

STAGES = '''
"""Stages that do next to nothing."""
from __future__ import annotations
from dataclasses import dataclass
from stagegraph.stage import Context, In, Out, Stage, param


class Step(Stage):
    """Write a number, with those of the inputs added to it."""

    id = "step"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        value: int = param("a number")

    outputs = {"out": Out("out.txt", "the number")}

    def run(self, ctx: Context) -> None:
        before = [int(ctx.input(port).read_text()) for port in self.inputs if ctx.has_input(port)]
        (ctx.out / "out.txt").write_text(f"{ctx.params.value + sum(before)}\\n")


class After(Step):
    """The same, after another, if there is one."""

    id = "after"
    inputs = {
        "seed": In("step", "out", "what comes first", optional=True),
        "before": In("after", "out", "what comes before", optional=True),
    }


class Join(Step):
    """The same, after two others, if there are any."""

    id = "join"
    inputs = {side: In(side, "out", "what comes before", optional=True) for side in ("left", "right")}


class Left(Step):
    """The same, after a join."""

    id = "left"
    inputs = {"join": In("join", "out", "what comes before")}


class Right(Left):
    """The same."""

    id = "right"
'''
MEASURE = """
import resource, sys
from stagegraph.cli.main import main
try:
    sys.argv[0] = "pipeline"
    main()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{used.ru_utime + used.ru_stime} {used.ru_maxrss / 1024}", file=open("used", "w"))
"""
NODE_MS, FLAT = 2.0, 1.2  # CPU of a node that runs; by how much more it may be in the largest pipeline
NO_OP_SECONDS, NO_OP_MIB = 2.0, 150  # of 10,000 nodes
LOOK_SECONDS = {"graph": 2.0, "explain": 5.0, "lineage": 5.0}  # of 10,000 nodes at most


def wide(count: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the class of each entry, and the numbers of the entries that it reads."""
    yield "Step", []
    yield from (("After", [0]) for _ in range(1, count))


def chain(count: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the class of each entry, and the numbers of the entries that it reads."""
    yield from (("After", [i - 1] if i else []) for i in range(count))


def diamond(count: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the class of each entry, and the numbers of the entries that it reads."""
    for i in range(count):
        join = i - i % 3
        yield ("Join", "Left", "Right")[i % 3], [join] if i % 3 else [join - 2, join - 1] if i else []


SHAPES: dict[str, Callable[[int], Iterator[tuple[str, list[int]]]]] = {"wide": wide, "chain": chain, "diamond": diamond}


def write(folder: Path, shape: str, count: int) -> None:
    """Write a pipeline of ``count`` nodes."""
    (folder / "trivial.py").write_text(STAGES.lstrip(), encoding="utf-8")
    lines = ["version: 1", f"name: {shape}", "stages:"]
    for number, (stage, numbers) in enumerate(SHAPES[shape](count)):
        needs = ", ".join(f"n{before}" for before in numbers)
        lines.append(f"  n{number}: {{uses: './trivial.py:{stage}', needs: [{needs}], with: {{value: {number}}}}}")
    (folder / "pipeline.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(folder: Path, *arguments: str) -> tuple[float, float]:
    """Run a verb; return the CPU seconds and the most MiB of its process."""
    command = [sys.executable, "-c", MEASURE, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(f"pipeline {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    seconds, mebibytes = (folder / "used").read_text().split()
    return float(seconds), float(mebibytes)


def measured(shape: str, count: int) -> Iterator[tuple[str, float, float, float]]:
    """Yield (verb, CPU seconds, MiB, the most CPU seconds) of a pipeline of one shape and size."""
    with tempfile.TemporaryDirectory() as name:
        folder, last = Path(name), f"n{count - 1}"
        write(folder, shape, count)
        yield "run", *measure(folder, "run", "-j2"), NODE_MS * count / 1000
        yield "no-op", *measure(folder, "run"), NO_OP_SECONDS * count / 10_000
        yield "status", *measure(folder, "status"), NO_OP_SECONDS * count / 10_000
        share = max(1.0, count / 10_000)
        for style in ("ascii", "dot", "svg", "mermaid"):
            yield f"graph {style}", *measure(folder, "graph", "--format", style), share * LOOK_SECONDS["graph"]
        for verb in ("explain", "lineage"):
            yield verb, *measure(folder, verb, last), share * LOOK_SECONDS[verb]


def main() -> int:
    """Print a row for each verb, shape and size; return how many bounds were missed, at most one."""
    import yardstick  # beside this file; tests import the rest from elsewhere

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's Python keeps its byte code
    print(f"{yardstick.HEAD}; load {os.getloadavg()[0]:.1f}")
    missed = 0
    print(f"{'shape':8} {'nodes':>7} {'verb':14} {'CPU s':>8} {'ms a node':>10} {'MiB':>6} {'imports':>8}  bound")
    for shape in args.shapes:
        run_ms: dict[int, float] = {}
        for count in args.nodes:
            for verb, seconds, mebibytes, bound in measured(shape, count):
                imports = yardstick.import_seconds()
                a_node = 1000 * seconds / count
                text, met = yardstick.judge(seconds, bound, imports)
                bounds = {text: met}
                if verb == "no-op" and count <= 10_000:
                    bounds[f"{NO_OP_MIB} MiB"] = mebibytes <= NO_OP_MIB
                if verb == "run":  # of so many seconds of imports: what is slow meanwhile is slow in both
                    run_ms[count] = a_node / imports
                    least = run_ms[min(run_ms)]
                    bounds[f"{FLAT} x a node of {min(run_ms):,}"] = run_ms[count] <= FLAT * least
                missed += not all(bounds.values())
                told = ", ".join(text if ok else f"{text} MISSED" for text, ok in bounds.items())
                figures = f"{seconds:8.2f} {a_node:10.2f} {mebibytes:6.0f} {imports:8.3f}"
                print(f"{shape:8} {count:7,} {verb:14} {figures}  {told}", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
