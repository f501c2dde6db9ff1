"""What the engine and its workers tell one another, as JSON lines: the request, and the events that answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from stagegraph.stage import Json
from stagegraph.store.record import FileEntry, Report, Spent


class SourceRequest(TypedDict):
    """A source: its folder, its files by name, and their digests."""

    root: str
    files: Mapping[str, str]
    digests: Mapping[str, str]


class NodeRequest(TypedDict):
    """What a worker is told of a settled node, wherever it runs.

    ``prepare`` names what is called once in a worker of its profile, ``origin`` are the arguments of
    :class:`~stagegraph.registry.Origin`; ``fresh`` reuses no memoised parts.
    """

    prepare: str | None
    origin: Sequence[Any]
    params: Mapping[str, Json]
    document: Mapping[str, Json]
    sources: Mapping[str, SourceRequest]
    fresh: bool
    secrets: Sequence[str]


class Placed(TypedDict):
    """What a worker is told besides, of its machine: where inputs lie, where outputs and prints go.

    ``inputs`` are port -> (instance, path), ``linked`` the path of a hard link -> its digest; ``parts`` says what makes
    what the stage memoises.
    """

    inputs: Mapping[str, Sequence[Any]]
    linked: Mapping[str, str]
    out: str
    store: str
    parts: Mapping[str, Sequence[Any]]
    log: str


class Request(NodeRequest, Placed):
    """What makes a worker run a node."""


class Found(Report):
    """What a stage reported, and the digests of objects that it found damaged."""

    damaged: list[str]


class Written(TypedDict):
    """What a stage wrote: the files of each output, and its views, by name."""

    outputs: dict[str, dict[str, FileEntry]]
    views: dict[str, FileEntry]


class Progress(TypedDict):
    """How far a stage is."""

    event: Literal["progress"]
    done: int
    total: int
    unit: str
    note: str


class Succeeded(Found, Written, Spent):
    """The end of an execution that went well."""

    event: Literal["end"]
    ok: Literal[True]


class Failed(Spent):
    """The end of one that did not; a ``bug`` is the stage's, everything else its user can mend."""

    event: Literal["end"]
    ok: Literal[False]
    problems: list[str]
    bug: bool


class Began(TypedDict):
    """The beginning of an execution elsewhere, ``where``."""

    event: Literal["began"]
    where: str


class Gone(TypedDict):
    """The end of the worker itself."""

    event: Literal["gone"]
    meaning: str


Event: TypeAlias = Began | Progress | Succeeded | Failed | Gone
