"""What a stage author writes against: typed parameters, ports, and the context of one run.

A stage module imports this module and the standard library at its top level and nothing else, so that planning
and every looking verb stay light. Heavy libraries and the domain's rooms are imported inside ``run``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from stagegraph.errors import StageError
from stagegraph.files import list_files
from stagegraph.tools import dist_versions

__all__ = [
    "RESERVATION",
    "Context",
    "In",
    "Instance",
    "Out",
    "Part",
    "Piece",
    "Source",
    "SourceFiles",
    "Stage",
    "StageError",
    "dist_versions",
    "list_files",
    "param",
    "source",
]

Json = Any  # what the json module reads and writes
JsonObject = Mapping[str, Json]  # an object of any content


class Source(str):
    """A parameter naming an external file or directory; it enters the key by content, never by path or time."""

    __slots__ = ()


class Secret(str):
    """A parameter's text that no key, record, log or output may show; for its stage it is a text like any other."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return what may be seen of it."""
        return "'***'"


def param(
    doc: str,
    *,
    default: Any = dataclasses.MISSING,
    choices: Sequence[str] | str | None = None,
    minimum: int | None = None,
    hashed: bool = True,
    references: Sequence[str] = (),
) -> Any:
    """Declare one parameter of a stage.

    ``choices`` is a sequence of names, or ``"module:TABLE"`` naming a mapping whose keys are the allowed names (read
    only when a parameter is checked). ``hashed=False`` marks a parameter that cannot influence outputs.
    A mutable default is given as a tuple. ``references`` are names that may stand as ``${NAME}`` in its text and stay:
    the stage replaces them as it runs, and ``$${`` by ``${``.
    """
    metadata = {"doc": doc, "choices": choices, "minimum": minimum, "hashed": hashed, "references": tuple(references)}
    return field(default=default, metadata=metadata)


def source(doc: str, *, include: Sequence[str], alone: Sequence[str] = (), optional: bool = False) -> Any:
    """Declare a parameter of type :class:`Source`; ``include`` are the glob patterns of the files the stage may read.

    Only files that match enter the key: a stage that reads the words does not rerun because a picture changed.
    The parameter may name a single file too, which must then match, or match one of ``alone``: patterns of files that
    are the whole source by themselves, and nothing to it in a directory. Of those, the first of several that one was
    split into (NAME-00001-of-00003.EXT) brings the others. ``optional`` allows an empty path.
    """
    metadata = {"doc": doc, "choices": None, "minimum": None, "hashed": True, "include": tuple(include)}
    metadata["alone"] = tuple(alone)
    return field(default="" if optional else dataclasses.MISSING, metadata=metadata)


class In(NamedTuple):
    """An input port: which stage's output port it reads. ``many`` takes every matching instance instead of one.

    ``entry`` is the entry it reads where the pipeline file says so itself, whatever its stage. ``every`` names a
    parameter of that stage with ``choices``: the port wants an instance of each.
    """

    stage: str
    port: str
    doc: str
    many: bool = False
    optional: bool = False
    entry: str = ""
    every: str = ""


class Out(NamedTuple):
    """An output port: one file, or one directory, at ``path`` relative to the node's directory.

    A file that says whether an input may be shipped names that port in ``attests``: ``export`` lays it beside what was
    read there, and ships that without being told to only if there is such a file and the stage had no reservation.
    """

    path: str
    doc: str
    attests: str = ""


@dataclass(frozen=True)
class SourceFiles:
    """The files of one source that the stage declared: relative POSIX path -> where to open it, and its digest."""

    root: Path
    files: Mapping[str, Path]
    digests: Mapping[str, str]

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def path(self, name: str) -> Path:
        """Return where to open ``name``; :class:`StageError` if the source has no such file."""
        try:
            return self.files[name]
        except KeyError:
            raise StageError(f"{self.root}: no file named {name!r} there") from None


class Instance(NamedTuple):
    """One upstream instance on a ``many`` port: its ``foreach`` values and the path of its output port."""

    each: Mapping[str, str]
    path: Path


class Piece(NamedTuple):
    """A piece of a stage's work (:meth:`Context.map`): what messages call it, and what :meth:`Stage.make` is given.

    ``files`` are those that it reads of each source parameter, by its name, and it sees no others; of an input, by the
    name of the port, it sees all unless some are named, as they are called below its path.
    """

    name: str
    what: Json
    files: Mapping[str, Sequence[str]] = {}


class Part(NamedTuple):
    """A part that was remembered: its read-only file, and the small facts kept with it."""

    path: Path
    facts: JsonObject


# The fact by which a stage says why what it attests (:class:`Out`) should not be shipped all the same.
RESERVATION = "reservation"

# A part to keep: its document, file, the BLAKE3 digest of the file's bytes, and small facts to keep with it.
NewPart = tuple[Mapping[str, Json], Path, str, Mapping[str, Json]]


class Context(Protocol):
    """What ``run`` gets. Inputs are read-only; outputs go under ``out`` at their ports' declared paths."""

    params: Any
    out: Path
    document: Mapping[str, Json]  # that the key is the digest of: code, parameters, sources, inputs, tools

    def input(self, port: str) -> Path:
        """Return the file or directory of a single input port."""

    def inputs(self, port: str) -> list[Instance]:
        """Return every instance of a ``many`` input port, ordered by its ``foreach`` values."""

    def has_input(self, port: str) -> bool:
        """Say whether an optional input port is connected."""

    def source(self, name: str) -> SourceFiles:
        """Return the declared files of the source parameter ``name``."""

    def recall(self, kind: str, document: Mapping[str, Json]) -> Part | None:
        """Return the part that was remembered for ``document``, or None if there is none (any more).

        ``kind`` says in a word what it is (``page``), one of :attr:`Stage.parts`; the record counts by it.
        ``document`` must hold everything that may influence the part but for code, what it takes of rows that
        :meth:`Stage.rows` names included. Its file may be linked into ``out``. Like :meth:`remember` it may be called
        from several threads.
        """

    def remember(
        self, kind: str, document: Mapping[str, Json], file: Path, *, digest: str | None = None, **facts: Json
    ) -> Part:
        """Keep a finished file below ``out`` as the part for ``document``, also if this run is killed later.

        The file becomes read-only and stays where it is, as an output or to be removed again; returns what is kept.
        ``digest`` is the BLAKE3 digest of its bytes where it was taken while they were at hand: it is not read again.
        """

    def remember_all(self, kind: str, parts: Sequence[NewPart]) -> None:
        """Keep several parts as :meth:`remember` does, in a fraction of the time; for many that are each made quickly.

        Unsaved parts are lost if the process is killed: save often.
        """

    def map(self, kind: str, pieces: Sequence[Piece]) -> list[Json] | None:
        """Let the workers of a cluster make the parts of one kind that ``pieces`` need, each by :meth:`Stage.make`.

        Returns what that returned for each, which may be all there is to it; :meth:`recall` then finds what was
        remembered, as if it had been here.
        Returns None where there is no cluster: what is not remembered ``run`` makes itself, as ever. A piece that
        fails is named, and fails the node. Worth it for pieces of some seconds each.
        """

    def progress(self, done: int, total: int, unit: str = "", note: str = "") -> None:
        """Report progress; ``total`` is 0 where nobody knows it, ``unit`` is ``"B"`` for bytes or the name of the
        items, ``note`` what else there is to say.

        Cheap: the engine throttles.
        """

    def warn(self, message: str) -> None:
        """Record a finding that does not fail the node; ``run`` and ``show`` print it, also on later hits."""

    def fact(self, name: str, value: Json) -> None:
        """Record a small value that :meth:`Stage.rows` of this node's consumers gets to see."""

    def view(self, name: str, text: str) -> None:
        """Store a rendered page of this node (plain text, Markdown or IR) that ``pipeline show`` prints at once."""

    def summary(self, text: str) -> None:
        """Say in a few words what came out; ``run`` prints it in the node's row, also on later hits."""


class Stage:
    """One implementation: typed parameters, ports, a version, and ``run``.

    Class attributes: ``id``; ``version``, raised when the meaning of the outputs changes in a way the code digest
    cannot see; ``profile``, the kind of worker process it runs in; ``measures``: whether its outputs are measurements,
    of which a second one may be another and neither is wrong; ``Params``, a frozen dataclass made with :func:`param`
    and :func:`source`; ``inputs`` and ``outputs``, port name -> :class:`In` / :class:`Out`; ``parts``, kind of what it
    memoises -> the module that makes and remembers it: a part is good for the code that this reaches.
    """

    id: ClassVar[str]
    version: ClassVar[int] = 1
    profile: ClassVar[str] = "light"
    measures: ClassVar[bool] = False
    Params: ClassVar[type]
    inputs: ClassVar[Mapping[str, In]] = {}
    outputs: ClassVar[Mapping[str, Out]] = {}
    parts: ClassVar[Mapping[str, str]] = {}

    def resolve(self, params: Any) -> Any:
        """Return ``params`` with every ``auto`` replaced by a literal (CPU name, toolchain, reference).

        Runs while planning, before hashing: standard library and light domain modules only. May raise
        :class:`StageError` for values that are wrong together; the engine adds where they were written.
        """
        return params

    def tools(self, params: Any) -> Mapping[str, str]:  # noqa: ARG002 - part of the interface
        """Return the versions of the tools that influence the outputs: tool name -> version. Runs while planning."""
        return {}

    def rows(self, params: Any, facts: JsonObject) -> Mapping[str, str | Sequence[str]]:  # noqa: ARG002
        """Say which rows of lookup tables this node uses: ``"module:TABLE"`` -> row name(s).

        A table is a module-level dictionary literal. Only the named rows, and the modules named in their
        strings, enter the code digest; a table that is reached but not named here enters whole. ``facts`` are those
        recorded by the nodes on the input ports.
        """
        return {}

    def make(self, ctx: Context, what: Json) -> Json:
        """Make and remember the parts of one piece of :meth:`Context.map`, and return what ``run`` needs to know of it.

        What it leaves below ``ctx.out`` is removed.
        """
        raise NotImplementedError

    def run(self, ctx: Context) -> None:
        """Do the work: read inputs and sources, write every declared output under ``ctx.out``."""
        raise NotImplementedError
