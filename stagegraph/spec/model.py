"""What a pipeline file says once it is read, interpolated, expanded and checked: plain data with places; node names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from stagegraph.registry import Origin
    from stagegraph.stage import Stage


class Place(NamedTuple):
    """Where something was written; prints as ``pipeline.yaml:12:7``, or as ``--set vars.x`` for an override."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Resources(NamedTuple):
    """What one node takes: memory in MiB (nodes run together only if all of it fits), or the whole machine.

    Of a cluster besides ``labels``, what a worker must offer: name -> how much of it the node takes, 0 for none.
    """

    memory: int = 0
    exclusive: bool = False
    labels: Mapping[str, float] = MappingProxyType({})


class NodeSpec(NamedTuple):
    """One instance of an entry: typed parameters (autos not yet resolved) and where each was written."""

    name: str
    entry: str
    stage: Stage
    origin: Origin
    each: Mapping[str, str]
    params: Any
    places: Mapping[str, Place]
    place: Place
    needs: tuple[str, ...]
    need_places: Mapping[str, Place]
    resources: Resources = Resources()
    timeout: float | None = None


class Remote(NamedTuple):
    """A place with results: its name, where it is (a URL), and whether results are taken from it and given to it."""

    name: str
    url: str
    reads: bool
    writes: bool


class PipelineSpec(NamedTuple):
    """A pipeline file: its name, where it is, its nodes in the order they are written, and its remotes; of a file
    just read its resolved variables too.
    """

    name: str
    file: Path
    nodes: tuple[NodeSpec, ...]
    remotes: tuple[Remote, ...] = ()
    variables: Mapping[str, Any] = MappingProxyType({})  # name -> stagegraph.spec.item.Item

    @property
    def root(self) -> Path:
        """The directory of the file; relative sources and ``artifacts/`` live below it."""
        return self.file.parent


def fits(pattern: str, values: Sequence[str]) -> bool:
    """Say whether ``[x86,*]`` or ``.x86.*``, the rest of a node's name, fits the ``foreach`` values of an instance."""
    if pattern in {"[*]", ".*"}:
        return bool(values)
    if pattern[0] == "." and "," not in pattern:
        return bool(values) and fnmatchcase(".".join(values), pattern[1:])
    wanted = pattern[1:].removesuffix("]").split(",")
    pairs = zip(values, wanted, strict=False)
    return len(wanted) == len(values) and all(fnmatchcase(value, want.strip()) for value, want in pairs)
