"""What a cluster costs and gives: scheduler and workers of Dask as processes of this machine, a directory as remote.

Usage: python benchmarks/cluster.py [--workers N] [--nodes N] [--only NAME ...]   (exit status 1 if a bound is missed)

``overhead``: CPU of the process that runs the pipeline, a node, beyond that of a run here. ``parallel``: nodes
that sleep, against the time that they would take if handing them over took none. ``kills``: the same while a worker is
killed every few seconds and another takes its place. ``second``: another machine's run, which the remote has all of.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import yardstick
from scale import measure

STAGE = '''
"""A stage that sleeps."""
from __future__ import annotations
import os, time
from dataclasses import dataclass
from pathlib import Path
from stagegraph.stage import Context, Out, Stage, param


class Sleep(Stage):
    """Sleep, and write a number."""

    id = "sleep"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        value: int = param("a number")
        seconds: float = param("for how long", hashed=False)
        notes: str = param("folder in which a start is noted", hashed=False)

    outputs = {"out": Out("out.txt", "the number")}

    def run(self, ctx: Context) -> None:
        (Path(ctx.params.notes) / f"{ctx.params.value}-{os.getpid()}-{time.time_ns()}").touch()
        time.sleep(ctx.params.seconds)
        (ctx.out / "out.txt").write_text(f"{ctx.params.value}\\n")
'''
OVERHEAD_MS = 8.0  # CPU a node beyond that of a run here
EFFICIENCY = 0.85  # of the ideal time, on a machine that does nothing else
KILL_SECONDS = 5.0


class Grid:
    """A scheduler and workers of one thread each."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        self._stack, self._folder = stack, folder
        self.workers: list[subprocess.Popen[bytes]] = []
        self._start("scheduler", "--host", self.address, "--no-dashboard")

    def add(self) -> None:
        """Start one more worker."""
        words = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(self._folder))
        self.workers.append(self._start("worker", self.address, *words))

    def _start(self, what: str, *words: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{what}.log").open("ab") as log:
            command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *words]
            process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def wait(self, count: int) -> None:
        """Wait until so many workers are connected."""
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(count)


class Bench:
    """Folders with pipelines, each with a store of its own, and one remote."""

    def __init__(self, folder: Path, grid: Grid) -> None:
        self._folder, self._grid = folder, grid
        config = {"remotes": {"team": {"url": str(folder / "remote"), "mode": "both"}}}
        (folder / "config.yaml").write_text(json.dumps(config))
        os.environ["STAGEGRAPH_CONFIG"] = str(folder / "config.yaml")

    def write(self, name: str, count: int, seconds: float, *, first: int = 0) -> Path:
        """Write a pipeline of nodes beside each other; no two that differ in ``first`` share a result."""
        folder = self._folder / name
        (folder / "notes").mkdir(parents=True)
        (folder / "sleep.py").write_text(STAGE.lstrip())
        given = {"seconds": seconds, "notes": str(folder / "notes")}
        entries = {f"n{i}": {"uses": "./sleep.py:Sleep", "with": {"value": first + i, **given}} for i in range(count)}
        (folder / "pipeline.yaml").write_text(json.dumps({"version": 1, "name": "sleep", "stages": entries}))
        return folder

    def run(self, folder: Path, *, cluster: bool = True) -> tuple[float, float]:
        """Run a pipeline; return CPU and wall seconds."""
        words = ["--executor", "dask", "--scheduler", self._grid.address] if cluster else ["--executor", "local"]
        began = time.monotonic()
        cpu, _ = measure(folder, "run", "-q", *words)
        return cpu, time.monotonic() - began

    def overhead(self, nodes: int) -> Iterator[tuple[str, float, str, bool]]:
        """Yield (what, figure, bound, whether it was met), of the difference of two sizes: beginning is not in it."""
        cpu = {}
        for where in (False, True):
            for count in (nodes // 4, nodes):
                folder = self.write(
                    f"overhead-{where}-{count}", count, 0.0, first=10_000 * (1 + 2 * where) + count * 100
                )
                cpu[where, count], _ = self.run(folder, cluster=where)
        added = nodes - nodes // 4
        here, there = (1000 * (cpu[where, nodes] - cpu[where, nodes // 4]) / added for where in (False, True))
        yield "CPU ms a node, here", here, "", True
        text, met = yardstick.judge(there - here, OVERHEAD_MS, yardstick.import_seconds(), "ms")
        yield "CPU ms a node beyond that", there - here, text, met

    def parallel(self, nodes: int) -> Iterator[tuple[str, float, str, bool]]:
        """Yield the same of nodes that sleep, after every worker has loaded what it needs."""
        workers = len(self._grid.workers)
        self.run(self.write("warm", 4 * workers, 0.2, first=1_000_000))
        seconds = 0.2
        _, wall = self.run(self.write("parallel", nodes, seconds, first=2_000_000))
        ideal = nodes * seconds / workers
        yield f"{nodes} nodes of {seconds} s on {workers} workers, s", wall, "", True
        yield "of the ideal time", ideal / wall, f">= {EFFICIENCY}", ideal / wall >= EFFICIENCY

    def kills(self, nodes: int) -> Iterator[tuple[str, float, str, bool]]:
        """Yield the same while workers are killed."""
        folder, over, killed = self.write("kills", nodes, 0.2, first=3_000_000), threading.Event(), [0]

        def kill() -> None:
            while not over.wait(KILL_SECONDS):
                victim = random.choice(self._grid.workers)
                victim.kill()
                victim.wait()
                self._grid.workers.remove(victim)
                killed[0] += 1
                self._grid.add()

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            self.run(folder)
        finally:
            over.set()
            thread.join()
        repeats = len(list((folder / "notes").iterdir())) - nodes
        shown = [(folder / "artifacts" / "sleep" / f"n{i}" / "out.txt").read_text() for i in range(nodes)]
        wrong = sum(text != f"{3_000_000 + i}\n" for i, text in enumerate(shown))
        yield "workers killed", killed[0], "", True
        yield "nodes run again", repeats, f"<= {killed[0]}", repeats <= killed[0]
        yield "wrong results", wrong, "0", wrong == 0

    def second(self, nodes: int) -> Iterator[tuple[str, float, str, bool]]:
        """Yield the same of a run on a machine that has nothing, beside one that has given all."""
        self.run(self.write("first", nodes, 0.0, first=4_000_000))
        folder = self.write("second", nodes, 0.0, first=4_000_000)
        _, wall = self.run(folder)
        ran = len(list((folder / "notes").iterdir()))
        yield f"second machine, {nodes} nodes, s", wall, "", True
        yield "nodes that it ran", ran, "0", ran == 0


def main() -> int:
    """Print a row for each figure; return how many bounds were missed, at most one."""
    names = ("overhead", "parallel", "kills", "second")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=500)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        grid = Grid(stack, Path(name))
        for _ in range(args.workers):
            grid.add()
        grid.wait(args.workers)
        bench = Bench(Path(name), grid)
        print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; {yardstick.HEAD}", flush=True)
        for each in args.only:
            for what, figure, bound, met in getattr(bench, each)(args.nodes):
                missed += not met
                print(f"{what:50} {figure:10.2f}  {bound}{'' if met else ' MISSED'}", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
