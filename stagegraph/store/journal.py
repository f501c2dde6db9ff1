"""The journal: one JSON line per finished run, appended, with a seal of its own.

A line that is torn (a kill, a full disk), altered or of another shape is skipped on read.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from stagegraph.digest import digest_json
from stagegraph.errors import warn
from stagegraph.files import open_regular
from stagegraph.stage import Json, JsonObject
from stagegraph.store.record import PartCounts

SEAL_DIGITS = 32
TAG = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,49}")  # of a run
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
# Field -> its type.
RUN = {"pipeline": str, "started": str, "seconds": float, "state": str, "command": list, "nodes": list}
NODE = {"node": str, "outcome": str, "key": str, "seconds": float, "reason": str, "summary": str, "stage": str}
NODE |= {"reasons": list, "warnings": list, "problems": list, "parts": dict, "bytes": float, "peak_bytes": float}
NODE |= {"began": float}
SOMETIMES = {"stage", "warnings", "parts", "began"}
# How a node ends, or that it needed nothing done; the first two mean that it was executed.
BUILT, UNCHANGED, FAILED, SKIPPED, HIT = "BUILT", "UNCHANGED", "FAILED", "SKIPPED", "HIT"
EXECUTED = frozenset({BUILT, UNCHANGED})


class LastResult(TypedDict, total=False):
    """What is remembered of a node: the ``key`` of its last result, and those of what has ``failed`` or is ``running``
    since then.
    """

    key: str
    failed: str
    running: str


class NodeEntry(TypedDict):
    """How one node ended in a run; the journal's lines of earlier versions lack some of it."""

    node: str
    outcome: str
    reason: str
    reasons: list[str]
    key: str
    seconds: float
    bytes: int
    peak_bytes: int
    summary: str
    parts: Mapping[str, PartCounts]
    warnings: list[str]
    problems: list[str]
    log: str | None
    stage: NotRequired[str]
    result: NotRequired[str]
    began: NotRequired[float]


class RunEntry(TypedDict):
    """A line of the journal without its seal: a run, and the nodes in it that were not simply up to date."""

    pipeline: str
    started: str
    seconds: float
    state: str
    command: list[str]
    nodes: list[NodeEntry]
    tag: NotRequired[str]


class Journal:
    """An append-only file of run summaries."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, entry: RunEntry) -> None:
        """Append one run; a single write, so that runs side by side do not mix their lines.

        Where the disk takes no more, that is said and all that is lost: results are committed one by one before.
        """
        try:
            self._append(entry)
        except OSError as error:
            warn(f"{self._path}: {error.strerror}; this run will not be among past runs, and no result is lost by that")

    def _append(self, entry: RunEntry) -> None:
        sealed = {**entry, "seal": digest_json(entry)[:SEAL_DIGITS]}
        line = json.dumps(sealed, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # close the torn line of a killed run
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

    def entries(self) -> Iterator[RunEntry]:
        """Yield every run that can be believed, oldest first, without its seal."""
        try:
            with open_regular(self._path) as file:
                lines = file.readall().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and _is_sound(entry):
                yield cast("RunEntry", entry)

    def last_results(self) -> dict[tuple[str, str], LastResult]:
        """Return (pipeline, node) -> ``key`` of the node's last result and ``failed`` key of a later failure."""
        found: dict[tuple[str, str], LastResult] = {}
        for entry in self.entries():
            for node in entry["nodes"]:
                last = found.setdefault((entry["pipeline"], node["node"]), {})
                if node["outcome"] in EXECUTED | {HIT}:
                    last.pop("failed", None)
                    last["key"] = node["key"]
                elif node["outcome"] == FAILED and node["key"]:
                    last["failed"] = node["key"]
        return {node: last for node, last in found.items() if last}

    def node_of_key(self) -> dict[str, str]:
        """Return the node, as ``pipeline/node``, that each key was last executed for."""
        return {
            node["key"]: f"{entry['pipeline']}/{node['node']}"
            for entry in self.entries()
            for node in entry["nodes"]
            if node["outcome"] in EXECUTED
        }


def _is_sound(entry: dict[str, Json]) -> bool:
    """Say whether a line is what was appended, and of a shape that is known here: other versions have others."""
    if "seal" in entry and entry.pop("seal") != digest_json(entry)[:SEAL_DIGITS]:
        return False
    nodes = entry.get("nodes")
    return (
        entry.keys() - {"tag"} == RUN.keys()
        and TAG.fullmatch(str(entry.get("tag", "x"))) is not None
        and all(_is(entry[name], kind) for name, kind in RUN.items())
        and TIME.fullmatch(entry["started"]) is not None
        and all(isinstance(word, str) for word in entry["command"])
        and isinstance(nodes, list)
        and all(isinstance(node, dict) and _is_node(node) for node in nodes)
    )


def _is_node(node: JsonObject) -> bool:
    return node.keys() >= NODE.keys() - SOMETIMES and all(_is(node[name], NODE[name]) for name in NODE if name in node)


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)
