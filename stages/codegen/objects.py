"""One kernel to machine code: an object of its own for the processor and, for a GPU, a fatbin and how it is launched.

A kernel's code is one file, so that it can be kept: an uncompressed zip archive without times.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import tvm
from tvm import tirx

from stages.ir.compat import load_json
from stages.targets.backends import DeviceCompiler

SHF_EXECINSTR = 4
OBJECT, DEVICE, LAUNCH = "kernel.o", "kernel.fatbin", "launch.json"


class Code(NamedTuple):
    """The compiled code of a kernel; ``device`` and ``launch`` (device functions as TVM's JSON) may be empty."""

    object: bytes
    device: bytes = b""
    launch: bytes = b""

    @property
    def entry_points(self) -> list[str]:
        """The names of the functions on a GPU."""
        return [str(name) for name in load_json(self.launch.decode())] if self.launch else []

    @property
    def size(self) -> int:
        """The size of the machine code in bytes: of the GPU's, if there is any, else of the processor's."""
        return len(self.device) or _executable_bytes(self.object)

    @classmethod
    def read(cls, file: Path) -> Code:
        """Read what :func:`write` has written."""
        with zipfile.ZipFile(file) as archive:
            return cls(
                *(archive.read(name) if name in archive.namelist() else b"" for name in (OBJECT, DEVICE, LAUNCH))
            )

    def write(self, file: Path) -> None:
        """Write it as one file, the same bytes whenever and wherever."""
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in zip((OBJECT, DEVICE, LAUNCH), self, strict=True):
                if data:
                    archive.writestr(zipfile.ZipInfo(name), data)


def _executable_bytes(elf: bytes) -> int:
    """Return the size of the sections of a 64-bit little-endian ELF file that hold instructions."""
    (table,), (width, count) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<HH", elf, 0x3A)
    headers = (struct.unpack_from("<IIQQQQ", elf, table + number * width) for number in range(count))
    return sum(size for _, _, flags, _, _, size in headers if flags & SHF_EXECINSTR)


def compile_kernel(
    name: str, kernel: tirx.PrimFunc, target: tvm.target.Target, device: DeviceCompiler | None, file: Path
) -> None:
    """Compile one kernel for ``target`` into ``file``, by ``device`` where it is no processor.

    In a process of its own: how TVM loads device code is replaced there.
    """
    images, launch = [], []
    if device is not None:
        create = tvm.get_global_func(device.loader, allow_missing=True)

        def load(source: bytes, _format: str, functions: object, _sources: object) -> tvm.runtime.Module:
            images.append(device.compile(bytes(source).decode()))
            launch.append(tvm.ir.save_json(functions).encode())
            return create(images[-1], device.image_format, functions, {})

        tvm.register_global_func(device.loader, load, override=True)
    with target:  # the device compiler asks for the current target, although the call names one
        module = tvm.tirx.build(tvm.IRModule({name: kernel}), target=target)
    compiled = file.with_suffix(".o")
    module.write_to_file(str(compiled))
    Code(compiled.read_bytes(), b"".join(images), b"".join(launch)).write(file)
    compiled.unlink()
