"""Which device code a library really holds: finds the fatbins inside it and lists their entries. Standard library only.

Layout, as CUDA 13 writes it: a fatbin is a header (magic, version u16, header size u16, payload size u64) followed by
entries (kind u16, version u16, header size u32, payload size u64, ... architecture u32 at byte 28).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.targets.cuda import cubin
from stages.targets.cuda.cubin import Kernel

if TYPE_CHECKING:
    from stages.documents.library import DeviceCode as Entry

MAGIC = bytes.fromhex("50ed55ba")
KINDS = {1: "ptx", 2: "elf"}
_HEADER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ")
_ARCH_AT = 28


@dataclass(frozen=True, order=True)
class FatbinEntry:
    """One entry: ``kind`` is ``elf`` (machine code) or ``ptx``; ``arch`` 80 means sm_80 or compute_80."""

    arch: int
    kind: str

    def document(self) -> Entry:
        """Return it as plain data."""
        return {"kind": self.kind, "arch": self.arch}


def entries(library: Path) -> list[FatbinEntry]:
    """Return the kinds of device code in ``library``, sorted, however often; empty if it holds none."""
    return sorted({code for code, _ in _entries(library.read_bytes())})


def kernels(library: Path) -> dict[int, dict[str, Kernel]]:
    """Return architecture -> kernel -> its figures, of all machine code in ``library``, sorted by architecture.

    :class:`~stages.targets.cuda.cubin.CubinError` for machine code that is not as CUDA 13 writes it.
    """
    found: dict[int, dict[str, Kernel]] = {}
    for code, content in machine_code(library):
        found.setdefault(code.arch, {}).update(cubin.kernels(content))
    return dict(sorted(found.items()))


def machine_code(library: Path) -> Iterator[tuple[FatbinEntry, bytes]]:
    """Return the cubins in ``library``, whole."""
    return (entry for entry in _entries(library.read_bytes()) if entry[0].kind == "elf")


def _entries(data: bytes) -> Iterator[tuple[FatbinEntry, bytes]]:
    start = data.find(MAGIC)
    while start >= 0:
        yield from _entries_at(data, start)
        start = data.find(MAGIC, start + len(MAGIC))


def _entries_at(data: bytes, start: int) -> Iterator[tuple[FatbinEntry, bytes]]:
    if start + _HEADER.size > len(data):
        return
    _, version, header, payload = _HEADER.unpack_from(data, start)
    end = start + header + payload
    if version != 1 or header != _HEADER.size or end > len(data):
        return  # the magic's bytes occur elsewhere too, as a constant
    at = start + header
    while at + _ARCH_AT + 4 <= end:
        kind, _, entry_header, size = _ENTRY.unpack_from(data, at)
        if kind not in KINDS or entry_header < _ARCH_AT + 4:
            return
        content = at + entry_header
        arch = struct.unpack_from("<I", data, at + _ARCH_AT)[0]
        yield FatbinEntry(arch, KINDS[kind]), data[content : content + size]
        at = content + size


def missing(found: Sequence[FatbinEntry], archs: Sequence[int]) -> list[str]:
    """Return the entries that are missing in ``found``: machine code for each of ``archs``, and PTX of the highest."""
    wanted = [FatbinEntry(arch, "elf") for arch in archs] + [FatbinEntry(max(archs), "ptx")]
    names = {"elf": "machine code for sm_{}", "ptx": "PTX for compute_{}"}
    return [names[code.kind].format(code.arch) for code in wanted if code not in found]
