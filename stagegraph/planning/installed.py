"""Reads what installers left on disk: which distributions there are and what their ``RECORD`` lists.

Apart from :mod:`stagegraph.planning.libraries`, which remembers it, so that a run without news does not load this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from stagegraph.digest import digest_file, digest_json

NATIVE = re.compile(r"\.(so(\.\d+)*|dylib|dll|pyd)$")
ONE_PYTHON = re.compile(r"[a-z]+\d+-(?!abi)[a-z]+\d+[a-z]*-((?:many|musl)linux_\w+|macosx_\w+|win\w+)")  # a wheel's tag
# Name, version, platforms of a wheel for one Python from an index ("" for any other), digest of all but native
# libraries, path of each native library -> what RECORD says of it.
Build = tuple[str, str, str, str, dict[str, str]]


def brought(folder: str) -> dict[str, list[str]]:
    """Return top-level module -> the ``.dist-info`` folders of the distributions that contain it."""
    found: dict[str, list[str]] = {}
    for info in sorted(name for name in os.listdir(folder) if name.endswith(".dist-info")):  # noqa: PTH208
        try:
            tops = {row[0].partition("/")[0] for row in rows(f"{folder}/{info}/RECORD")}
        except OSError:
            continue
        for module in {top.partition(".")[0] if "." in top else top for top in tops if not top.endswith(".dist-info")}:
            if module.isidentifier():
                found.setdefault(module, []).append(info)
    return found


def build(record: str) -> Build:
    """Return what a distribution is made of, by its ``RECORD``: rows of path, digest and size."""
    folder, info = os.path.split(os.path.dirname(record))  # noqa: PTH120
    name, _, version = info.removesuffix(".dist-info").rpartition("-")
    listed = [row for row in rows(record) if not row[0].endswith(".pyc") and row[0].partition("/")[0] != info]
    natives = {os.path.normpath(f"{folder}/{row[0]}"): row[1] for row in sorted(listed) if NATIVE.search(row[0])}
    rest = sorted(row[:2] for row in listed if not NATIVE.search(row[0]) and not row[0].startswith(".."))
    return re.sub(r"[-_.]+", "-", name).lower(), version, _platforms(f"{folder}/{info}"), digest_json(rest), natives


def _platforms(info: str) -> str:
    """Return the platforms of a wheel that an index has for this Python alone, "" of any other.

    What came from a folder or a URL has a ``direct_url.json``; what was built here, a platform that no index takes.
    """
    try:
        lines = Path(info, "WHEEL").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    tags = [ONE_PYTHON.fullmatch(line[5:]) for line in lines if line.startswith("Tag: ")]
    platforms = [tag[1] for tag in tags if tag]
    return "" if len(platforms) < len(tags) or Path(info, "direct_url.json").exists() else " ".join(sorted(platforms))


def recorded_digest(path: str) -> str:
    """Return a file's digest as ``RECORD`` writes it."""
    import hashlib
    from base64 import urlsafe_b64encode

    with open(path, "rb") as file:  # noqa: PTH123
        return "sha256=" + urlsafe_b64encode(hashlib.file_digest(file, "sha256").digest()).decode().rstrip("=")


def rows(record: str) -> Iterator[list[str]]:
    """Yield the rows of a ``RECORD``: path, digest and size."""
    import csv

    with open(record, encoding="utf-8", newline="") as file:  # noqa: PTH123
        yield from (row for row in csv.reader(file) if row)


def python_files(record: str) -> Iterator[tuple[str, str]]:
    """Yield path and digest of each Python file that a ``RECORD`` lists with one."""
    for row in rows(record):
        if row[0].endswith(".py") and row[1].startswith("sha256="):
            yield row[0], row[1]


def loose(module: str, spec: ModuleSpec) -> Build:
    """Return the files of the module behind ``spec``, which no distribution lists: a link, or a folder on the path."""
    places = list(spec.submodule_search_locations or ())
    files = [str(path) for place in places for path in _walk(place)] or [spec.origin or ""]
    natives = {path: "" for path in sorted(files) if NATIVE.search(path)}
    rest = sorted([Path(path).name, digest_file(path)] for path in files if path.endswith(".py"))
    return module, "unversioned", "", digest_json(rest), natives


def _walk(folder: str) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        yield from (Path(where, name) for name in names)


READERS: dict[str, Callable[[str], Any]] = {"folders": brought, "builds": build, "files": recorded_digest}
