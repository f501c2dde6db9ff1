"""The container: metadata and where each tensor lies, bounds checked, read without its weights and without NumPy.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian; magic, version, two counts, keys with
typed values, tensor infos, then the tensors, each aligned).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from stages.checkpoint import misplaced
from stages.checkpoint.gguf import SUFFIX
from stages.checkpoint.strict_json import shown

if TYPE_CHECKING:
    from pathlib import Path

    from stages.documents.files import JsonObject

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BUFFER = 2**20  # bytes read at a time
MAX_KEYS = 100_000
MAX_TENSORS = 1_000_000
MAX_VALUES = 4_000_000  # of an array; the largest vocabularies have 300,000 tokens
MAX_STRING = 2**24  # bytes; the longest chat templates have some 10,000
MAX_NAME = 256  # bytes of a key's or a tensor's name
MAX_RANK = 4
STRING, ARRAY, BOOL = 8, 9, 7
# Value type -> its struct format; STRING and ARRAY have lengths of their own.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
# Type number of a tensor -> its name, how many values a block has, and how many bytes.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: its type's name, its shape, outermost dimension first, and its first byte's place."""

    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int  # of the innermost dimension
    file: str  # its name

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Contents:
    """The metadata and tensors of one model's files: ``metadata`` has Python values, ``tensors`` are in file order."""

    metadata: JsonObject
    tensors: Mapping[str, GgufTensor]


def read_all(files: Mapping[str, Path]) -> Contents:
    """Return the contents of one model's ``files`` by name: one file, or all that it was split into, in order.

    The metadata are those of the first. :class:`ValueError` names what is damaged, missing or another model's.
    """
    (first, path), *others = files.items()
    whole = read(path, first)
    count = whole.metadata.get("split.count") or 1
    if type(count) is not int:
        raise ValueError(f"{first}: split.count = {shown(count)}; expected a whole number")
    if whole.metadata.get("split.no", 0) != 0 or count != len(files):
        raise ValueError(
            f"{first}: one of {count} files of a model, of which {len(files)} were found: fetch all of them "
            f"into one folder, and name the first, which ends in -00001-of-{count:05}{SUFFIX}"
        )
    tensors = dict(whole.tensors)
    for at, (name, other) in enumerate(others, start=1):
        part = read(other, name)
        if [part.metadata.get("split.no"), part.metadata.get("split.count")] != [at, count]:
            raise ValueError(
                f"{name}: not number {at} of the {count} files that {first} is the first of; fetch it again"
            )
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{name}: the tensor {shown(min(twice))} is in a file before it, too")
        tensors |= part.tensors
    if whole.metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        stated = shown(whole.metadata["split.tensors.count"])
        raise ValueError(f"{first}: {len(tensors)} tensors are in its files, and it says {stated}; fetch them again")
    return Contents(whole.metadata, tensors)


def read(path: Path, name: str) -> Contents:
    """Return the contents of one file; :class:`ValueError` calling it ``name`` if it is damaged or exceeds a limit."""
    with path.open("rb", BUFFER) as file:
        cursor = _Cursor(file, path.stat().st_size, name)
        tensors, keys = _begin(cursor)
        metadata = dict(_pairs(cursor, keys))
        return Contents(metadata, _tensors(cursor, tensors, metadata))


def peek(path: Path, wanted: Collection[str]) -> JsonObject:
    """Return the values of those of the ``wanted`` keys that there are, reading no further than it must."""
    found: dict[str, Any] = {}
    with path.open("rb", BUFFER) as file:
        cursor = _Cursor(file, path.stat().st_size, path.name)
        _, keys = _begin(cursor)
        for key, value in _pairs(cursor, keys):
            if key in wanted:
                found[key] = value
            if len(found) == len(wanted):
                break
    return found


class _Cursor:
    """Where the reading of a file is; nothing beyond its end is asked for."""

    def __init__(self, file: IO[bytes], size: int, name: str) -> None:
        self.file, self.size, self.name = file, size, name
        self.at = 0

    def take(self, count: int, what: str) -> bytes:
        data = self.file.read(count) if count <= self.size - self.at else b""
        if len(data) != count:
            raise ValueError(
                f"{self.name}: truncated: {what} of {count:,} bytes at byte {self.at:,} does not fit a file of "
                f"{self.size:,} bytes; fetch it again"
            )
        self.at += count
        return data

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form), what))[0]

    def text(self, what: str, limit: int = MAX_STRING) -> str:
        length = self.number("Q", what)
        if length > limit:
            raise ValueError(f"{self.name}: {what} at byte {self.at:,} claims {length:,} bytes; at most {limit:,}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.name}: {what} before byte {self.at:,} is not UTF-8") from None


def _begin(cursor: _Cursor) -> tuple[int, int]:
    """Return how many tensors and keys a file has."""
    name = cursor.name
    if (magic := cursor.take(min(4, cursor.size), "a magic number")) != MAGIC:
        if instead := misplaced.pointer(
            magic + cursor.take(min(misplaced.HEAD, cursor.size - cursor.at), "a first line")
        ):
            raise ValueError(f"{name}: {instead}")
        raise ValueError(f"{name}: not a GGUF file: it does not begin with the letters GGUF; fetch it again")
    version = cursor.number("I", "a version")
    if version and version % 2**16 == 0:
        raise ValueError(f"{name}: written for a big-endian machine; take the file for little-endian ones")
    if version not in VERSIONS:
        raise ValueError(f"{name}: version {version} of GGUF; versions {' and '.join(map(str, VERSIONS))} are read")
    tensors, keys = cursor.number("Q", "a count"), cursor.number("Q", "a count")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise ValueError(f"{name}: {tensors:,} tensors and {keys:,} keys are more than any model has: damaged")
    return tensors, keys


def _pairs(cursor: _Cursor, count: int) -> Any:
    """Yield each key with its value."""
    seen = set()
    for _ in range(count):
        key = cursor.text("a key", MAX_NAME)
        if key in seen:
            raise ValueError(f"{cursor.name}: the key {shown(key)} is there twice")
        seen.add(key)
        yield key, _value(cursor, cursor.number("I", "a type"), f"the value of {shown(key)}")


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == STRING:
        return cursor.text(what)
    if kind != ARRAY:
        return _one(kind, cursor.number(_format(cursor, kind, what), what))
    inner, count = cursor.number("I", what), cursor.number("Q", what)
    if count > MAX_VALUES:
        raise ValueError(f"{cursor.name}: {what} claims {count:,} values; at most {MAX_VALUES:,} are read")
    if inner == STRING:
        return [cursor.text(what) for _ in range(count)]
    form = _format(cursor, inner, what)
    data = cursor.take(count * struct.calcsize(form), what)
    return [_one(inner, value) for value in struct.unpack(f"<{count}{form}", data)]


def _one(kind: int, value: Any) -> Any:
    return bool(value) if kind == BOOL else value


def _format(cursor: _Cursor, kind: int, what: str) -> str:
    if kind not in SCALARS:
        raise ValueError(f"{cursor.name}: {what} is of type {kind}, which GGUF does not have: damaged")
    return SCALARS[kind]


def _tensors(cursor: _Cursor, count: int, metadata: JsonObject) -> dict[str, GgufTensor]:
    """Return where the tensors are; every one of them lies within the file."""
    name, alignment = cursor.name, metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(f"{name}: general.alignment = {shown(alignment)}; expected a power of two from 8")
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        tensor = cursor.text("a tensor's name", MAX_NAME)
        if tensor in found:
            raise ValueError(f"{name}: tensor {shown(tensor)} is there twice")
        found[tensor] = _info(cursor, f"tensor {shown(tensor)}", alignment)
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        tensor: GgufTensor(kind, shape, start + offset, width, name)
        for tensor, (kind, shape, offset, width) in found.items()
    }
    for tensor, stored in tensors.items():
        if stored.offset + stored.nbytes > cursor.size:
            raise ValueError(
                f"{name}: truncated: tensor {shown(tensor)} of {stored.nbytes:,} bytes at byte {stored.offset:,} does "
                f"not fit a file of {cursor.size:,} bytes; fetch it again"
            )
    return tensors


def _info(cursor: _Cursor, what: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
    """Return a tensor's type, shape, offset from the first one, and the bytes of its innermost dimension."""
    name, rank = cursor.name, cursor.number("I", what)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{name}: {what} has {rank} dimensions; 1 to {MAX_RANK} are possible")
    sizes = [cursor.number("Q", what) for _ in range(rank)]
    number, offset = cursor.number("I", what), cursor.number("Q", what)
    if number not in TYPES:
        known = ", ".join(kind for kind, _, _ in TYPES.values())
        raise ValueError(f"{name}: {what} is of the type number {number}, which is not read; read are {known}")
    kind, values, width = TYPES[number]
    if math.prod(sizes) >= 2**62 or 0 in sizes or sizes[0] % values:
        raise ValueError(f"{name}: {what} has the sizes {sizes}, which no tensor in {kind} has")
    if offset % alignment:
        raise ValueError(f"{name}: {what} begins at byte {offset:,} of the data, no multiple of {alignment}")
    return kind, tuple(reversed(sizes)), offset, sizes[0] // values * width
