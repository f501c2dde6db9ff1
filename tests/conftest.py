"""The whole suite takes all processors, a file of tests at a time; a selection of tests runs in this process."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

from tests.support.long_tail import GONE, NAMES

WORKER_BYTES = 6 << 30  # a worker with TVM and torch, and the processes that its tests start


def pytest_configure() -> None:
    """Let interrupts reach what the tests start: a shell that runs the suite in the background has them ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Have pytest-xdist, where it is installed, distribute a plain ``pytest``; ``-n`` says otherwise."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("usepdb")
    if whole and config.getoption("numprocesses", 0) is None and not hasattr(config, "workerinput"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # One more than processors: tests that wait, for a process or a clock, leave theirs to others.
        workers = min(len(os.sched_getaffinity(0)) + 1, memory // WORKER_BYTES)
        if workers > 1:
            config.option.numprocesses, config.option.dist = workers, "loadfile"
            config.option.loadscopereorder = False  # in order: tests/e2e has few tests in a file, and the longest
            share_processors(workers)
            share_kernels(config)


def share_processors(workers: int) -> None:
    """Give each worker its part: threads that wait by spinning for one without a processor take six times as long."""
    share = str(max(1, len(os.sched_getaffinity(0)) // workers))
    for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ.setdefault(name, share)


def share_kernels(config: pytest.Config) -> None:
    """Let what one worker has compiled be taken by the others, until all are done."""
    folder = tempfile.TemporaryDirectory(prefix="kernels-")
    os.environ["STAGEGRAPH_TEST_KERNELS"] = folder.name
    config.add_cleanup(folder.cleanup)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the long tail, and note which of its names are no test, where all tests were collected."""
    found = [item for item in items if item.nodeid in NAMES]
    for item in found:
        item.add_marker(pytest.mark.slow)
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    config.stash[GONE] = NAMES - {item.nodeid for item in found} if whole else set()
