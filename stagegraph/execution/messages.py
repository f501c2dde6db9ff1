"""The JSON messages between the engine and its workers: requests to run a node, and the events that answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from stagegraph.planning.planner import Rows
from stagegraph.stage import Json
from stagegraph.store.memo import PartEntry
from stagegraph.store.record import FileEntry, Report, Spent

# Port -> its instances: ``foreach`` values, path of the output in its folder, files as a record has them.
LaidOut: TypeAlias = tuple[dict[str, str], str, Mapping[str, FileEntry]]
Layout: TypeAlias = dict[str, list[LaidOut]]


class SourceRequest(TypedDict):
    """A source: its folder, its files by name, and their digests."""

    root: str
    files: Mapping[str, str]
    digests: Mapping[str, str]


class PieceRequest(TypedDict):
    """A request for the parts of one kind that a piece (:class:`~stagegraph.stage.Piece`) needs."""

    kind: str
    name: str
    what: Json
    files: Mapping[str, Sequence[str]]


class NodeRequest(TypedDict):
    """The part of a request that is the same wherever the node runs.

    ``prepare`` names what is called once in a worker of its profile, ``origin`` are the arguments of
    :class:`~stagegraph.registry.Origin`; ``fresh`` reuses no memoised parts; ``piece`` is what is to be made instead of
    the node's outputs.
    """

    prepare: str | None
    origin: Sequence[Any]
    params: Mapping[str, Json]
    document: Mapping[str, Json]
    sources: Mapping[str, SourceRequest]
    fresh: bool
    secrets: Sequence[str]
    piece: PieceRequest | None


class Placed(TypedDict):
    """The part of a request that names paths on the worker's machine: inputs, outputs and log.

    ``inputs`` are port -> (instance, path), ``linked`` the path of a hard link -> its digest; ``parts`` says what makes
    what the stage memoises, ``maps`` whether others make pieces for it.
    """

    inputs: Mapping[str, Sequence[Any]]
    linked: Mapping[str, str]
    out: str
    store: str
    parts: Mapping[str, Sequence[Any]]
    log: str
    maps: bool


class Request(NodeRequest, Placed):
    """The whole request to run a node."""


class MapRequest(TypedDict):
    """A stage asks that others make these pieces, and waits for a :class:`Mapped` or :class:`PieceFailed`."""

    event: Literal["map"]
    pieces: list[PieceRequest]


class Made(Spent):
    """The end of a piece that went well: what the stage returned of it, and its parts by their names in the index."""

    event: Literal["made"]
    result: Json
    parts: dict[str, PartEntry]


class Mapped(TypedDict):
    """What others made of all pieces: what the stage returned of each, and the parts, whose objects are here."""

    event: Literal["mapped"]
    results: list[Json]
    parts: dict[str, PartEntry]


class Found(Report):
    """What a stage reported, and the digests of objects that it found damaged."""

    damaged: list[str]


class Written(TypedDict):
    """What a stage wrote: the files of each output, and its views, by name."""

    outputs: dict[str, dict[str, FileEntry]]
    views: dict[str, FileEntry]


class Progressed(TypedDict):
    """The progress of a stage."""

    event: Literal["progress"]
    done: int
    total: int
    unit: str
    note: str


class Succeeded(Found, Written, Spent):
    """The end of an execution that went well."""

    event: Literal["end"]
    ok: Literal[True]


class Failure(TypedDict):
    """The end of an execution that failed; a ``bug`` is the stage's, everything else its user can mend."""

    event: Literal["end"]
    ok: Literal[False]
    problems: list[str]
    bug: bool


class PieceFailed(Failure):
    """The failure of a piece, with the end of what it printed."""

    log: str


class Failed(Failure, Spent):
    """A failure in a worker process, with the time and memory that it took."""


class Began(TypedDict):
    """The beginning of an execution elsewhere, ``where``."""

    event: Literal["began"]
    where: str


class Gone(TypedDict):
    """The end of the worker itself."""

    event: Literal["gone"]
    meaning: str


Event: TypeAlias = Began | Progressed | Succeeded | Failure | Gone
WorkerEvent: TypeAlias = Event | MapRequest | Made


# -- of a cluster: what its workers are sent, and what they answer ---------------------------------------------------


class KnownWorker(TypedDict):
    """What Dask knows of a worker, as far as it matters here: its threads, and the resources that it offers."""

    nthreads: int
    resources: dict[str, float]


class ClusterRequest(NodeRequest):
    """What a worker of a cluster needs to know of a node, to run it as the machine that planned it would.

    ``sizes`` are source -> file -> bytes; ``own_files`` the files of the pipeline's folder that the stage's code is in,
    as base64; ``memory`` the limit in MiB, 0 for none; ``remote`` name and URL of the one that files go through;
    ``labels`` what a worker must offer. ``topic`` is empty for a piece, of whose course nobody is told.
    """

    protocol: int
    platform: str
    topic: str
    key: str
    rows: Rows
    layout: Layout
    sizes: Mapping[str, Mapping[str, int]]
    own_files: Mapping[str, str]
    memory: int
    labels: Sequence[str]
    remote: Sequence[str]


class ClusterTask(ClusterRequest):
    """A request under the name that Dask has for it."""

    task: str


class ReceivedTask(ClusterTask):
    """A request as a worker has it; ``where`` is that worker's address."""

    where: str


class SucceededElsewhere(Succeeded):
    """The end of an execution that went well on a worker's machine, which is called ``host``."""

    host: str


class Refused(TypedDict):
    """A worker's refusal to run a node, since its machine would make something else of it."""

    event: Literal["refused"]
    problems: list[str]


class Lacks(TypedDict):
    """The digests of inputs that neither the worker nor the remote has."""

    event: Literal["lacks"]
    digests: list[str]


class Printed(TypedDict):
    """A piece of a node's log: base64, at an offset in bytes."""

    event: Literal["log"]
    offset: int
    text: str


ClusterEnd: TypeAlias = SucceededElsewhere | Made | Failure | PieceFailed | Refused | Lacks
ClusterEvent: TypeAlias = Began | Progressed | Printed | ClusterEnd


class RefusedBy(Refused):
    """A refusal, with the address of the worker."""

    where: str


class Collected(TypedDict):
    """The outputs of a node have arrived on this machine; ``end`` is the event that announced them."""

    event: Literal["collected"]
    end: Succeeded


class Supplied(TypedDict):
    """The remote now has the inputs that a worker lacked."""

    event: Literal["supplied"]


# What a slot of a cluster is handed: the events of its worker, and those of transfers on this machine.
SlotEvent: TypeAlias = Event | RefusedBy | Lacks | Printed | Collected | Supplied
