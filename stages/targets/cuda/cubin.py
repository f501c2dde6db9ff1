"""What the CUDA compiler made of every kernel, read from the machine code it wrote. Standard library only.

A cubin is an ELF file: instructions of a kernel in section ``.text.<kernel>``, 16 bytes each; sizes of its memories in
``.nv.shared.<kernel>`` and ``.nv.constant<bank>.<kernel>``; decisions of the assembler as attributes (format u8, code
u8, size u16, words) in ``.nv.info``, by symbol, and in ``.nv.info.<kernel>``, where the addresses of spills are noted.
The figures are those that ``ptxas -v`` prints, and are there too where the machine code comes out of a cache.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_ATTRIBUTE = struct.Struct("<BBH")
_CUDA, _NOBITS, _ENTRY = 190, 8, 0x10
_RESERVED = ".nv.shared.reserved.0"  # where this section is, the system has the first KiB of what a kernel shares
_RESERVED_BYTES = 1024
_WITH_PAYLOAD = 4  # the format of an attribute that is followed by `size` bytes; others hold a value instead
_REGISTERS, _STACK, _ANNOTATIONS, _SPILL = 0x2F, 0x12, 0x55, 1
_HALVES = struct.Struct("<QQ")  # of an instruction
# Low 12 bits of an instruction from sm_75 on, and the bits of the second half that tell the width of an access.
_STORE_LOCAL, _LOAD_LOCAL = 0x387, 0x983
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 8, 6: 16}
_HMMA = 0x23C  # multiplies matrices of float16 or bfloat16


class CubinError(ValueError):
    """Bytes that are not the machine code this module reads; the message says where."""


@dataclass(frozen=True)
class Kernel:
    """The figures of one kernel for one architecture.

    ``registers`` per thread; ``stack``, ``spill_stores`` and ``spill_loads`` in bytes per thread, all in memory where a
    register was wanted; ``shared`` in bytes per block, without what a launch adds; ``constant`` and ``code`` in bytes;
    ``matrix`` is the number of instructions that multiply matrices of float16 or bfloat16 (HMMA).
    """

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    constant: int
    code: int
    matrix: int

    @property
    def spills(self) -> int:
        """Bytes that are written to memory and read again for want of registers."""
        return self.spill_stores + self.spill_loads

    def document(self) -> dict[str, int]:
        """Return it as plain data; what is 0 is left out."""
        return {name: value for name, value in asdict(self).items() if value}


class _Section(NamedTuple):
    name: str
    size: int
    bits: bytes  # nothing for a memory that holds nothing when the kernel starts


class _Symbol(NamedTuple):
    name: str
    other: int


def kernels(cubin: bytes) -> dict[str, Kernel]:
    """Return the kernels in ``cubin`` by name; :class:`CubinError` if it is anything else than a whole cubin."""
    try:
        sections = {section.name: section for section in _sections(cubin)}
        symbols = _symbols(sections)
        decided = dict(_decided(sections[".nv.info"].bits))
        entries = sorted((symbol.name, number) for number, symbol in enumerate(symbols) if symbol.other & _ENTRY)
        return {name: _kernel(name, sections, decided, number) for name, number in entries}
    except CubinError:
        raise
    except (LookupError, ValueError, struct.error) as error:
        raise CubinError(f"machine code of {len(cubin)} bytes is not what CUDA 13 writes: {error!r}") from None


def _sections(cubin: bytes) -> Iterator[_Section]:
    ident, _, machine, _, _, segments, table, _, _, segment, segment_count, width, count, names = _HEADER.unpack_from(
        cubin, 0
    )
    if ident[:6] != b"\x7fELF\x02\x01" or machine != _CUDA or width != _SECTION.size:
        raise CubinError("machine code is not a 64-bit ELF file for CUDA: compressed, or written by another compiler")
    if segments + segment * segment_count > len(cubin):
        raise CubinError(f"machine code ends at byte {len(cubin)}, before the list of its segments does")
    rows = [_SECTION.unpack_from(cubin, table + at * width) for at in range(count)]
    for name, kind, _, _, offset, size, *_ in rows:
        end = offset + size
        if kind != _NOBITS and end > len(cubin):
            raise CubinError(f"machine code ends at byte {len(cubin)}, one of its sections at {end}")
        yield _Section(_text(cubin, rows[names][4] + name), size, b"" if kind == _NOBITS else cubin[offset:end])


def _symbols(sections: dict[str, _Section]) -> list[_Symbol]:
    strings = sections[".strtab"].bits
    rows = _SYMBOL.iter_unpack(sections[".symtab"].bits)
    return [_Symbol(_text(strings, name), other) for name, _, other, *_ in rows]


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()


def _attributes(bits: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Return code and words of every attribute that has words."""
    at = 0
    while at < len(bits):
        form, code, size = _ATTRIBUTE.unpack_from(bits, at)
        at += _ATTRIBUTE.size
        if form == _WITH_PAYLOAD:
            if code in (_REGISTERS, _STACK, _ANNOTATIONS):
                yield code, struct.unpack(f"<{size // 4}I", bits[at : at + size])
            at += size


def _decided(bits: bytes) -> Iterator[tuple[tuple[int, int], int]]:
    """Return (code, symbol) -> value, of the attributes that all kernels share a section for."""
    for code, (symbol, value) in _attributes(bits):
        yield (code, symbol), value


def _kernel(name: str, sections: dict[str, _Section], decided: dict[tuple[int, int], int], symbol: int) -> Kernel:
    text, shared = sections[f".text.{name}"].bits, sections.get(f".nv.shared.{name}")
    reserved = _RESERVED_BYTES if _RESERVED in sections else 0
    code = list(_HALVES.iter_unpack(text))
    spilled = {_STORE_LOCAL: 0, _LOAD_LOCAL: 0}
    for at in _spills(name, sections[f".nv.info.{name}"].bits):
        low, high = code[at // _HALVES.size]
        spilled[low & 0xFFF] += _WIDTHS[high >> 9 & 7]
    return Kernel(
        registers=decided[_REGISTERS, symbol],
        shared=shared.size - reserved if shared else 0,
        stack=decided[_STACK, symbol],
        spill_stores=spilled[_STORE_LOCAL],
        spill_loads=spilled[_LOAD_LOCAL],
        constant=sum(found.size for found in sections.values() if _constant_of(found.name) == name),
        code=len(text),
        matrix=sum(low & 0xFFF == _HMMA for low, _ in code),
    )


def _spills(name: str, bits: bytes) -> Iterator[int]:
    """Return the addresses of the instructions that spill."""
    for code, words in _attributes(bits):
        if code == _ANNOTATIONS:
            for kind, address in zip(words[::2], words[1::2], strict=True):
                if kind != _SPILL:
                    raise CubinError(f"kernel {name} has an annotation of kind {kind}, which CUDA 13.0 does not write")
                yield address


def _constant_of(section: str) -> str:
    """Return the kernel that a bank of constants belongs to, empty for another section."""
    bank, _, name = section.removeprefix(".nv.constant").partition(".")
    return name if section.startswith(".nv.constant") and bank.isdigit() else ""
