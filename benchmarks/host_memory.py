"""Takes the host of a virtual machine out of a measurement; stdlib alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

WRITTEN = 2**30  # bytes: more than a measured process writes
BLOCK = 4 * 2**20


def settle(sources: Iterable[Path], folder: Path) -> None:
    """Just before a clock is started: have ``sources`` in memory, and memory behind what is written to ``folder``.

    A host takes a machine's free pages back after seconds, and its cache of files when it likes. Memory that it must
    give again when a page is first touched costs ten times what writing the page does, and whichever process comes by.
    """
    for source in sources:
        with source.open("rb", buffering=0) as file:
            while file.read(BLOCK):
                pass
    block = bytes(BLOCK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(WRITTEN // BLOCK):
            file.write(block)
