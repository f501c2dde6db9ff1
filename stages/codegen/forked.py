"""Runs jobs side by side in children forked from this process: nothing is imported or sent again, and a compiler that
crashes takes one job with it, which then has a name.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

LOG_HEAD = 12  # lines of what a crashed job has said: its last words, then a long way back through the stack
PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """The end of a job: its number, its seconds, and its error, if any."""

    number: int
    seconds: float
    problem: str


def run(jobs: Sequence[Callable[[], object]], folder: Path) -> Iterator[Ended]:
    """Run ``jobs``, as many at once as there are processors for us, and yield each as it ends.

    A job leaves its result in a file; what it prints and what it raises goes to ``folder``.
    """
    fork = multiprocessing.get_context("fork")
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Any, tuple[int, float, ForkProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                number, job = waiting.pop()
                child = fork.Process(target=_work, args=(job, _log(folder, number), os.getpid()), daemon=True)
                child.start()
                running[child.sentinel] = number, time.perf_counter(), child
            for sentinel in connection.wait(list(running)):
                number, started, child = running.pop(sentinel)
                child.join()
                yield Ended(number, time.perf_counter() - started, _problem(child.exitcode, _log(folder, number)))
    finally:
        for _, _, child in running.values():
            child.kill()
            child.join()


def _log(folder: Path, number: int) -> Path:
    return folder / f"{number}.log"


def _work(job: Callable[[], object], log: Path, parent: int) -> None:
    """In the child: do the job; leave what it says, or only the message of what it raises, in ``log``."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        job()
    except Exception as error:  # noqa: BLE001 - it is the parent that knows what the job was for
        log.write_text(str(error) or type(error).__name__, "utf-8")
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _problem(exitcode: int | None, log: Path) -> str:
    if exitcode == 0:
        return ""
    text = log.read_text("utf-8", "replace").strip() if log.is_file() else ""
    if exitcode == 1 and text:
        return text
    name = signal.Signals(-exitcode).name if exitcode and exitcode < 0 else f"exit code {exitcode}"
    return "\n".join([f"the compiler crashed ({name})", *text.splitlines()[:LOG_HEAD]])
