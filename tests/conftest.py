"""What all tests share."""

from __future__ import annotations

import os
import sys

import pytest


def pytest_sessionfinish(session, exitstatus):
    """Remember how the tests ended."""
    session.config.ended = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """End the process once every verdict is printed: the whole suite crashed as Python took its libraries down.

    TVM, torch and sentencepiece in one process are nobody's but the suite's; each command of the product loads its own.
    """
    if hasattr(config, "ended"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.ended)
