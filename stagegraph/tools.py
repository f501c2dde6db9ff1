"""Versions of installed distributions, read from directory names: importlib.metadata costs more than a whole no-op."""

from __future__ import annotations

import functools
import os
import re
import sys


@functools.cache
def _installed() -> dict[str, str]:
    versions: dict[str, str] = {}
    for entry in sys.path:
        try:
            names = os.listdir(entry or ".")  # noqa: PTH208 - pathlib would cost more than the listing
        except OSError:
            continue
        for name in names:
            if name.endswith(".dist-info"):
                dist, _, version = name[: -len(".dist-info")].rpartition("-")
                versions.setdefault(_canonical(dist), version)
    return versions


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def dist_versions(*names: str) -> dict[str, str]:
    """Return the installed version of each named distribution, ``"absent"`` where there is none."""
    installed = _installed()
    return {name: installed.get(_canonical(name), "absent") for name in names}
