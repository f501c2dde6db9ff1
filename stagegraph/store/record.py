"""The record: what is kept of one execution beside its outputs; writing it into the index is the commit of a node."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypeAlias, TypedDict, cast

from stagegraph.digest import digest_json
from stagegraph.stage import Json, JsonObject

DIGEST = re.compile(r"[0-9a-f]{64}")
Document = dict[str, Json]  # of a key (:mod:`stagegraph.planning.key`)
FileEntry: TypeAlias = list[Any]  # [digest, size in bytes]


class Output(TypedDict):
    """One output: ``files`` are relative names -> [digest, size in bytes]."""

    digest: str
    files: dict[str, FileEntry]


class PartCounts(TypedDict):
    """How many memoised parts of a kind an execution made and reused, and the digest of the code that makes them."""

    made: int
    reused: int
    code: NotRequired[str]


class Report(TypedDict):
    """What a stage reported while it ran."""

    facts: dict[str, Json]
    warnings: list[str]
    summary: str
    parts: dict[str, PartCounts]


class Spent(TypedDict):
    """The CPU time and the peak memory of an execution."""

    cpu_seconds: float
    peak_bytes: int


class Measured(Report, Spent):
    """The fields of a record that the worker supplies; ``views`` are names -> files."""

    views: dict[str, FileEntry]


class Ended(Measured):
    """What the worker supplies for an execution that ended well; ``outputs`` are the files of each."""

    outputs: dict[str, dict[str, FileEntry]]


class Record(Measured):
    """What is kept of one execution; ``made_from`` are the keys of what it read, by port."""

    schema: int
    key: str
    stage: str
    document: Document
    made_from: dict[str, list[str]]
    outputs: dict[str, Output]
    started: str
    seconds: float
    host: str


RECORD_SCHEMA = 1
TOLD = Measured.__required_keys__
SELDOM = ("document", "made_from")  # asked of a hit
MADE = frozenset({"key", "stage", "document", "made_from", "outputs", "started", "seconds", "host"})


def new_record(
    stage: str,
    key: str,
    document: Document,
    made_from: Mapping[str, Sequence[str]],
    event: Ended,
    started: str,
    seconds: float,
) -> Record:
    """Return the record of an execution that ended well; ``event`` is what the worker said, ``made_from`` by port."""
    made = {
        "schema": RECORD_SCHEMA,
        "key": key,
        "stage": stage,
        "document": document,
        "made_from": {port: list(keys) for port, keys in made_from.items()},
        "outputs": {p: {"digest": artifact_digest(f), "files": f} for p, f in event["outputs"].items()},
        "started": started,
        "seconds": round(seconds, 3),
        "host": event.get("host") or os.uname().nodename,
    }
    return cast("Record", made | {name: value for name, value in event.items() if name in TOLD})


class KnownRecord(dict[str, Json]):
    """A record read in part: fields that few ask of a hit are loaded on first use. It must not be written back."""

    def __init__(self, brief: JsonObject, read: Callable[[], Record | None]) -> None:
        super().__init__(brief)
        self._read = read

    def __missing__(self, name: str) -> Any:
        whole = self._read()
        if whole is None:
            raise KeyError(name)
        self.update(whole)
        return whole[name]  # type: ignore[literal-required]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, read like any other where it is not known yet."""
        try:
            return self[name]
        except KeyError:
            return default


def brief(record: Record) -> JsonObject:
    """Return what a :class:`KnownRecord` knows from the start."""
    return {name: value for name, value in record.items() if name not in SELDOM}


def is_record_of(record: Any, key: str) -> bool:
    """Say whether a document is the record of a key: made of what the key says, its files what its digests say."""
    if not isinstance(record, dict) or record.get("schema") != RECORD_SCHEMA or not record.keys() >= TOLD | MADE:
        return False
    try:
        outputs = record["outputs"].values()
        sound = all(output["digest"] == artifact_digest(output["files"]) for output in outputs)
        return (
            sound
            and record["key"] == key == key_of(record["document"])
            and are_storable(record_files(cast("Record", record)))
        )
    except (AttributeError, KeyError, TypeError, IndexError):
        return False


def are_storable(files: JsonObject) -> bool:
    """Say whether files of a result stay below where they are put, and their objects in the store: name -> (digest,
    size).
    """
    try:
        return all(
            _is_below(name) and is_digest(digest) and type(size) is int for name, (digest, size) in files.items()
        )
    except (TypeError, ValueError):
        return False


def is_digest(text: Any) -> bool:
    """Say whether a value is a digest, and so names an object of the store and no other file."""
    return isinstance(text, str) and DIGEST.fullmatch(text) is not None


def _is_below(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in name.split("/") and "\0" not in name  # noqa: PTH117 - a text


def is_newer(record: Any) -> bool:
    """Say whether a document is a record of a schema that is yet to come."""
    schema = record.get("schema") if isinstance(record, dict) else None
    return isinstance(schema, int) and schema > RECORD_SCHEMA


def key_of(document: Document) -> str:
    """Return the key: the digest of the document."""
    return digest_json(document)


def artifact_digest(files: Mapping[str, FileEntry]) -> str:
    """Return the digest that identifies one output: of its manifest, file name -> content digest."""
    return digest_json({name: entry[0] for name, entry in files.items()})


def same_outputs(a: Record, b: Record) -> bool:
    """Say whether two executions made the same, byte for byte."""
    return _digests(a) == _digests(b)


def result_digest(record: Record) -> str:
    """Return the digest of all outputs: what tells two results of one key apart, should there be two."""
    return digest_json(_digests(record))


def other_name(key: str, result: str) -> str:
    """Return the name in the index of a result that another one of its key took the place of."""
    return f"alt:{digest_json([key, result])}"


def _digests(record: Record) -> dict[str, str]:
    return {port: output["digest"] for port, output in record["outputs"].items()}


def record_files(record: Record) -> dict[str, tuple[str, int]]:
    """Return every file of a record, outputs and views: relative name -> (digest, size in bytes)."""
    files = {name: tuple(entry) for port in record["outputs"].values() for name, entry in port["files"].items()}
    files |= {f"views/{name}": tuple(entry) for name, entry in record["views"].items()}
    return files


def record_size(record: Record) -> int:
    """Return the size in bytes of a record's outputs."""
    return sum(size for _, size in record_files(record).values())


def parts_text(record: Record) -> str:
    """Say how many memoised parts a record's execution made and reused: ``page: 10 made, 290 reused``."""
    kinds = record.get("parts", {}).items()
    return "; ".join(f"{kind}: {counts['made']} made, {counts['reused']} reused" for kind, counts in kinds)
