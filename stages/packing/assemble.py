"""Files of a bundle: copied without passing through this process where the file system can, then digested."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


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
                    break
                left -= copied
        except OSError:  # across file systems on old kernels, and on some network file systems
            src.seek(0)
            dst.seek(0)
            dst.truncate()
            shutil.copyfileobj(src, dst, 1 << 20)


def files(root: Path) -> dict[str, dict[str, Any]]:
    """Return every file under ``root`` by relative name: its SHA-256 in hex and its size."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(root).as_posix()] = {"sha256": digest, "size": path.stat().st_size}
    return found


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` with sorted keys, so that equal documents are equal bytes."""
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True) + "\n", "utf-8")
