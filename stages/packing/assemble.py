"""Files of a bundle: copied without passing through this process where the file system can, then digested."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from stages.documents.bundle import FileEntry

_MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64"}


def copy(source: Path, target: Path) -> None:
    """Copy the content of ``source``; blocks are shared where the file system shares them.

    Not a hard link: that would change the source's ctime, by which an unchanged file is recognised.
    """
    with source.open("rb") as src, target.open("wb") as dst:
        left = os.fstat(src.fileno()).st_size
        try:
            while left:
                copied = os.copy_file_range(src.fileno(), dst.fileno(), left)
                if not copied:
                    raise OSError(errno.EIO, "nothing was copied", str(source))
                left -= copied
        except OSError:  # across file systems on old kernels; on some network and virtual ones, which copy nothing
            src.seek(0)
            dst.seek(0)
            dst.truncate()
            shutil.copyfileobj(src, dst, 1 << 20)
    size, wanted = target.stat().st_size, source.stat().st_size
    if size != wanted:
        raise OSError(errno.EIO, f"{size} of {wanted} bytes were copied", str(target))


def machine(library: Path) -> str:
    """Return the machine that an ELF library is code for, by Linux's name of it; :class:`ValueError` if it is none."""
    with library.open("rb") as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF" or len(head) < 20:
        raise ValueError(f"{library.name}: not an ELF library")
    order: Literal["little", "big"] = "little" if head[5] == 1 else "big"
    code = int.from_bytes(head[18:20], order)
    return _MACHINES.get(code, f"ELF machine {code}")


def files(root: Path) -> dict[str, FileEntry]:
    """Return every file under ``root`` by relative name: its SHA-256 in hex and its size."""
    found: dict[str, FileEntry] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(root).as_posix()] = {"sha256": digest, "size": path.stat().st_size}
    return found
