"""Limits how many nodes run at once and how much memory they take, which is measured while they run.

Memory is what a node's worker and everything it started hold and the kernel cannot take back: anonymous and shared
memory, not the pages of files that are mapped. It is looked at from outside a few times a second. A control group
would be exact, but few users may make one; a limit on the address space would stop libraries that reserve far more than
they use, and knows one process only. So a node that grows within one look may still pass for a moment: what is
declared stops a node that takes too much, and is no wall.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagegraph.errors import PlanError

if TYPE_CHECKING:
    from stagegraph.execution.sandbox import Worker
    from stagegraph.planning.dag import Node

LOOK_SECONDS = 0.25
MEBIBYTE = 1 << 20
UNLIMITED = 1 << 60  # what control groups of the first version say for no limit is near the largest number


class Room:
    """The budget of processors and memory that the nodes of one run share, ``jobs`` at once."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._looked = 0.0

    @staticmethod
    def refuse(nodes: Iterable[Node]) -> None:
        """Raise :class:`PlanError` with every node whose declared memory the machine does not have at all."""
        asking = [node for node in nodes if node.spec.resources.memory]
        has = machine_mib() if asking else 0
        problems = (
            f"{node.spec.place}: {node.name}: its resources.memory is {memory_text(node.spec.resources.memory)}, and "
            f"this machine (or its control group) has {memory_text(has)}; run it on a larger one, or declare less: "
            "that changes no key"
            for node in asking
            if node.spec.resources.memory > has
        )
        if found := list(problems):
            raise PlanError(*found)

    def full(self, running: Sequence[tuple[Node, Worker]]) -> bool:
        """Say whether no node at all fits beside those that run."""
        return len(running) >= self._jobs or any(node.spec.resources.exclusive for node, _ in running)

    def has(self, node: Node, running: Iterable[tuple[Node, Worker]]) -> bool:
        """Say whether a node fits beside those that run: each takes what it declares, or holds if that is more."""
        others, wanted = list(running), node.spec.resources
        if not others:
            return True
        if wanted.exclusive or self.full(others):
            return False
        if not wanted.memory and not any(other.spec.resources.memory for other, _ in others):
            return True
        used = resident_bytes([worker.pid for _, worker in others])
        taken = sum(max(o.spec.resources.memory * MEBIBYTE, used[w.pid]) for o, w in others)
        return taken + wanted.memory * MEBIBYTE <= machine_mib() * MEBIBYTE

    def over(self, running: Iterable[tuple[Node, Worker]]) -> Iterator[tuple[Worker, str]]:
        """Yield the workers whose node exceeds the memory it declares, each with a message; measures at intervals."""
        limits = {w: n.spec for n, w in running if n.spec.resources.memory}
        now = time.monotonic()
        if not limits or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        used = resident_bytes([worker.pid for worker in limits])
        for worker, spec in limits.items():
            if used[worker.pid] > spec.resources.memory * MEBIBYTE:
                took, most = memory_text(used[worker.pid] // MEBIBYTE), memory_text(spec.resources.memory)
                problem = f"took {took} of memory, more than its resources.memory of {most} ({spec.place})"
                yield worker, f"{problem}, and was stopped; declare more if it needs it"


def memory_text(mebibytes: int) -> str:
    """Return an amount of memory as it is written in a pipeline file: ``1.5 GiB``, ``300 MiB``."""
    return f"{mebibytes / 1024:.1f} GiB".replace(".0 ", " ") if mebibytes >= 1024 else f"{mebibytes} MiB"


def machine_mib() -> int:
    """Return the memory of the machine, or of the smallest control group around this process."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _limit_files():
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(path.read_text()))
    return total // MEBIBYTE


def _limit_files() -> Iterator[Path]:
    """Yield the files that may limit this process's memory, of its control groups and of those around them."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        folder = mount / group.lstrip("/")
        yield from (each / name for each in (folder, *folder.parents) if each.is_relative_to(mount))


def resident_bytes(pids: Iterable[int]) -> dict[int, int]:
    """Return the memory of each process with its descendants, and with its session, whose parents may be gone."""
    below: dict[int, list[int]] = {}
    for pid, parent, session in _processes():
        below.setdefault(parent, []).append(pid)
        if session not in {pid, parent}:
            below.setdefault(session, []).append(pid)
    found = {}
    for root in pids:
        queue, family = [root], {root}
        while queue:
            new = [pid for pid in below.get(queue.pop(), ()) if pid not in family]
            family.update(new)
            queue += new
        found[root] = sum(map(_resident, family))
    return found


def _processes() -> Iterator[tuple[int, int, int]]:
    """Yield (process, parent, session) ids of every visible process."""
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                yield int(name), int(fields[1]), int(fields[3])


def _resident(pid: int) -> int:
    """Return the proportional set size of a process in bytes: shared pages divided by their number of users."""
    for file, fields in (("smaps_rollup", ("Pss_Anon", "Pss_Shmem")), ("status", ("RssAnon", "RssShmem"))):
        try:
            lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        except OSError:  # gone meanwhile, or a kernel without it
            continue
        found = dict(line.split(":", 1) for line in lines if line.startswith(fields))
        if len(found) == len(fields):
            return sum(int(value.split()[0]) for value in found.values()) * 1024
    return 0
